"""What an evaluation found: numbers a question, and what they come to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uipe_merge.study import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.study.metrics import Floats, KsResult

FORGET = "forget"


@dataclass(frozen=True, slots=True)
class Split:
    """One split's scores, a number a question; arrays have shape (n,).

    Attributes:
        losses: Mean loss per token of the answers, in nats.
        truth_ratios: TR, of the paraphrased answer, or of the answer where there is none.
        probabilities: exp(−loss); on real authors and world facts, normalised over the answers.
        rouge: ROUGE-L recall of what the model said.
        texts: What the model said.
        fluency: Share of different tokens in each; see ``metrics.distinct_share``.
    """

    losses: Floats
    truth_ratios: Floats
    probabilities: Floats
    rouge: Floats
    texts: tuple[str, ...]
    fluency: Floats

    def values(self) -> dict[str, Floats]:
        """The three metrics, a number a question."""
        utility = metrics.truth_ratio_utilities(self.truth_ratios)
        return dict(zip(metrics.METRICS, (self.probabilities, self.rouge, utility), strict=True))

    def means(self) -> dict[str, float]:
        """The three metrics."""
        return {metric: float(array.mean()) for metric, array in self.values().items()}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        splits: Scores a question of every split that was given; ``forget`` is one.
        forget_quality: The test against the retain-only model; None without one. Its p-value
            and statistic are NaN where the model's truth ratios are.
        model_utility: Harmonic mean of the parts that are there; None if none is.
        interval: 95 % bootstrap interval of model utility over questions; None likewise.
        template: The prompt template used, or ``chat`` for the tokenizer's own.
    """

    splits: dict[str, Split]
    forget_quality: KsResult | None
    model_utility: float | None
    interval: tuple[float, float] | None
    template: str

    @property
    def truth_ratios(self) -> Floats:
        """TR on the forget split, shape (n,)."""
        return self.splits[FORGET].truth_ratios

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """The parts of model utility, by split and metric."""
        return {name: self.splits[name].means() for name in utility_splits(self.splits)}

    @property
    def utility_parts(self) -> tuple[str, ...]:
        """What model utility is the mean of: nine names where every split was given."""
        return tuple(f"{name}/{metric}" for name in self.parts for metric in metrics.METRICS)

    @property
    def fluency(self) -> dict[str, float]:
        """The median fluency of each split's texts."""
        return {name: float(np.median(split.fluency)) for name, split in self.splits.items()}

    @property
    def gibberish(self) -> tuple[str, ...]:
        """The splits on which the median text is empty or repeats itself."""
        return tuple(name for name, value in self.fluency.items() if value < metrics.GIBBERISH)

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON; what is not finite is None."""
        test, forget = self.forget_quality, self.splits[FORGET]
        found: dict[str, object] = {
            "forget_quality": None if test is None else test.p_value,
            "ks": None if test is None else {"statistic": test.statistic, "n": test.n, "m": test.m},
            "model_utility": self.model_utility,
            "interval": None if self.interval is None else list(self.interval),
            "utility_parts": list(self.utility_parts),
            "parts": self.parts,
            "forget": {name: forget.means()[name] for name in ("probability", "rouge")},
            "fluency": self.fluency,
            "template": self.template,
            "truth_ratios": self.truth_ratios,
            "questions": {
                name: {
                    "loss": split.losses,
                    "truth_ratio": split.truth_ratios,
                    "probability": split.probabilities,
                    "rouge": split.rouge,
                    "fluency": split.fluency,
                    "text": list(split.texts),
                }
                for name, split in self.splits.items()
            },
        }
        return {name: _plain(value) for name, value in found.items()}


def utility_splits(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the splits that count for model utility, in the order of the parts."""
    present = set(names)
    return tuple(name for name in metrics.UTILITY_SPLITS if name in present)


def _plain(value: object) -> object:
    """Return the value as JSON knows it: lists for arrays, None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
