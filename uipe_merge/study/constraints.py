"""The models of a grid as rows of numbers, and what is asked of them."""

from __future__ import annotations

import math
import operator
import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import RecipeError
from uipe_merge.study.layouts import normalised

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEEPING = "model_utility>=0.95*unlearned"
"""What is asked where questions are searched on and nothing is said: no α pays with utility."""

REFERENCES = {"unlearned": 0.0, "original": -1.0, "retain": None}
"""What a bound may be relative to, and its α; the retain-only model is no step of an update."""

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_GRAMMAR = re.compile(
    r"\s*([^\W\d][\w ./,-]*?)\s*(>=|<=|>|<)\s*"
    r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(?:\*\s*([a-z]+)\s*)?"
)
_LONGEST = 200
_REMEDY = (
    "write METRIC >= NUMBER or METRIC >= NUMBER*REFERENCE (also <=, >, <), for example "
    "'model_utility>=0.95*unlearned'"
)


class Row(NamedTuple):
    """One model of a grid.

    Attributes:
        name: What it is called.
        family: ``uipe``; ``control`` (a random direction of the same norm); or ``reference``.
        alpha: Its α; ``None`` for the retain-only model.
        scores: Metric → number.
        stale: Why the scores are not those of the model as it is now.
        problem: What is wrong with the model or its scores.
        effective_alpha: The α that it came out as.
    """

    name: str
    family: str
    alpha: float | None
    scores: Mapping[str, float]
    stale: str | None = None
    problem: str | None = None
    effective_alpha: float | None = None

    @property
    def is_reference(self) -> bool:
        """Whether it is one of the models that the others are measured by.

        A step of α = 0 or −1 is the same model, but not where rules for some of the tensors
        make another of it: those have an effective α, which copies have not.
        """
        if self.family == "reference" or self.alpha is None:
            return True
        return self.alpha in {0.0, -1.0} and self.effective_alpha in {None, self.alpha}

    @property
    def trusted(self) -> bool:
        """Whether its scores are its own."""
        return self.stale is None and self.problem is None

    def score(self, metric: str) -> float:
        """Return a score, NaN where there is none or none that is finite."""
        value = self.scores.get(metric, math.nan)
        return value if math.isfinite(value) else math.nan


class Constraint(NamedTuple):
    """What a model has to keep: ``metric operator factor[*reference]``.

    Attributes:
        metric: Normalised name.
        operator: ``>=``, ``<=``, ``>`` or ``<``.
        factor: The number.
        reference: Which model's score the number multiplies, or ``None``.
    """

    metric: str
    operator: str
    factor: float
    reference: str | None = None

    def __str__(self) -> str:
        bound = f"{self.factor:.6g}"
        return f"{self.metric}{self.operator}{bound}" + (
            f"*{self.reference}" if self.reference else ""
        )

    @property
    def from_above(self) -> bool:
        """Whether less of the metric is better."""
        return self.operator.startswith("<")

    def bound(self, rows: Sequence[Row]) -> float:
        """Return the number it comes to; NaN where its reference has no score to trust."""
        if self.reference is None:
            return self.factor
        row = reference_row(rows, self.reference)
        return math.nan if row is None or not row.trusted else self.factor * row.score(self.metric)

    def holds(self, value: float, bound: float) -> bool:
        """Whether a score keeps to the bound; NaN never does."""
        return bool(_OPERATORS[self.operator](value, bound))

    def shortfall(self, value: float, bound: float) -> float:
        """Return by how much a score misses the bound, relative to it where it is not 0."""
        missing = value - bound if self.from_above else bound - value
        return max(missing, 0.0) / (abs(bound) or 1.0)


def parse_constraint(text: str) -> Constraint:
    """Return what ``model_utility>=0.95*unlearned`` means.

    Raises:
        RecipeError: It is not of that form, or the number is not finite.
    """
    match = _GRAMMAR.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise RecipeError(f"'{text[:_LONGEST]}' is not a constraint", remedy=_REMEDY)
    metric, sign, number, reference = match.groups()
    if reference is not None and reference not in REFERENCES:
        known = ", ".join(REFERENCES)
        raise RecipeError(f"'{text}': no reference '{reference}', only {known}", remedy=_REMEDY)
    if not math.isfinite(factor := float(number)):
        raise RecipeError(f"'{text}': {number} is too large a number", remedy=_REMEDY)
    return Constraint(normalised(metric), sign, factor, reference)


def reference_row(rows: Sequence[Row], reference: str) -> Row | None:
    """Return the row of ``unlearned``, ``original`` or ``retain``, if there is one."""
    alpha = REFERENCES[reference]
    found = [
        row for row in rows if row.alpha == alpha and row.is_reference and row.family != "control"
    ]
    found.sort(key=lambda row: (not row.trusted, row.family != "reference"))
    return found[0] if found else None


def lack(row: Row, metric: str) -> str:
    """Return what a row has in place of a finite score."""
    return f"{metric} is {row.scores[metric]}" if metric in row.scores else f"has no {metric}"
