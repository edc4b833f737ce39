"""α per tensor, resolved from the recipe before any payload is read.

The first rule whose pattern matches a tensor's name decides; then the schedule over layers,
for tensors that belong to a layer; then the catch-all. What matches nothing is an error: a
mistyped pattern would otherwise be a merge without it.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from uipe_merge.errors import RecipeError, listed
from uipe_merge.naming import place, stack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from uipe_merge.recipe import Recipe

_NUMBER = re.compile(r"\d+")
_NEAREST = 3


def resolve(recipe: Recipe, names: Sequence[str]) -> dict[str, float]:
    """Return α of every tensor.

    Args:
        recipe: Rules, schedule and catch-all.
        names: The tensors that the two checkpoints share.

    Raises:
        RecipeError: A rule matches no tensor, or none that an earlier one has left; the
            schedule names layers that there are not, or the model has several stacks of
            layers; or see ``MergekitRecipe.alphas``.
    """
    if recipe.mergekit is not None:
        return recipe.mergekit.alphas(names)
    if not (recipe.rules or recipe.layers or recipe.gradient):
        return dict.fromkeys(names, recipe.alpha)
    alphas: dict[str, float] = {}
    for pattern, alpha in recipe.rules:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise RecipeError(
                f"the rule '{pattern}={alpha:g}' matches no tensor",
                remedy=f"names that come near: {', '.join(nearest(pattern, names)) or 'none'}",
            )
        fresh = [name for name in matching if name not in alphas]
        if not fresh:
            raise RecipeError(
                f"the rule '{pattern}={alpha:g}' comes too late: earlier rules match all of it",
                remedy="put it before them; the first rule that matches decides",
            )
        alphas |= dict.fromkeys(fresh, alpha)
    layers = _schedule(recipe, names) if recipe.layers or recipe.gradient else {}
    return {name: alphas.get(name, layers.get(name, recipe.alpha)) for name in names}


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the few kinds of names, with ``*`` for numbers, that are most like a pattern."""
    kinds = sorted({_NUMBER.sub("*", name) for name in names})
    return difflib.get_close_matches(pattern, kinds, _NEAREST, cutoff=0.3)


def _schedule(recipe: Recipe, names: Sequence[str]) -> dict[str, float]:
    """Return α of the tensors in layers, linear between the knots and constant outside."""
    layers = {name: layer for name in names if (layer := place(name).layer) is not None}
    if not layers:
        raise RecipeError(
            "α is given by layer, and no tensor's name tells its layer",
            remedy="use --alpha-rule with patterns of the names",
        )
    stacks = sorted({stack(name) for name in layers})
    if len(stacks) > 1:
        raise RecipeError(
            f"α is given by layer, and the model has several stacks: {listed(stacks)}",
            remedy="use --alpha-rule with patterns that begin with the one that is meant",
        )
    last = max(layers.values())
    knots: list[tuple[float, float]] = list(recipe.layers)
    if recipe.gradient:
        # As mergekit spreads a gradient: the first value at the first layer, the last at the last.
        gaps = max(len(recipe.gradient) - 1, 1)
        knots = [(last * number / gaps, alpha) for number, alpha in enumerate(recipe.gradient)]
    if missing := [str(at) for at, _ in knots if at > last]:
        raise RecipeError(
            f"α is given for layer {', '.join(missing)}, and the layers are 0 to {last}",
            remedy="name layers that there are",
        )
    return {name: interpolated(knots, layer) for name, layer in layers.items()}


def interpolated(knots: Sequence[tuple[float, float]], at: float) -> float:
    """Return the piecewise linear function through ``knots``, sorted, at one point."""
    number = bisect_right([position for position, _ in knots], at)
    if number in (0, len(knots)):
        return knots[min(number, len(knots) - 1)][1]
    (left, low), (right, high) = knots[number - 1 : number + 1]
    return low + (high - low) * (at - left) / (right - left)
