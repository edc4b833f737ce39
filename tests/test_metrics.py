"""TOFU's metrics: hand-computed cases, scipy and rouge_score as oracles, and properties."""

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
from scipy import stats  # type: ignore[import-untyped]

from uipe_merge.study import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

Sample = npt.NDArray[np.float64]
NAN = math.nan

samples = arrays.arrays(
    np.float64,
    st.integers(1, 40),
    elements=st.floats(2**-20, 2**20, allow_nan=False),
)
shares = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9)


def test_truth_ratios_by_hand() -> None:
    found = metrics.truth_ratios([1.0, 2.0], [[2.0, 4.0], [1.0]])
    assert found == pytest.approx([math.exp(3.0 - 1.0), math.exp(1.0 - 2.0)], rel=1e-15)
    assert metrics.truth_ratios([0.0], np.array([[0.0, 0.0]])).tolist() == [1.0]


def test_truth_ratios_of_a_model_that_is_far_gone() -> None:
    found = metrics.truth_ratios([1.0, NAN, math.inf], [[2000.0], [1.0], [math.inf]])
    assert found[0] == math.inf
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param([1.0, 2.0], [[1.0]], id="one row too few"),
        pytest.param([1.0], [[]], id="an empty row"),
        pytest.param([], [], id="no questions"),
        pytest.param([[1.0]], [[1.0]], id="a matrix"),
    ],
)
def test_truth_ratios_of_arrays_that_do_not_fit(right: list[float], wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"wrong answers|one number a question"):
        metrics.truth_ratios(right, wrong)


def distance(one: Sample, two: Sample) -> float:
    """The largest distance between two empirical distribution functions, by their definition."""
    return max(
        abs(float(np.mean(one <= at)) - float(np.mean(two <= at)))
        for at in np.concatenate([one, two])
    )


@given(samples, samples)
def test_the_ks_statistic_by_its_definition(one: Sample, two: Sample) -> None:
    found = metrics.forget_quality(one, two)
    assert found.statistic == pytest.approx(distance(one, two), abs=1e-12)
    assert 0 <= found.p_value <= 1
    assert (found.n, found.m) == (len(one), len(two))


@given(samples, samples)
def test_forget_quality_knows_order_alone(one: Sample, two: Sample) -> None:
    found = metrics.forget_quality(one, two)
    # Powers of two invert exactly; others could fall together.
    steps = np.unique(np.concatenate([one, two]))
    ranks = [np.exp2(np.searchsorted(steps, sample).astype(float)) for sample in (one, two)]
    rising: list[Callable[[Sample], Sample]] = [np.log2, np.sqrt, lambda x: 8 * x]
    falling: list[Callable[[Sample], Sample]] = [lambda x: 1 / x, lambda x: -x]
    for mapped in [*rising, *falling]:
        other = metrics.forget_quality(mapped(ranks[0]), mapped(ranks[1]))
        assert other.p_value == pytest.approx(found.p_value, rel=1e-9)
        assert other.statistic == pytest.approx(found.statistic, abs=1e-12)


@given(samples, samples)
def test_forget_quality_is_symmetric_and_sees_no_order_of_questions(
    one: Sample, two: Sample
) -> None:
    found = metrics.forget_quality(one, two)
    back = metrics.forget_quality(two[::-1], np.sort(one))
    assert back.p_value == pytest.approx(found.p_value, rel=1e-9)
    assert (back.n, back.m) == (found.m, found.n)
    assert metrics.forget_quality(one, one[::-1]).p_value == pytest.approx(1.0)


def test_the_values_that_forget_quality_can_take() -> None:
    # n = m = 40, shifted by k questions: the table of the method.
    found = [
        metrics.forget_quality(np.arange(40.0), np.arange(40.0) + shift).p_value
        for shift in range(4, 10)
    ]
    wanted = [0.99, 0.9188, 0.7659, 0.5786, 0.4046, 0.2657]
    assert found == pytest.approx(wanted, rel=0.01)


def test_a_p_value_too_small_for_the_exact_test_comes_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    found = metrics.forget_quality(np.arange(4000.0), np.arange(4000.0) + 5000)
    assert found.statistic == 1.0
    assert found.p_value == stats.ks_2samp(range(4000), range(5000, 9000)).pvalue
    recwarn.clear()
    metrics.forget_quality(np.arange(4000.0), np.arange(4000.0) + 3000)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("one", "two", "text"),
    [
        pytest.param([], [1.0], "truth ratios of the model", id="empty"),
        pytest.param([1.0], [], "truth ratios of the reference", id="an empty reference"),
        pytest.param([1.0, NAN], [1.0], "1 of 2 are NaN", id="NaN"),
        pytest.param([1.0], [NAN, NAN], "reference: 2 of 2", id="NaN in the reference"),
    ],
)
def test_forget_quality_refuses(one: list[float], two: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metrics.forget_quality(one, two)


def test_forget_quality_takes_ratios_that_overflowed() -> None:
    assert metrics.forget_quality([1.0, math.inf], [1.0, 2.0]).p_value == pytest.approx(1.0)


def test_probability_by_hand() -> None:
    assert metrics.probability([0.0, math.log(4)]) == pytest.approx((1 + 1 / 4) / 2)
    assert metrics.probability([math.inf]) == 0.0
    assert math.isnan(metrics.probability([1.0, NAN]))


def test_normalised_probability_by_hand() -> None:
    right, wrong = [math.log(2), math.log(4)], [[math.log(2), math.log(4)], [math.log(4)]]
    # 1/2 of 1/2 + 1/2 + 1/4, and 1/4 of 1/4 + 1/4
    assert metrics.normalised_probabilities(right, wrong) == pytest.approx([2 / 5, 1 / 2])
    assert metrics.normalised_probability(right, wrong) == pytest.approx((2 / 5 + 1 / 2) / 2)


@given(st.floats(0, 30), st.lists(st.floats(0, 30), min_size=1, max_size=6), st.floats(0, 2000))
def test_normalised_probability_is_a_share(true: float, false: list[float], more: float) -> None:
    share = metrics.normalised_probability([true], [false])
    assert share == pytest.approx(
        math.exp(-true) / (math.exp(-true) + sum(math.exp(-loss) for loss in false))
    )
    # The same distance at losses whose probabilities are all zero.
    shifted = metrics.normalised_probability([true + more], [[loss + more for loss in false]])
    assert shifted == pytest.approx(share, rel=1e-9)


def test_truth_ratio_utility_by_hand() -> None:
    # 1/TR = 1/2, 2, 1, 0, ∞
    found = metrics.truth_ratio_utilities([2.0, 0.5, 1.0, math.inf, 0.0])
    assert found.tolist() == [0.5, 0.0, 0.0, 1.0, 0.0]
    assert metrics.truth_ratio_utility([2.0, 0.5]) == 0.25
    assert math.isnan(metrics.truth_ratio_utility([2.0, NAN]))


def test_rouge_l_recall_by_hand() -> None:
    # "the cat sat" in that order, of six words
    found = metrics.rouge_l_recalls(
        ["the cat never sat", "", "Cats sitting"], ["the cat sat on the mat", "x", "cat sits"]
    )
    assert found == pytest.approx([3 / 6, 0.0, 1.0])  # the last by its stems
    assert metrics.rouge_l_recall(["a b"], ["a c"]) == 0.5


@given(st.lists(st.tuples(st.text("ab c", max_size=30), st.text("ab c", max_size=30)), min_size=1))
def test_rouge_l_recall_is_that_of_rouge_score(pairs: list[tuple[str, str]]) -> None:
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    wanted = [scorer.score(target, text)["rougeL"].recall for text, target in pairs]
    found = metrics.rouge_l_recalls([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert found.tolist() == wanted


@pytest.mark.parametrize("texts", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_rouge_l_recall_wants_a_text_a_reference(texts: tuple[list[str], list[str]]) -> None:
    with pytest.raises(ValueError, match="predictions for"):
        metrics.rouge_l_recalls(*texts)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9))
def test_model_utility_is_the_harmonic_mean(parts: list[float]) -> None:
    found = metrics.model_utility(parts)
    assert found == pytest.approx(stats.hmean(parts))
    # Between the least part and the geometric mean, and never far from the least.
    assert min(parts) * (1 - 1e-12) <= found <= float(stats.gmean(parts)) * (1 + 1e-12)
    assert found <= len(parts) * min(parts) * (1 + 1e-12)
    assert metrics.model_utility(parts[::-1]) == pytest.approx(found)


@given(shares)
def test_one_zero_makes_model_utility_zero(parts: list[float]) -> None:
    assert metrics.model_utility([*parts, 0.0]) == 0.0
    assert math.isnan(metrics.model_utility([*parts, NAN, 0.0]))


def test_model_utility_of_splits_or_of_values() -> None:
    parts = {"retain": {"probability": 0.5, "rouge": 1.0}, "world_facts": {"rouge": 0.25}}
    assert metrics.model_utility(parts) == pytest.approx(3 / (2 + 1 + 4))
    assert metrics.model_utility(iter([0.5, 1.0, 0.25])) == metrics.model_utility(parts)


@pytest.mark.parametrize("parts", [[], {}, {"retain": {}}, [0.5, -0.1]])
def test_model_utility_of_what_are_no_parts(parts: list[float]) -> None:
    with pytest.raises(ValueError, match="model utility"):
        metrics.model_utility(parts)


def values(seed: int, sizes: dict[str, int]) -> dict[str, dict[str, Sample]]:
    rng = np.random.default_rng(seed)
    return {
        split: {metric: rng.uniform(0.2, 1, count) for metric in metrics.METRICS}
        for split, count in sizes.items()
    }


def test_the_bootstrap_interval_by_a_loop() -> None:
    given_ = values(1, {"retain": 7, "world_facts": 4})
    found = metrics.bootstrap_interval(given_, np.random.default_rng(5), resamples=300)
    rng = np.random.default_rng(5)
    drawn = {
        split: rng.integers(len(v["rouge"]), size=(300, len(v["rouge"])))
        for split, v in given_.items()
    }
    utilities = [
        stats.hmean(
            [
                np.mean([array[question] for question in drawn[split][resample]])
                for split, metric in given_.items()
                for array in metric.values()
            ]
        )
        for resample in range(300)
    ]
    assert found == pytest.approx(tuple(np.percentile(utilities, [2.5, 97.5])))


def test_the_bootstrap_interval_is_seeded_holds_the_utility_and_narrows() -> None:
    widths = []
    for count in (50, 800):
        given_ = values(2, dict.fromkeys(metrics.UTILITY_SPLITS, count))
        low, high = metrics.bootstrap_interval(given_, np.random.default_rng(0))
        assert (low, high) == metrics.bootstrap_interval(given_, np.random.default_rng(0))
        means = [float(array.mean()) for split in given_.values() for array in split.values()]
        assert low < metrics.model_utility(means) < high
        widths.append(high - low)
    # Four times as narrow with sixteen times the questions.
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


def test_the_bootstrap_draws_whole_questions() -> None:
    # One metric is the other's complement: their sum has no spread if both are drawn alike.
    ones = np.array([0.0, 1.0] * 10)
    generator = np.random.default_rng(3)
    low, high = metrics.bootstrap_interval({"retain": {"a": ones + 1, "b": ones + 1}}, generator)
    alone = metrics.bootstrap_interval({"retain": {"a": ones + 1}}, np.random.default_rng(3))
    assert (low, high) == pytest.approx(alone)


def test_the_bootstrap_refuses_what_does_not_fit_and_passes_nan_on() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"differ in length: \[1, 2\]"):
        metrics.bootstrap_interval({"retain": {"a": [1.0], "b": [1.0, 2.0]}}, generator)
    with pytest.raises(ValueError, match="no parts"):
        metrics.bootstrap_interval({}, generator)
    with pytest.raises(ValueError, match="level"):
        metrics.bootstrap_interval({"retain": {"a": [1.0]}}, generator, level=1.0)
    with pytest.raises(ValueError, match="resamples"):
        metrics.bootstrap_interval({"retain": {"a": [1.0]}}, generator, resamples=0)
    assert all(map(math.isnan, metrics.bootstrap_interval({"retain": {"a": [NAN]}}, generator)))
    assert metrics.bootstrap_interval({"retain": {"a": [0.0]}}, generator) == (0.0, 0.0)


def test_fluency() -> None:
    assert metrics.distinct_share("") == 0.0
    assert metrics.distinct_share([5]) == 1.0
    assert metrics.distinct_share([1, 2, 1, 2]) == 0.5
    assert metrics.distinct_share([7] * 500) == 1 / metrics.FLUENCY_WINDOW
    # What follows a text's first tokens does not count.
    assert metrics.distinct_share([*range(metrics.FLUENCY_WINDOW), *[0] * 500]) == 1.0


@given(st.floats(0, 1), st.floats(1e-300, 1e-2))
def test_log10_floor(p: float, floor: float) -> None:
    found = metrics.log10_floor(p, floor)
    assert math.log10(floor) <= found <= 0
    assert p <= floor or 10**found == pytest.approx(p)


def test_log10_floor_of_what_has_no_logarithm() -> None:
    assert metrics.log10_floor(0.0) == -30
    assert metrics.log10_floor(1.06e-239) == -30
    assert metrics.log10_floor(1.0) == 0
    assert math.isnan(metrics.log10_floor(NAN))


def test_privleak_by_hand() -> None:
    assert metrics.privleak(0.4, 0.4) == 0.0
    assert metrics.privleak(0.7, 0.4) == pytest.approx(-50.0)  # under-unlearned: still told apart
    assert metrics.privleak(0.1, 0.4) == pytest.approx(50.0)
    for wrong in ((0.5, 1.0), (1.1, 0.5), (NAN, 0.5), (0.5, NAN)):
        with pytest.raises(ValueError, match="no privacy leakage"):
            metrics.privleak(*wrong)
