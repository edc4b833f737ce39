"""Which α to take: the best of an objective among those that keep what must be kept.

Never the objective alone. Forget quality is not monotone in α, and a model that talks
gibberish can score high: without a constraint on another metric nothing is chosen.
Pure functions on rows of numbers.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.study.constraints import (
    REFERENCES,
    Constraint,
    Row,
    lack,
    parse_constraint,
    reference_row,
)
from uipe_merge.study.layouts import normalised

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Choice", "Constraint", "Row", "choose", "pareto_front", "parse_constraint"]


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        row: The model, or ``None``.
        reason: Why this one, or why none; with what to be careful of.
        rejected: Name of every model that was out of the question, and why.
    """

    row: Row | None
    reason: str
    rejected: list[tuple[str, str]]


def pareto_front(
    rows: Sequence[Row],
    maximise: str,
    over: str,
    *,
    minimise: bool = False,
    over_from_above: bool = False,
) -> list[Row]:
    """Return the models that no other one beats in one metric without losing in the other.

    Models that could not be chosen are not looked at. Equals stay together.

    Args:
        rows: The grid.
        maximise: The objective.
        over: What it is traded for.
        minimise: The objective is better where it is smaller.
        over_from_above: The other metric is.
    """
    first, second = normalised(maximise), normalised(over)
    signs = (-1 if minimise else 1), (-1 if over_from_above else 1)
    points = [
        (signs[0] * row.score(first), signs[1] * row.score(second), row)
        for row in rows
        if _excluded(row) is None
    ]
    held = [point for point in points if not (math.isnan(point[0]) or math.isnan(point[1]))]
    # From the best objective down, only a new best of the other metric is not dominated.
    held.sort(key=lambda point: (-point[0], -point[1]))
    front: list[Row] = []
    best = (math.nan, -math.inf)
    for x, y, row in held:
        if y > best[1] or (x, y) == best:
            front.append(row)
            best = (x, y)
    order = {id(row): place for place, row in enumerate(rows)}
    return sorted(front, key=lambda row: order[id(row)])


def choose(
    rows: Sequence[Row], maximise: str, constraints: Sequence[Constraint], *, minimise: bool = False
) -> Choice:
    """Choose the model with the best objective among those that meet every constraint.

    Args:
        rows: The grid, in any order.
        maximise: The objective, for example ``forget_quality``.
        constraints: What the model has to keep; one at least on another metric.
        minimise: The objective is better where it is smaller.
    """
    objective = normalised(maximise)
    rejected = [(row.name, why) for row in rows if (why := _excluded(row)) is not None]
    if all(constraint.metric == objective for constraint in constraints):
        reason = (
            f"nothing is chosen on {objective} alone: a model that talks gibberish can score "
            "high; give a constraint on what must be kept, as model_utility>=0.95*unlearned"
        )
        return Choice(None, reason, rejected)
    bounds = [constraint.bound(rows) for constraint in constraints]
    for constraint, bound in zip(constraints, bounds, strict=True):
        if math.isnan(bound):
            return Choice(None, _no_bound(rows, constraint), rejected)
    needed = [objective, *(constraint.metric for constraint in constraints)]
    candidates, feasible = [], []
    for row in rows:
        if _excluded(row) is not None:
            continue
        if lacking := [metric for metric in needed if math.isnan(row.score(metric))]:
            rejected.append((row.name, lack(row, lacking[0])))
            continue
        candidates.append(row)
        broken = [
            f"{constraint.metric} is {row.score(constraint.metric):.4g}, not "
            f"{constraint.operator} {bound:.4g}"
            for constraint, bound in zip(constraints, bounds, strict=True)
            if not constraint.holds(row.score(constraint.metric), bound)
        ]
        if broken:
            rejected.append((row.name, "; ".join(broken)))
        else:
            feasible.append(row)
    if not candidates:
        return Choice(None, _no_candidate(rows, needed), rejected)
    if not feasible:
        return Choice(None, _nearest(candidates, constraints, bounds), rejected)
    sign = 1 if minimise else -1
    feasible.sort(key=lambda row: (sign * row.score(objective), abs(row.alpha or 0), row.name))
    chosen = feasible[0]
    kept = " and ".join(
        f"{constraint}" + (f" ({bound:.4g})" if constraint.reference else "")
        for constraint, bound in zip(constraints, bounds, strict=True)
    )
    word = "lowest" if minimise else "highest"
    among = f"of the {len(feasible)} that meet" if len(feasible) > 1 else "as the only one to meet"
    sentences = [
        f"{chosen.name} has the {word} {objective}, {chosen.score(objective):.4g}, {among} {kept}",
        *_remarks(rows, feasible, candidates, objective, sign),
    ]
    return Choice(chosen, "; ".join(sentences), rejected)


def _excluded(row: Row) -> str | None:
    if row.problem is not None:
        return row.problem
    if row.stale is not None:
        return f"stale: {row.stale}"
    if row.is_reference:
        return "a reference, to compare with"
    if row.family == "control":
        return "a control, to compare with"
    return None


def _no_bound(rows: Sequence[Row], constraint: Constraint) -> str:
    reference = str(constraint.reference)
    alpha = REFERENCES[reference]
    row = reference_row(rows, reference)
    do = "evaluate it"
    if row is None:
        where = "the retain-only model" if alpha is None else f"α = {alpha:g}"
        what = f"{where} is not in the grid"
        do = f"put its scores into scores/{reference}" if alpha is None else "add --with-references"
    elif not row.trusted:
        what = f"{row.name} is no reference ({row.problem or f'stale: {row.stale}'})"
    else:
        what = f"{row.name} is no reference ({lack(row, constraint.metric)})"
    return f"nothing is chosen: {constraint} cannot be told, as {what}; {do}, or give a number as the bound"


def _no_candidate(rows: Sequence[Row], needed: Sequence[str]) -> str:
    open_ = [row for row in rows if _excluded(row) is None]
    if not open_:
        return "nothing is chosen: no variant is there to choose from, with scores of its own"
    known = sorted({metric for row in open_ for metric in row.scores})
    for metric in needed:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, 3) or known[:8]
            there = f"; there is {', '.join(near)}" if near else ""
            return f"nothing is chosen: no variant has a {metric}{there}"
        if all(math.isnan(row.score(metric)) for row in open_):
            return f"nothing is chosen: {metric} is not finite for any variant"
    return f"nothing is chosen: no variant has all of {', '.join(dict.fromkeys(needed))}"


def _nearest(
    candidates: Sequence[Row], constraints: Sequence[Constraint], bounds: Sequence[float]
) -> str:
    pairs = list(zip(constraints, bounds, strict=True))

    def worst(row: Row) -> float:
        return max(
            constraint.shortfall(row.score(constraint.metric), bound) for constraint, bound in pairs
        )

    row = min(candidates, key=lambda row: (worst(row), abs(row.alpha or 0), row.name))
    misses = [
        f"{constraint.metric} {row.score(constraint.metric):.4g} where {constraint.operator} "
        f"{bound:.4g} is asked ({constraint.shortfall(row.score(constraint.metric), bound):.1%} off)"
        for constraint, bound in pairs
        if not constraint.holds(row.score(constraint.metric), bound)
    ]
    met = " and ".join(map(str, constraints))
    return f"nothing is chosen: no variant meets {met}; {row.name} comes nearest, with {' and '.join(misses)}"


def _remarks(
    rows: Sequence[Row],
    feasible: Sequence[Row],
    candidates: Sequence[Row],
    objective: str,
    sign: int,
) -> list[str]:
    """Return what to be careful of in the choice of the first of ``feasible``."""
    chosen, best = feasible[0], feasible[0].score(objective)
    size = abs(chosen.alpha or 0)
    said = []
    if equals := [row.name for row in feasible[1:] if row.score(objective) == best]:
        said.append(f"{', '.join(equals)} scores the same, and the smaller |α| was taken")
    twins = [
        row.name
        for row in candidates
        if row is not chosen and (row.family, row.alpha) == (chosen.family, chosen.alpha)
    ]
    if twins:
        said.append(f"{', '.join(twins)} has the same α")
    alphas = {row.alpha for row in candidates}
    sizes = [abs(row.alpha or 0) for row in rows if row.family == chosen.family]
    if len(alphas) == 1:
        said.append("only one α was scored: whether another is better is not known")
    elif size == max(sizes):
        said.append("its α is the largest of the grid: a larger one may be better")
    unlearned = reference_row(rows, "unlearned")
    if (
        unlearned is not None
        and unlearned.trusted
        and sign * unlearned.score(objective) <= sign * best
    ):
        said.append(
            f"warning: the unlearned model itself ({unlearned.name}) reaches "
            f"{unlearned.score(objective):.4g}"
        )
    for row in rows:
        if row.family != "control" or not row.trusted or row.alpha is None:
            continue
        if sign * row.score(objective) <= sign * best:
            # A grid may have its control at the largest α alone. A larger random step that
            # forgets as much says less, as enough damage looks like forgetting, but not nothing.
            norm = (
                "no larger norm" if abs(row.alpha) <= size else f"a larger norm (α = {row.alpha:g})"
            )
            said.append(
                f"warning: the control {row.name}, a random direction of {norm}, reaches "
                f"{row.score(objective):.4g} as well: this may be damage and not forgetting"
            )
    return said
