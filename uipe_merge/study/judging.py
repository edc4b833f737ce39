"""Which of a search's trials are better, and why the best one is taken."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import UsageError
from uipe_merge.study.constraints import Constraint, lack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.study.trials import Bench, Point, Trial

_REFERENCES = {"unlearned": 0.0, "original": -1.0}


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        best: The best trial that meets every constraint, or ``None``.
        reason: Why this one, or why none.
        trials: All evaluations, in their order.
    """

    best: Trial | None
    reason: str
    trials: list[Trial]


class Judge(NamedTuple):
    """Says which trials are better, by an objective and constraints with their bounds."""

    objective: str
    sign: int
    bounds: list[tuple[Constraint, float]]

    def violations(self, trial: Trial) -> list[float]:
        """Return by how much it misses each bound; NaN where that is not known."""
        missed = []
        for constraint, bound in self.bounds:
            value = trial.row.score(constraint.metric)
            if constraint.holds(value, bound):
                missed.append(0.0)
            else:
                missed.append(max(constraint.shortfall(value, bound), 1e-12) + value * 0)
        return missed

    def merit(self, trial: Trial) -> tuple[int, float]:
        """Return what a better trial has more of: meeting the constraints goes before all."""
        missed, value = self.violations(trial), trial.row.score(self.objective)
        if any(map(math.isnan, missed)):
            return 0, 0.0
        if any(missed):
            return 1, -max(missed)
        return (0, 0.0) if math.isnan(value) else (2, self.sign * value)

    def result(self, bench: Bench) -> SearchResult:
        """Choose; of equals the one with the smaller α."""
        everything = list(bench.trials.values())
        inside = [trial for trial in everything if bench.space.holds(trial.point)]
        ordered = sorted(inside, key=lambda trial: (self.merit(trial), -_size(trial.point)))
        kept = " and ".join(f"{constraint}" for constraint, _ in self.bounds)
        if everything and not inside:
            why = "every trial went to what a bound is relative to; give more of them"
            return SearchResult(None, f"nothing was found: {why}", everything)
        if not ordered or self.merit(ordered[-1])[0] < 1:
            why = _first_lack(
                everything, [self.objective, *(each.metric for each, _ in self.bounds)]
            )
            return SearchResult(None, f"nothing was found: {why}", everything)
        best = ordered[-1]
        if self.merit(best)[0] == 1:
            misses = [
                f"{constraint.metric} {best.row.score(constraint.metric):.4g} where "
                f"{constraint.operator} {bound:.4g} is asked"
                for (constraint, bound), miss in zip(
                    self.bounds, self.violations(best), strict=True
                )
                if miss
            ]
            reason = f"no model keeps {kept}; {best.point} comes nearest, with {', '.join(misses)}"
            return SearchResult(None, f"nothing was found: {reason}", everything)
        word = "highest" if self.sign > 0 else "lowest"
        meeting = sum(self.merit(trial)[0] == 2 for trial in inside)
        reason = (
            f"{best.point} has the {word} {self.objective}, {best.row.score(self.objective):.4g}, "
            f"of the {meeting} of {len(inside)} that keep {kept}"
        )
        if len(inside) == 1:
            reason += "; nothing else was tried: another α may be better"
        if bench.space.high in best.point.alphas:
            reason += "; it lies at the end of the range: a larger α may be better"
        if spoken := _gibberish(best):
            reason += f"; warning: it talks gibberish on {', '.join(spoken)}"
        return SearchResult(best, reason, everything)


def make_judge(
    bench: Bench, objective: str, constraints: Sequence[Constraint], *, minimise: bool
) -> Judge:
    """Find the number that every bound comes to, evaluating what it is relative to."""
    bounds = []
    for constraint in constraints:
        bound = constraint.factor
        if constraint.reference is not None:
            alpha = _REFERENCES.get(constraint.reference)
            if alpha is None:
                raise UsageError(
                    f"{constraint}: '{constraint.reference}' is no model that a search evaluates",
                    remedy="write its score as a number",
                )
            point = bench.space.reference(alpha)
            same = bench.space.point(point.alphas)
            row = bench(same if same.key == point.key else point).row
            bound *= row.score(constraint.metric)
            if math.isnan(bound):
                why = row.problem or lack(row, constraint.metric)
                raise UsageError(f"{constraint} cannot be told: at α = {alpha:g}, {why}")
        bounds.append((constraint, bound))
    return Judge(objective, -1 if minimise else 1, bounds)


def _gibberish(trial: Trial) -> list[str]:
    """Return the splits on which the median text is empty or repeats itself, where that is known."""
    from uipe_merge.study.metrics import GIBBERISH

    fluency = {
        name.removeprefix("fluency_"): value
        for name, value in trial.scores.items()
        if name.startswith("fluency_")
    }
    return [split for split, value in fluency.items() if value < GIBBERISH]


def _first_lack(trials: Sequence[Trial], needed: Sequence[str]) -> str:
    for trial in reversed(trials):
        if trial.problem is not None:
            return f"at {trial.point}, {trial.problem}"
        for metric in needed:
            if math.isnan(trial.row.score(metric)):
                return f"at {trial.point}, {lack(trial.row, metric)}"
    return "there was no trial"


def _size(point: Point) -> float:
    return max(map(abs, point.alphas))
