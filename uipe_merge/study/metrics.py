"""What TOFU measures of a model, as functions of losses and texts. No model, no files.

After Maini et al. 2024 (arXiv 2401.06121). A *loss* is the mean negative log-likelihood per
token of an answer given its question, in nats; *n* is the number of questions of a split.
Functions in the plural give one number a question, those in the singular their mean.

NaN, as a model that broke gives it, passes through to the result, with one exception: a test
of NaN would give a p-value that means nothing, so ``forget_quality`` refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Hashable

Floats = npt.NDArray[np.float64]
Parts = Mapping[str, Mapping[str, float]]
"""The parts of model utility, by split and metric."""

METRICS = ("probability", "rouge", "truth_ratio")
UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
"""The splits whose three metrics each make up the nine parts of model utility."""

LOG10_FLOOR = 1e-30
"""Where plots of log10 forget quality end: over-forgetting gives p-values down to 1e-239."""

RESAMPLES = 2000
FLUENCY_WINDOW = 64
"""Tokens of a text that count: a longer one repeats words however well it is written."""

GIBBERISH = 0.5
"""Fluency below which a model no longer speaks.

The answers of Llama-2-7B that TOFU published have a median of 0.87–0.90, and 0.57 at least.
"""


class KsResult(NamedTuple):
    """A two-sided two-sample Kolmogorov–Smirnov test.

    Attributes:
        p_value: Probability of a statistic this large, were both samples of one distribution.
        statistic: Largest distance between the two empirical distribution functions, 0 to 1.
        n: Size of the model's sample.
        m: Size of the reference's.
    """

    p_value: float
    statistic: float
    n: int
    m: int


def truth_ratios(
    paraphrased_loss: npt.ArrayLike, perturbed_losses: Iterable[npt.ArrayLike]
) -> Floats:
    """Return TRᵢ = exp(mean loss of the perturbed answers − loss of the paraphrased one).

    Above 1 where the model prefers the right answer. The logs of TOFU and of OpenUnlearning
    hold 1/TR.

    Args:
        paraphrased_loss: Losses of the right answers in other words, shape (n,).
        perturbed_losses: Losses of the wrong answers, n rows; each may have a length of its own.

    Returns:
        Shape (n,).

    Raises:
        ValueError: The two do not have the same number of questions, or a row is empty.
    """
    right = _vector(paraphrased_loss, "paraphrased losses")
    wrong = _means(perturbed_losses, len(right))
    # A model that is far gone may overflow the ratio; its rank is all that the test needs.
    with np.errstate(over="ignore", invalid="ignore"):
        ratios: Floats = np.exp(wrong - right)
    return ratios


def forget_quality(truth_ratios: npt.ArrayLike, reference_truth_ratios: npt.ArrayLike) -> KsResult:
    """Compare the truth ratios of a model on the forget split with a retain-only model's.

    The p-value is the forget quality: 1 where nothing tells the two models apart. It depends
    on the order of the ratios alone, so it is the same for 1/TR and log TR, and can only take
    few values where n and m are small.

    Args:
        truth_ratios: The model's, shape (n,).
        reference_truth_ratios: The retain-only model's, shape (m,).

    Raises:
        ValueError: A sample is empty or holds NaN.
    """
    import warnings

    from scipy.stats import ks_2samp  # type: ignore[import-untyped]

    ours = _sample(truth_ratios, "truth ratios of the model")
    theirs = _sample(reference_truth_ratios, "truth ratios of the reference")
    with warnings.catch_warnings():
        # Where the exact p-value is too small to compute, scipy says so and takes the asymptotic.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ks_2samp(ours, theirs, alternative="two-sided")
    return KsResult(float(found.pvalue), float(found.statistic), len(ours), len(theirs))


def probabilities(losses: npt.ArrayLike) -> Floats:
    """Return exp(−loss), the geometric mean probability of a token of each answer; shape (n,)."""
    with np.errstate(over="ignore"):
        found: Floats = np.exp(-_vector(losses, "losses"))
    return found


def probability(losses: npt.ArrayLike) -> float:
    """Return the mean of ``probabilities``: TOFU's probability on the forget and retain splits."""
    return float(probabilities(losses).mean())


def normalised_probabilities(
    true_losses: npt.ArrayLike, false_losses: Iterable[npt.ArrayLike]
) -> Floats:
    """Return p_true/(p_true + Σ p_false) with p = exp(−loss), of each question.

    Args:
        true_losses: Losses of the right answers, shape (n,).
        false_losses: Losses of the wrong ones, n rows; each may have a length of its own.

    Returns:
        Shape (n,), in 0 to 1.

    Raises:
        ValueError: The two do not have the same number of questions, or a row is empty.
    """
    right = _vector(true_losses, "losses of the right answers")
    shares = np.empty(len(right))
    for row, (true, false) in enumerate(_rows(right, false_losses)):
        losses = np.append(false, true)
        # Relative to the smallest: losses beyond 745 would all have probability 0.
        with np.errstate(invalid="ignore"):
            weights = np.exp(losses.min() - losses)
        shares[row] = weights[-1] / weights.sum()
    return shares


def normalised_probability(
    true_losses: npt.ArrayLike, false_losses: Iterable[npt.ArrayLike]
) -> float:
    """Return the mean of ``normalised_probabilities``: TOFU's on real authors and world facts."""
    return float(normalised_probabilities(true_losses, false_losses).mean())


def truth_ratio_utilities(truth_ratios: npt.ArrayLike) -> Floats:
    """Return max(0, 1 − 1/TR) of each question, shape (n,)."""
    with np.errstate(divide="ignore", over="ignore"):
        found: Floats = np.maximum(0.0, 1.0 - 1.0 / _vector(truth_ratios, "truth ratios"))
    return found


def truth_ratio_utility(truth_ratios: npt.ArrayLike) -> float:
    """Return the mean of ``truth_ratio_utilities``."""
    return float(truth_ratio_utilities(truth_ratios).mean())


def rouge_l_recalls(predictions: Sequence[str], references: Sequence[str]) -> Floats:
    """Return the ROUGE-L recall of each text: the share of its reference that it contains.

    Words are stemmed, as in TOFU's evaluation; the words have to come in the same order.

    Args:
        predictions: What the model said, n texts.
        references: What it should have said, n texts.

    Returns:
        Shape (n,), in 0 to 1.

    Raises:
        ValueError: There are no texts, or not as many of one as of the other.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array(
        [
            scorer.score(reference, prediction)["rougeL"].recall
            for prediction, reference in zip(predictions, references, strict=True)
        ],
        dtype=np.float64,
    )


def rouge_l_recall(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean of ``rouge_l_recalls``."""
    return float(rouge_l_recalls(predictions, references).mean())


def model_utility(parts: Parts | Iterable[float]) -> float:
    """Return the harmonic mean of the parts, which are nine in TOFU.

    One zero makes it zero; NaN makes it NaN.

    Args:
        parts: The parts, each at least 0: {split: {metric: value}}, or the values alone.

    Raises:
        ValueError: There are none, or one is negative.
    """
    if isinstance(parts, Mapping):
        values = [value for split in parts.values() for value in split.values()]
    else:
        values = list(parts)
    if not values:
        raise ValueError("model utility of no parts")
    if any(value < 0 for value in values):
        raise ValueError(f"a part of model utility is negative: {min(values)}")
    return float(_harmonic_means(np.array([values], dtype=np.float64))[0])


def bootstrap_interval(
    values: Mapping[str, Mapping[str, npt.ArrayLike]],
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of model utility.

    The questions of a split are drawn anew with replacement, each with all its metrics; the
    splits independently of one another. What is uncertain is the choice of questions: the
    interval knows nothing of the training of the model.

    Args:
        values: {split: {metric: values of shape (n,)}}; n may differ between splits.
        generator: Where the draws come from; the same seed gives the same interval.
        resamples: How many model utilities to draw.
        level: Share of them inside the interval.

    Raises:
        ValueError: There are no values, or the metrics of a split differ in length.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"no interval at level {level} from {resamples} resamples")
    columns = []
    for split, metrics in values.items():
        arrays = [_vector(array, f"values of {split}") for array in metrics.values()]
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            raise ValueError(f"the metrics of {split} differ in length: {sorted(lengths)}")
        for count in lengths:
            drawn = generator.integers(count, size=(resamples, count))
            columns += [array[drawn].mean(axis=1) for array in arrays]
    if not columns:
        raise ValueError("model utility of no parts")
    outside = (1 - level) / 2
    low, high = np.quantile(_harmonic_means(np.stack(columns, axis=1)), [outside, 1 - outside])
    return float(low), float(high)


def distinct_share(tokens: Sequence[Hashable]) -> float:
    """Return the share of different tokens among the first 64 of a text; 0 for an empty one.

    This is the measure of *fluency*: a model that broke falls silent or repeats itself. A high
    share proves nothing, random tokens have one; ROUGE on the retain split is the other half.
    """
    window = tokens[:FLUENCY_WINDOW]
    return len(set(window)) / len(window) if window else 0.0


def log10_floor(p: float, floor: float = LOG10_FLOOR) -> float:
    """Return log10 of a p-value, but not less than log10 of ``floor``, for plots."""
    return p if math.isnan(p) else math.log10(max(p, floor))


def privleak(auc: float, auc_retain: float) -> float:
    """Return MUSE's privacy leakage in per cent: the target is 0.

    Args:
        auc: Area under the curve of a membership inference attack on the model, 0 to 1.
        auc_retain: The same of a retain-only model.

    Returns:
        100·((1 − AUC) − (1 − AUC_retain))/(1 − AUC_retain): it falls as AUC rises, and its
        sign tells under-unlearning from over-unlearning (arXiv 2407.06460).

    Raises:
        ValueError: An area is not in 0 to 1, or the reference's is 1.
    """
    if not (0 <= auc <= 1 and 0 <= auc_retain < 1):
        raise ValueError(f"no privacy leakage of AUC {auc} against {auc_retain}")
    return 100 * ((1 - auc) - (1 - auc_retain)) / (1 - auc_retain)


def _harmonic_means(parts: Floats) -> Floats:
    """Return the harmonic mean of each row of (rows, parts)."""
    # 1/0 is infinite, and the mean of anything infinite comes out as the 0 that is wanted.
    with np.errstate(divide="ignore", over="ignore"):
        means: Floats = parts.shape[1] / (1.0 / parts).sum(axis=1)
    return means


def _vector(values: npt.ArrayLike, what: str) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{what}: one number a question is needed, shape {vector.shape} given")
    return vector


def _sample(values: npt.ArrayLike, what: str) -> Floats:
    sample = _vector(values, what)
    if missing := int(np.isnan(sample).sum()):
        raise ValueError(f"{what}: {missing} of {len(sample)} are NaN")
    return sample


def _rows(right: Floats, wrong: Iterable[npt.ArrayLike]) -> list[tuple[float, Floats]]:
    rows = [_vector(row, "losses of wrong answers") for row in wrong]
    if len(rows) != len(right):
        raise ValueError(f"wrong answers to {len(rows)} questions, right ones to {len(right)}")
    return list(zip(right.tolist(), rows, strict=True))


def _means(wrong: Iterable[npt.ArrayLike], count: int) -> Floats:
    return np.array([row.mean() for _, row in _rows(np.zeros(count), wrong)])
