"""Evaluations that others wrote: TOFU's logs, OpenUnlearning's, and our own scores.

TOFU's ``eval_log_aggregated.json`` has four sections, one a split; each maps a measure to
{index of the question: value}. OpenUnlearning's ``TOFU_EVAL.json`` maps a metric to
{"agg_value": …, "value_by_index": {index: {"score": …}}}. Both write 1/TR as truth ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from uipe_merge.errors import CorruptInputError
from uipe_merge.study import metrics, questions

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from uipe_merge.study.metrics import Floats

FORGET_SECTION = "eval_log_forget.json"
SECTIONS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
OPEN_UNLEARNING = ("forget_truth_ratio", "forget_Truth_Ratio")
SCORES_TOOL = "uipe-merge evaluate"
"""What ``scores.json`` calls its writer."""


@dataclass(frozen=True, slots=True)
class TofuScores:
    """What a log of TOFU says of a model.

    Attributes:
        truth_ratios: TR on the forget split, shape (n,).
        values: {split: {metric: one number a question}} of the parts of model utility.
    """

    truth_ratios: Floats
    values: dict[str, dict[str, Floats]]

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """The nine parts of model utility, by split and metric."""
        return {
            split: {metric: float(array.mean()) for metric, array in arrays.items()}
            for split, arrays in self.values.items()
        }

    @property
    def model_utility(self) -> float:
        """The harmonic mean of the parts.

        TOFU's own script takes the truth ratio of arithmetic means of probabilities in place
        of mean losses, which gives a lower one (0.586 for 0.623 on Llama-2-7B); OpenUnlearning
        takes mean losses, as here.
        """
        return metrics.model_utility(self.parts)


def from_tofu_log(log: Mapping[str, object], file: object = None) -> TofuScores:
    """Read the four sections of an aggregated log of TOFU.

    Args:
        log: The log, as parsed.
        file: Its name, for messages.

    Raises:
        CorruptInputError: A section or a measure is missing, or does not fit the others.
    """
    values = {}
    for split, name in SECTIONS.items():
        section = _Section(log, name, file)
        losses = section.numbers("avg_gt_loss")
        wrong = section.rows("average_perturb_loss")
        values[split] = {
            "probability": metrics.probabilities(losses)
            if split == "retain"
            else metrics.normalised_probabilities(losses, wrong),
            "rouge": section.numbers("rougeL_recall"),
            "truth_ratio": metrics.truth_ratio_utilities(section.truth_ratios()),
        }
    return TofuScores(_Section(log, FORGET_SECTION, file).truth_ratios(), values)


def read_truth_ratios(path: str | os.PathLike[str]) -> Floats:
    """Return the truth ratios TR of a retain-only model on the forget split, from a file.

    Args:
        path: A log of TOFU (aggregated, or of the forget split alone), OpenUnlearning's
            ``TOFU_EVAL.json``, or the ``scores.json`` of ``uipe-merge evaluate``.

    Returns:
        Shape (m,), TR and not 1/TR whatever the file holds.

    Raises:
        UsageError: There is no such file.
        CorruptInputError: It is none of these, or holds what is no truth ratio.
        OutputError: It cannot be read.
    """
    document = questions.parse(questions.read_bytes(path), path)
    if not isinstance(document, dict):
        document = {}
    if document.get("tool") == SCORES_TOOL:
        return _ratios(document.get("truth_ratios"), path)
    for name in OPEN_UNLEARNING:
        if name in document:
            return _open_unlearning(document[name], name, path)
    if FORGET_SECTION in document:
        return _Section(document, FORGET_SECTION, path).truth_ratios()
    if "avg_paraphrased_loss" in document:
        return _Section({FORGET_SECTION: document}, FORGET_SECTION, path).truth_ratios()
    raise CorruptInputError(
        "holds no truth ratios of a forget split",
        file=path,
        remedy="name a log of TOFU, a TOFU_EVAL.json, or the scores.json of a retain-only model",
    )


class _Section:
    """One section of a log of TOFU, its questions in one order."""

    def __init__(self, log: Mapping[str, object], name: str, file: object) -> None:
        """Find the section."""
        section = log.get(name)
        if not isinstance(section, dict):
            raise CorruptInputError(f"has no section '{name}'", file=file)
        self._section = section
        self._name = name
        self._file = file
        # Measures were gathered from several processes, each in an order of its own.
        self._order = list(self._by_index("avg_paraphrased_loss"))

    def numbers(self, measure: str) -> Floats:
        """Return a measure of one number a question, shape (n,)."""
        values = self._values(measure)
        if not all(_is_number(value) for value in values):
            raise self._damaged(measure)
        return np.array(values, dtype=np.float64)

    def rows(self, measure: str) -> list[Floats]:
        """Return a measure of a list of numbers a question, n rows."""
        rows = self._values(measure)
        for row in rows:
            if not isinstance(row, list) or not row or not all(map(_is_number, row)):
                raise self._damaged(measure)
        return [np.array(row, dtype=np.float64) for row in rows]

    def truth_ratios(self) -> Floats:
        """Return TR, shape (n,)."""
        return metrics.truth_ratios(
            self.numbers("avg_paraphrased_loss"), self.rows("average_perturb_loss")
        )

    def _by_index(self, measure: str) -> dict[str, object]:
        values = self._section.get(measure)
        if not isinstance(values, dict) or not values:
            raise self._damaged(measure)
        return values

    def _values(self, measure: str) -> list[object]:
        values = self._by_index(measure)
        if values.keys() != set(self._order):
            raise self._damaged(measure)
        return [values[index] for index in self._order]

    def _damaged(self, measure: str) -> CorruptInputError:
        return CorruptInputError(
            f"section '{self._name}' has no finite '{measure}' of every question", file=self._file
        )


def _open_unlearning(metric: object, name: str, path: object) -> Floats:
    values = metric.get("value_by_index") if isinstance(metric, dict) else None
    if not isinstance(values, dict):
        raise CorruptInputError(
            f"'{name}' has no 'value_by_index'",
            file=path,
            remedy="name the TOFU_EVAL.json, not the TOFU_SUMMARY.json",
        )
    scores = [value.get("score") if isinstance(value, dict) else None for value in values.values()]
    with np.errstate(divide="ignore", over="ignore"):  # 0 is a ratio too large for its inverse
        ratios: Floats = 1.0 / _ratios(scores, path)
    return ratios


def _ratios(values: object, path: object) -> Floats:
    if not isinstance(values, list) or not values:
        raise CorruptInputError("holds no truth ratios", file=path)
    for number, value in enumerate(values, 1):
        if not _is_number(value) or value < 0:
            raise CorruptInputError(f"truth ratio {number} is no finite number ≥ 0", file=path)
    return np.array(values, dtype=np.float64)


def _is_number(value: object) -> TypeGuard[float]:
    # JSON's integers have no end, a float has.
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)
