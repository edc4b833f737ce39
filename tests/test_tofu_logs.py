"""Logs that others wrote: the reference figures of the method, and three layouts."""

import contextlib
import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uipe_merge.errors import CorruptInputError, UsageError
from uipe_merge.study import metrics
from uipe_merge.study.tofu_logs import from_tofu_log, read_truth_ratios

LOGS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tofu_eval_logs"
published = pytest.mark.skipif(not LOGS.is_dir(), reason="no published logs beside the checkout")


@cache
def log(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((LOGS / f"llama2-7b_{name}.json").read_text())
    return found


@published
def test_forget_quality_of_the_published_logs() -> None:
    full, retain90 = (from_tofu_log(log(name)) for name in ("full", "retain90"))
    found = metrics.forget_quality(full.truth_ratios, retain90.truth_ratios)
    assert f"{found.p_value:.6e}" == "1.834066e-21"
    assert f"{found.statistic:.6f}" == "0.396667"
    assert (found.n, found.m) == (300, 300)


@published
@pytest.mark.parametrize(("name", "utility"), [("full", "0.622677"), ("retain90", "0.613745")])
def test_model_utility_of_the_published_logs(name: str, utility: str) -> None:
    scores = from_tofu_log(log(name))
    assert f"{scores.model_utility:.6f}" == utility
    assert [len(split) for split in scores.parts.values()] == [3, 3, 3]
    low, high = metrics.bootstrap_interval(scores.values, np.random.default_rng(0))
    assert low < scores.model_utility < high


@published
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_the_logs_hold_the_inverse_of_our_truth_ratio(name: str) -> None:
    logged = list(log(name)["eval_log_forget.json"]["truth_ratio"].values())
    # TOFU worked in float32.
    assert from_tofu_log(log(name)).truth_ratios == pytest.approx(1 / np.array(logged), rel=2e-6)


@published
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_rouge_with_stems_is_what_was_logged(name: str) -> None:
    for section in log(name).values():
        said = list(section["generated_text"].values())
        found = metrics.rouge_l_recalls(
            [text for _, text, _ in said], [true for _, _, true in said]
        )
        assert found == pytest.approx(list(section["rougeL_recall"].values()), abs=1e-12)


@published
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_normalised_probability_is_what_was_logged(name: str) -> None:
    scores = from_tofu_log(log(name))
    for split, section in (
        ("real_authors", "eval_real_author_wo_options.json"),
        ("world_facts", "eval_real_world_wo_options.json"),
    ):
        logged = np.array(list(log(name)[section]["normalized_gt_loss"].values()))
        assert scores.values[split]["probability"] == pytest.approx(np.exp(-logged), rel=1e-9)


@published
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_the_published_answers_are_fluent(name: str) -> None:
    for section in log(name).values():
        shares = [
            metrics.distinct_share(text.lower().split())
            for _, text, _ in section["generated_text"].values()
        ]
        assert np.median(shares) > 0.8
        assert min(shares) > metrics.GIBBERISH


def section(seed: int, count: int = 5) -> dict[str, Any]:
    """A section of a log; its measures have the questions in orders of their own."""
    rng = np.random.default_rng(seed)
    names = [str(number) for number in range(count)]

    def by_index(values: Any) -> dict[str, Any]:
        pairs = list(zip(names, values, strict=True))
        return dict(pairs[number] for number in rng.permutation(count))

    return {
        "avg_gt_loss": by_index(rng.uniform(0, 3, count).tolist()),
        "avg_paraphrased_loss": by_index(rng.uniform(0, 3, count).tolist()),
        "average_perturb_loss": by_index(rng.uniform(0, 3, (count, 4)).tolist()),
        "rougeL_recall": by_index(rng.uniform(0, 1, count).tolist()),
    }


def small_log() -> dict[str, Any]:
    return {
        "eval_log.json": section(1),
        "eval_real_author_wo_options.json": section(2),
        "eval_real_world_wo_options.json": section(3),
        "eval_log_forget.json": section(4),
    }


def expected(part: dict[str, Any]) -> dict[str, float]:
    """The inverse truth ratio of each question, by its definition."""
    return {
        name: math.exp(loss - sum(part["average_perturb_loss"][name]) / 4)
        for name, loss in part["avg_paraphrased_loss"].items()
    }


def test_measures_are_matched_by_question() -> None:
    whole = small_log()
    scores = from_tofu_log(whole)
    forget = expected(whole["eval_log_forget.json"])
    assert 1 / scores.truth_ratios == pytest.approx(list(forget.values()))
    retain = whole["eval_log.json"]
    ratios = expected(retain).values()
    assert scores.parts["retain"] == pytest.approx(
        {
            "probability": np.mean([math.exp(-loss) for loss in retain["avg_gt_loss"].values()]),
            "rouge": np.mean(list(retain["rougeL_recall"].values())),
            "truth_ratio": np.mean([max(0.0, 1 - ratio) for ratio in ratios]),
        }
    )
    facts = whole["eval_real_world_wo_options.json"]
    shares = []
    for name, loss in facts["avg_gt_loss"].items():
        wrong = sum(math.exp(-other) for other in facts["average_perturb_loss"][name])
        shares.append(math.exp(-loss) / (math.exp(-loss) + wrong))
    assert scores.parts["world_facts"]["probability"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda log: log.pop("eval_log.json"), id="a section less"),
        pytest.param(lambda log: log.update({"eval_log.json": []}), id="a list"),
        pytest.param(lambda log: log["eval_log.json"].pop("rougeL_recall"), id="a measure less"),
        pytest.param(lambda log: log["eval_log.json"]["avg_gt_loss"].popitem(), id="a value less"),
        pytest.param(
            lambda log: log["eval_log.json"]["avg_gt_loss"].update({"0": None}), id="null"
        ),
        pytest.param(
            lambda log: log["eval_log.json"]["avg_gt_loss"].update({"0": NotImplemented}),
            id="no number",
        ),
        pytest.param(
            lambda log: log["eval_log.json"]["avg_gt_loss"].update({"0": math.nan}), id="NaN"
        ),
        pytest.param(
            lambda log: log["eval_log.json"]["avg_gt_loss"].update({"0": 10**400}), id="10^400"
        ),
        pytest.param(
            lambda log: log["eval_log.json"]["average_perturb_loss"].update({"0": []}), id="no row"
        ),
        pytest.param(
            lambda log: log["eval_log_forget.json"]["average_perturb_loss"].update({"0": [True]}),
            id="a truth value",
        ),
        pytest.param(lambda log: log["eval_log_forget.json"].clear(), id="an empty section"),
    ],
)
def test_a_damaged_log_is_refused(damage: Any) -> None:
    whole = small_log()
    damage(whole)
    with pytest.raises(CorruptInputError, match=r"log\.json: (section|has no section)"):
        from_tofu_log(whole, "log.json")


LAYOUTS = {
    "tofu": small_log(),
    "tofu, the forget split alone": small_log()["eval_log_forget.json"],
    "open unlearning": {
        "extraction_strength": {"agg_value": 0.1},
        "forget_truth_ratio": {
            "agg_value": 0.6,
            "value_by_index": {
                name: {"score": ratio}
                for name, ratio in expected(small_log()["eval_log_forget.json"]).items()
            },
        },
    },
    "scores": {
        "schema": 1,
        "tool": "uipe-merge evaluate",
        "truth_ratios": [
            1 / ratio for ratio in expected(small_log()["eval_log_forget.json"]).values()
        ],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_truth_ratios(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(LAYOUTS[layout]))
    wanted = [1 / ratio for ratio in expected(small_log()["eval_log_forget.json"]).values()]
    assert read_truth_ratios(path) == pytest.approx(wanted)


def changed(layout: str, **parts: object) -> dict[str, object]:
    return {**copy.deepcopy(LAYOUTS[layout]), **parts}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param([], "holds no truth ratios", id="a list"),
        pytest.param({"forget_quality": 1}, "name a log of TOFU", id="something else"),
        pytest.param({"forget_truth_ratio": 0.6}, "TOFU_SUMMARY", id="a summary"),
        pytest.param(
            {"forget_truth_ratio": {"value_by_index": {"0": None}}}, "ratio 1 is no", id="null"
        ),
        pytest.param(
            {"forget_truth_ratio": {"value_by_index": {"0": {"score": -1}}}}, "≥ 0", id="negative"
        ),
        pytest.param({"forget_truth_ratio": {"value_by_index": {}}}, "holds no", id="no values"),
        pytest.param(changed("scores", truth_ratios=[1.0, None]), "ratio 2 is no", id="of NaN"),
        pytest.param(changed("scores", truth_ratios=None), "holds no truth", id="none"),
    ],
)
def test_a_file_without_truth_ratios_is_refused(content: object, text: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptInputError, match=text) as refusal:
        read_truth_ratios(path)
    assert str(refusal.value).startswith(f"{path}: ")


def test_a_score_of_zero_is_a_ratio_without_end(tmp_path: Path) -> None:
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text('{"forget_Truth_Ratio": {"value_by_index": {"7": {"score": 0.0}}}}')
    assert read_truth_ratios(path).tolist() == [math.inf]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_truth_ratios(tmp_path / "log.json")
    (tmp_path / "log.json").write_text("{")
    with pytest.raises(CorruptInputError, match="is not valid JSON"):
        read_truth_ratios(tmp_path / "log.json")


@given(
    st.recursive(
        st.none() | st.floats() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["avg_paraphrased_loss", "average_perturb_loss", "eval_log_forget.json", "0"]
                ),
                inner,
            )
        ),
    )
)
def test_no_log_is_a_bug(content: Any) -> None:
    with contextlib.suppress(CorruptInputError):
        from_tofu_log(content if isinstance(content, dict) else {"eval_log_forget.json": content})
