"""The plan of an output that is itself an adapter.

θ(α) = θ₀ + (1 + α)·c·B·A: the update is linear in B, so B alone is lengthened (both factors
would give (1 + α)²), and with it the bias of a B. That is the one rule again, B + α·(B − 0),
so a B is extrapolated against zero and everything below the plan stays as it is. A tensor that
the adapter stores whole is extrapolated against the original's.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.adapter import WEIGHTS_NAME
from uipe_merge.checkpoint.header import ZERO
from uipe_merge.errors import IncompatibleModelsError
from uipe_merge.plan import Plan, Step, draft, placed

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    """
    adapter = unlearned.adapter
    if adapter is None:
        raise IncompatibleModelsError(
            "is a whole model, whose update is no product of two factors",
            file=unlearned.location,
            remedy="name a LoRA adapter as UNLEARNED, or write a whole model with --as model",
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
    drafts = [_draft(name, adapter, original, recipe) for name in adapter.stored]
    warnings = [*original.warnings, *unlearned.warnings, *pairing.warnings]
    shards = [placed(WEIGHTS_NAME, drafts)]
    return Plan(recipe, shards, original.shards, unlearned.shards, warnings)


def _places(folders: Iterable[Folder]) -> set[str]:
    return {os.path.realpath(folder.location) for folder in folders}


def _draft(name: str, adapter: Adapter, original: Checkpoint, recipe: Recipe) -> Step:
    """Decide the operation of one tensor of the adapter."""
    spec = adapter.stored[name]
    if name in adapter.replaced:
        return draft(name, original.tensors[adapter.replaced[name]], spec, recipe)
    if name in adapter.left:
        return draft(name, spec._replace(home=ZERO), spec, recipe)
    # An A stays, whatever α is: it is carried over as all is at α = 0.
    kept = draft(name, spec, spec, dataclasses.replace(recipe, alpha=0.0))
    return kept._replace(alpha=recipe.alpha)
