"""Which matrices' updates are cut to a part of their rank, and what that takes. Headers only."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from uipe_merge.errors import RecipeError
from uipe_merge.naming import place

if TYPE_CHECKING:
    from uipe_merge.plan import Plan, Step
    from uipe_merge.steering import Steering

_LIBRARY_MEMORY = 40_000_000  # what the linear algebra keeps for itself, measured
_MATRIX, _STACK = 2, 3
"""Dimensions of a matrix and of a stack of experts' matrices."""


def targets(plan: Plan) -> list[Step]:
    """Return the steps whose update is cut to a part of its rank.

    Raises:
        RecipeError: There is none.
    """
    steering = plan.recipe.steering
    if steering.energy == 1:
        return []
    matrices = [step for step in plan.steps if step.dtype.computes and _is_matrix(step)]
    inside = [step for step in matrices if steering.rank_all or place(step.name).layer is not None]
    if not inside:
        raise RecipeError(
            "a rank or an energy is asked for, and no matrix is in a layer",
            remedy="add --rank-all to take those outside of the layers" if matrices else None,
        )
    return [step for step in inside if step.group and not _whole(step, steering)]


def factors_bytes(plan: Plan) -> int:
    """Return what the factors of all targets take on the disk; of a share of energy nobody knows.

    Raises:
        RecipeError: There is no target.
    """
    rank = plan.recipe.steering.rank or 0
    return sum(
        4 * rank * sum(step.source.shape[-2:]) * math.prod(step.source.shape[:-2])
        for step in targets(plan)
    )


def peak_memory(plan: Plan, threads: int) -> int:
    """Return an upper estimate of the bytes that the matrices in hand take beside all else."""
    from uipe_merge.arithmetic.svd import workspace  # imports torch

    asked = plan.recipe.steering.rank
    most = 0
    for step in targets(plan):
        rows, columns = step.source.shape[-2:]
        experts = math.prod(step.source.shape[:-2])
        rank = min(rows, columns) if asked is None else asked
        kept = 4 * rank * (rows + columns)
        # The matrix; what finds its factors; those of a stack, and the file they make.
        most = max(most, 4 * rows * columns + workspace(rows, columns, asked) + 3 * experts * kept)
    return _LIBRARY_MEMORY + min(threads, at_once()) * most


def at_once() -> int:
    """Return how many matrices are in memory at a time: more than processors gain nothing."""
    return len(os.sched_getaffinity(0))


def _is_matrix(step: Step) -> bool:
    return len(step.source.shape) in (_MATRIX, _STACK) and step.elements > 0


def _whole(step: Step, steering: Steering) -> bool:
    """Tell whether all of the rank is asked for: then w is v."""
    return steering.rank is not None and steering.rank >= min(step.source.shape[-2:])
