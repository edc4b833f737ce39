"""A search for α: the best of an objective among the models that keep what must be kept.

One α is bracketed on an even grid and refined by golden sections, with a look into the widest
gap now and then, since forget quality is not monotone in α and collapses past its peak. Several
(by layer, by kind of module) are left to Optuna, in ``sampling``. Every evaluation is kept by what it is of, on the disk if there is a
directory, so that an interrupted search goes on where it was and evaluates nothing twice.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.errors import UsageError
from uipe_merge.study.constraints import Constraint, parse_constraint
from uipe_merge.study.judging import Judge, SearchResult, make_judge
from uipe_merge.study.layouts import normalised
from uipe_merge.study.sampling import SAMPLERS, Sampler, require_optuna, sampled
from uipe_merge.study.trials import Bench, EvaluationError, Point, Space, Trial

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["EvaluationError", "Point", "SearchResult", "Space", "Trial", "search"]

TRIALS = 20
"""Evaluations by default: each is a whole evaluation of a model."""

_GOLDEN = (3 - math.sqrt(5)) / 2
_EXPLORE = 4  # every fourth refinement looks into the widest gap instead
_FINEST = 1 / 1000  # of the range: finer is below what a merge to bfloat16 realises


def search(  # noqa: PLR0913 - one keyword-only argument a choice of the search
    evaluate: Callable[[Point], Mapping[str, float]],
    space: Space,
    *,
    maximise: str,
    subject_to: Sequence[Constraint | str],
    minimise: bool = False,
    trials: int = TRIALS,
    sampler: Sampler = "tpe",
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search for the α with the best objective among those that meet every constraint.

    Args:
        evaluate: Returns the scores of a model, by metric; NaN where there is none. May raise
            ``EvaluationError``, and a ``NumericError`` of the merge counts as that.
        space: Which α, and between what.
        maximise: The objective, for example ``forget_quality``.
        subject_to: What the model has to keep: ``model_utility>=0.95*unlearned``. One at least
            on another metric than the objective. A bound by ``unlearned`` or ``original`` costs
            an evaluation of that one.
        minimise: The objective is better where it is smaller.
        trials: Evaluations at most, those of earlier runs included.
        sampler: How several α are searched for: ``tpe``, ``nsga2`` or ``gp``.
        seed: Of that; the same seed gives the same trials, interrupted or not.
        directory: Where evaluations are kept; made where it is missing. The same call with the
            same directory goes on.

    Raises:
        UsageError: There is no constraint, a bound cannot be told, Optuna is not installed, the
            directory is of another search, or every evaluation fails.
        RecipeError: A constraint cannot be understood, or an α cannot be used.
        CorruptInputError: What an earlier run kept is damaged.
    """
    asked = [
        each if isinstance(each, Constraint) else parse_constraint(each) for each in subject_to
    ]
    objective = normalised(maximise)
    if all(each.metric == objective for each in asked):
        raise UsageError(
            f"nothing is searched for on {objective} alone: a model that talks gibberish can "
            "score high",
            remedy="give a constraint on what must be kept: 'model_utility>=0.95*unlearned'",
        )
    if trials < 1 or sampler not in SAMPLERS:
        raise UsageError(
            f"{trials} trials by '{sampler}' make no search",
            remedy=f"choose 1 or more, and one of {', '.join(SAMPLERS)}",
        )
    several = len(space.names) > 1
    if several:
        require_optuna()
    own = {
        "names": space.names,
        "range": [space.low, space.high],
        "base": space.base.canonical(),
        "objective": [objective, minimise],
        "constraints": list(map(str, asked)),
        "sampler": [sampler, seed] if several else None,
        "evaluator": getattr(evaluate, "identity", None),
    }
    root = None if directory is None else Path(directory)
    with Bench.opened(evaluate, space, trials, own, root) as bench:
        judge = make_judge(bench, objective, asked, minimise=minimise)
        if several:
            sampled(bench, judge, sampler, seed, root)
        else:
            _refined(bench, judge)
        return judge.result(bench)


def _refined(bench: Bench, judge: Judge) -> None:
    """Evaluate an even grid, then go on from its best."""
    space = bench.space
    count = min(max(bench.most // 3, 5), bench.most)
    gap = (space.high - space.low) / max(count - 1, 1)
    grid = [space.low + gap * number for number in range(count)]
    tried: dict[float, Trial] = {}
    if space.low < 0 < space.high:
        grid.append(0.0)
    for number, alpha in enumerate([*grid, *([math.nan] * bench.most)]):
        at = alpha if number < len(grid) else _next(tried, judge, space, number - len(grid))
        if at is None:
            return
        point = space.point((at,))
        if bench.spent and point.key not in bench.trials:
            return
        tried[point.alpha] = bench(point)


def _next(tried: dict[float, Trial], judge: Judge, space: Space, turn: int) -> float | None:
    """Return the next α: in a gap beside the best, or at times in the widest of all."""
    alphas = sorted(tried)
    gaps = list(pairwise(alphas))
    fine = [gap for gap in gaps if gap[1] - gap[0] > (space.high - space.low) * _FINEST * 2]
    if not fine:
        return None
    best = max(alphas, key=lambda alpha: (judge.merit(tried[alpha]), -abs(alpha)))
    beside = [gap for gap in fine if best in gap]
    explore = turn % _EXPLORE == _EXPLORE - 1 or not beside
    low, high = max(fine if explore else beside, key=lambda gap: gap[1] - gap[0])
    if explore:
        return (low + high) / 2
    part = (high - low) * _GOLDEN
    return low + part if best == low else high - part
