"""What a search looks for: a score, and what must be kept meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import UsageError, listed
from uipe_merge.study.constraints import KEEPING, Constraint, parse_constraint
from uipe_merge.study.layouts import normalised

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_QUALITY = "forget_quality"
_MOST_SHOWN = 4  # in a line of a terminal; the study has all


class Aim(NamedTuple):
    """What is looked for.

    Attributes:
        objective: The score.
        minimise: Less of it is better.
        constraints: What must be kept.
    """

    objective: str
    minimise: bool
    constraints: list[Constraint]

    @property
    def metrics(self) -> list[str]:
        """The scores that it is about, the objective first."""
        return list(dict.fromkeys([self.objective, *(each.metric for each in self.constraints)]))

    def require(self, names: Sequence[str], remedy: str | None = None) -> None:
        """Refuse what no score of the evaluator tells.

        Raises:
            UsageError: One of the metrics is none of ``names``.
        """
        for metric in self.metrics:
            if metric not in names:
                raise UsageError(
                    f"no score is called '{metric}', but {listed(names)}",
                    remedy=remedy and remedy.replace("{}", metric),
                )


def aim(maximise: str | None, minimise: str | None, subject_to: Sequence[str]) -> Aim:
    """Return what is looked for, where both score and constraints are the caller's to give.

    Raises:
        UsageError: Not exactly one score is looked for.
        RecipeError: A constraint cannot be understood.
    """
    if (maximise is None) == (minimise is None):
        raise UsageError("what is looked for is one score", remedy="give --maximize or --minimize")
    constraints = list(map(parse_constraint, subject_to))
    return Aim(normalised(minimise or maximise or ""), minimise is not None, constraints)


def aim_of_questions(
    maximise: str | None, minimise: str | None, subject_to: Sequence[str], *, compared: bool
) -> Aim:
    """Return what is looked for by questions: forget quality, under a constraint, by default.

    Args:
        maximise: The score to look for.
        minimise: The same, where less of it is better.
        subject_to: Constraints; ``KEEPING`` where there is none.
        compared: Whether there is a retain-only model, without which forget quality is not told.

    Raises:
        UsageError: Forget quality cannot be told, or two scores are looked for.
        RecipeError: A constraint cannot be understood.
    """
    if maximise is None and minimise is None:
        maximise = _QUALITY
    found = aim(maximise, minimise, subject_to or [KEEPING])
    if _QUALITY in found.metrics and not compared:
        raise UsageError(
            "forget quality compares with a retain-only model, and there is none",
            remedy="give --reference or --retain-logs, or look for less of another score: "
            "--minimize forget_probability, or forget_rouge",
        )
    return found


def shown(wanted: Sequence[str], found: Iterable[str]) -> list[str]:
    """Return the scores to show, those that are wanted first; the study holds all of them."""
    there = list(found)
    first = [name for name in wanted if name in there]
    return list(dict.fromkeys([*first, *there]))[: max(_MOST_SHOWN, len(first))]
