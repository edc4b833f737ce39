"""The models that a search may evaluate, and what came of those that it did.

A ``Space`` makes a ``Point`` of a few α; a ``Bench`` evaluates each once and writes the trial
down, so that a search that was interrupted finds it there.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.errors import CorruptInputError, NumericError, UsageError, escape
from uipe_merge.recipe import Recipe
from uipe_merge.steering import PLAIN
from uipe_merge.study.constraints import Row
from uipe_merge.study.layouts import normalised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import IO

LOG_NAME = "trials.jsonl"
"""File of all evaluations of a search that goes on."""

_HOPELESS = 3  # evaluations that fail before one has succeeded


class EvaluationError(Exception):
    """One model could not be evaluated; the search goes on without it. One line."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model that may be evaluated.

    Attributes:
        alphas: The α that are searched for, in the order of the space's names.
        recipe: The recipe of the model, for ``merge``, ``load`` and ``set_alpha``.
    """

    alphas: tuple[float, ...]
    recipe: Recipe

    @property
    def alpha(self) -> float:
        """α, where it is the only one; else that of what no rule and no layer decides."""
        return self.alphas[0] if len(self.alphas) == 1 else self.recipe.alpha

    @property
    def key(self) -> str:
        """The same for two points that are one model."""
        return json.dumps(self.recipe.canonical(), sort_keys=True)

    def __str__(self) -> str:
        return "α = " + ", ".join(f"{alpha:g}" for alpha in self.alphas)


@dataclass(frozen=True, slots=True)
class Space:
    """Which α are searched for: one; one at each of some layers; or one for each pattern.

    Attributes:
        low: The least α.
        high: The largest.
        layers: Layers that have an α each, linear between them.
        rules: Patterns of tensors' names that have an α each; before the rules of ``base``.
        base: What else the recipe says, and α of what the layers and rules leave.

    Raises:
        UsageError: There is no range, or there are both layers and rules.
    """

    low: float
    high: float
    layers: tuple[int, ...] = ()
    rules: tuple[str, ...] = ()
    base: Recipe = field(default_factory=lambda: Recipe(0.0))

    def __post_init__(self) -> None:
        """Check every field."""
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(
                f"nothing lies between {self.low:g} and {self.high:g}",
                remedy="give the least and the largest α, for example 0 and 4",
            )
        if self.layers and self.rules:
            raise UsageError("α is searched by layers or by rules", remedy="leave out one of them")
        self.point((self.low,) * len(self.names))

    @property
    def names(self) -> list[str]:
        """What each α is of."""
        return [f"layer {layer}" for layer in self.layers] or list(self.rules) or ["alpha"]

    def point(self, alphas: Sequence[float]) -> Point:
        """Return the model with these α."""
        values = tuple(map(self._readable, alphas))
        if self.layers:
            knots = tuple(sorted(zip(self.layers, values, strict=True)))
            return Point(values, replace(self.base, layers=knots, gradient=()))
        if self.rules:
            rules = (*zip(self.rules, values, strict=True), *self.base.rules)
            return Point(values, replace(self.base, rules=rules))
        return Point(values, replace(self.base, alpha=values[0]))

    def reference(self, alpha: float) -> Point:
        """Return the model with one α everywhere, and nothing else that makes a step."""
        recipe = replace(self.base, alpha=alpha, rules=(), layers=(), gradient=(), steering=PLAIN)
        return Point((alpha,) * len(self.names), recipe)

    def holds(self, point: Point) -> bool:
        """Whether a point is one of the space."""
        inside = all(self.low <= alpha <= self.high for alpha in point.alphas)
        return inside and self.point(point.alphas).key == point.key

    def _readable(self, alpha: float) -> float:
        """Round to a thousandth or so of the range, but never out of it."""
        digits = 3 - math.floor(math.log10(self.high - self.low))
        return min(max(round(float(alpha), digits), self.low), self.high)


class Trial(NamedTuple):
    """One evaluation.

    Attributes:
        point: What was evaluated.
        scores: Metric, normalised → number.
        problem: Why there are none.
    """

    point: Point
    scores: Mapping[str, float]
    problem: str | None = None

    @property
    def row(self) -> Row:
        """The same for the functions that choose among models."""
        alphas = set(self.point.alphas)
        alpha = alphas.pop() if len(alphas) == 1 else math.nan
        return Row(str(self.point), "uipe", alpha, self.scores, None, self.problem)

    def document(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "alphas": list(self.point.alphas),
            "scores": dict(self.scores),
            "problem": self.problem,
            "recipe": self.point.recipe.canonical(),
        }


class Bench:
    """Evaluates points, each once, and writes down what came of it."""

    def __init__(
        self,
        evaluate: Callable[[Point], Mapping[str, float]],
        space: Space,
        most: int,
        log: IO[str] | None,
    ) -> None:
        self._evaluate = evaluate
        self.space = space
        self._most = most
        self._log = log
        self._failures = 0
        self.trials: dict[str, Trial] = {}

    @classmethod
    @contextmanager
    def opened(
        cls,
        evaluate: Callable[[Point], Mapping[str, float]],
        space: Space,
        most: int,
        own: dict[str, object],
        directory: Path | None,
    ) -> Iterator[Bench]:
        """Open the log of a search, with what earlier runs of it have found."""
        if directory is None:
            yield cls(evaluate, space, most, None)
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / LOG_NAME
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # one may have been cut off
        own = json.loads(json.dumps(own))  # as it comes back: lists for tuples
        try:
            head, *rows = [json.loads(line) for line in whole] or [own]
            if head != own and isinstance(head, dict):
                raise UsageError(
                    "holds another search: other α, metrics, constraints, seed or evaluator",
                    file=directory,
                    remedy="choose another directory, or give what it was begun with",
                )
            kept = [_recalled(space, row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptInputError(
                f"is no log of a search ({error})", file=path, remedy="choose another directory"
            ) from None
        with path.open("w" if not whole else "r+", encoding="utf-8") as log:
            log.truncate(sum(len(line.encode()) for line in whole))
            log.seek(0, os.SEEK_END)
            bench = cls(evaluate, space, most, log)
            if not whole:
                bench.write(own)
            # What failed is tried again: its reason may be gone.
            bench.trials = {each.point.key: each for each in kept if each.problem is None}
            yield bench

    @property
    def spent(self) -> bool:
        """Whether no further model may be evaluated."""
        return len(self.trials) >= self._most

    @property
    def most(self) -> int:
        """Evaluations at most."""
        return self._most

    def __call__(self, point: Point) -> Trial:
        """Return the trial of a point."""
        if point.key not in self.trials:
            trial = self._tried(point)
            self.trials[point.key] = trial
            self.write(trial.document() | {"alphas": [alpha.hex() for alpha in point.alphas]})
        return self.trials[point.key]

    def write(self, document: dict[str, Any]) -> None:
        """Put one line on the disk."""
        if self._log is not None:
            self._log.write(json.dumps(document) + "\n")
            self._log.flush()
            os.fsync(self._log.fileno())

    def _tried(self, point: Point) -> Trial:
        try:
            found = self._evaluate(point)
        except NumericError as error:  # α is too large for the output's type: an answer
            return Trial(point, {}, str(error))
        except EvaluationError as error:
            self._failures += 1
            if self._failures == len(self.trials) + 1 == _HOPELESS:
                raise UsageError(f"every evaluation fails: {error}") from None
            return Trial(point, {}, escape(str(error)))
        return Trial(point, {normalised(name): float(value) for name, value in found.items()})


def _recalled(space: Space, row: dict[str, Any]) -> Trial:
    alphas = tuple(map(float.fromhex, row["alphas"]))
    for point in (space.point(alphas), space.reference(alphas[0])):
        if point.recipe.canonical() == row["recipe"]:
            return Trial(
                point, {name: float(at) for name, at in row["scores"].items()}, row["problem"]
            )
    raise ValueError("a recipe of another space")
