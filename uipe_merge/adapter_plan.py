"""The plan of an output that is itself an adapter.

θ(α) = θ₀ + (1 + α)·c·B·A: the update is linear in B, so B alone is lengthened (both factors
would give (1 + α)²), and with it the bias of a B. That is the one rule again, B + α·(B − 0),
so a B is extrapolated against zero and everything below the plan stays as it is. A tensor that
the adapter stores whole is extrapolated against the original's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.adapter import WEIGHTS_NAME
from uipe_merge.checkpoint.header import ZERO
from uipe_merge.coefficients import resolve
from uipe_merge.errors import IncompatibleModelsError
from uipe_merge.plan import Plan, Step
from uipe_merge.planning import draft, placed, refuse_untying

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from uipe_merge.checkpoint.model import Adapter, Checkpoint
    from uipe_merge.checkpoint.pair import Pairing
    from uipe_merge.checkpoint.storage import Folder
    from uipe_merge.recipe import Recipe


def make_adapter_plan(
    original: Checkpoint, unlearned: Checkpoint, pairing: Pairing, recipe: Recipe
) -> Plan:
    """Resolve a recipe against an original and an adapter on it.

    Raises:
        IncompatibleModelsError: UNLEARNED is not an adapter, or not one on ORIGINAL.
        RecipeError: A rule or the layers of the recipe match nothing.
    """
    adapter = unlearned.adapter
    if adapter is None:
        raise IncompatibleModelsError(
            "is a whole model, whose update is no product of two factors",
            file=unlearned.location,
            remedy="name a LoRA adapter as UNLEARNED, or write a whole model with --as model",
        )
    if adapter.config.get("use_dora"):
        raise IncompatibleModelsError(
            "is DoRA, whose update is no multiple of B",
            file=unlearned.location,
            remedy="write a whole model with --as model",
        )
    base = [folder for folder in unlearned.folders.values() if folder is not unlearned.folder]
    if _places(base) != _places(original.folders.values()):
        raise IncompatibleModelsError(
            f"is applied to another model than {original.location}, so more than its factors "
            "differs",
            file=unlearned.location,
            remedy="name the model before the + as ORIGINAL, or write a whole model with "
            "--as model",
        )
    alphas = resolve(recipe, list(pairing.pairs))
    refuse_untying(unlearned, alphas)
    drafts = [_draft(name, adapter, pairing, recipe, alphas) for name in adapter.stored]
    warnings = [*original.warnings, *unlearned.warnings, *pairing.warnings]
    shards = [placed(WEIGHTS_NAME, drafts)]
    return Plan(recipe, shards, original.shards, unlearned.shards, warnings)


def _places(folders: Iterable[Folder]) -> set[str]:
    return {os.path.realpath(folder.location) for folder in folders}


def _draft(
    name: str, adapter: Adapter, pairing: Pairing, recipe: Recipe, alphas: Mapping[str, float]
) -> Step:
    """Decide the operation of one tensor of the adapter, with α of the tensor it changes."""
    spec = adapter.stored[name]
    if target := adapter.replaced.get(name):
        return draft(name, pairing.pairs[target][0], spec, recipe, alphas[target], name)
    if target := adapter.left.get(name):
        return draft(name, spec._replace(home=ZERO), spec, recipe, alphas[target], name)
    # An A stays, whatever α is: it is carried over as all is at α = 0.
    return draft(name, spec, spec, recipe, 0.0, name)._replace(alpha=recipe.alpha)
