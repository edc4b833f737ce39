"""Score files of every harness: found, read, merged, and told apart from stale ones."""

import csv
import json
import math
import os
from pathlib import Path

import pytest

from uipe_merge.errors import CorruptInputError, OutputError, UsageError
from uipe_merge.study import layouts, results
from uipe_merge.study.results import Scores

LOGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tofu_eval_logs"


def write(path: Path, content: object, *, at: float | None = None) -> Path:
    """Write text, bytes, or a value as JSON; set its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    if at is not None:
        os.utime(path, (at, at))
    return path


def table(path: Path, *rows: dict[str, object], at: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if at is not None:
        os.utime(path, (at, at))
    return path


def read(directory: Path) -> Scores:
    scores = results.read(directory)
    assert scores is not None
    return scores


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Forget Quality", "forget_quality"),
        ("Model Utility", "model_utility"),
        ("forget_Q_A_ROUGE", "forget_q_a_rouge"),
        ("Prob. Real Authors", "prob_real_authors"),
        ("wmdp_cyber/acc", "wmdp_cyber_acc"),
        ("modelUtility", "model_utility"),
        ("exact_match,strict-match", "exact_match_strict_match"),
        (" forget_quality\n", "forget_quality"),
        ("a\x1b[31mb", "a_31mb"),
        ("___", ""),
    ],
)
def test_metric_names_become_snake_case(written: str, name: str) -> None:
    assert layouts.normalised(written) == name
    assert layouts.normalised(name) == name


def test_the_summary_of_open_unlearning(tmp_path: Path) -> None:
    text = '{"forget_quality": 1.5e-08, "forget_Q_A_Prob": NaN, "model_utility": 0.6, "privleak": -Infinity, "extraction_strength": null, "flag": true, "note": "N/A"}'
    path = write(tmp_path / "evals" / "TOFU_SUMMARY.json", text, at=1000)
    scores = read(tmp_path)
    nan = scores.values.pop("forget_q_a_prob")
    assert math.isnan(nan)
    assert scores.values == {
        "forget_quality": 1.5e-08,
        "model_utility": 0.6,
        "privleak": -math.inf,
    }
    assert scores.files == [path]
    assert scores.modified == 1000
    assert scores.manifest_sha256 is None
    assert scores.warnings == []


def test_the_other_summaries(tmp_path: Path) -> None:
    write(tmp_path / "MUSE_SUMMARY.json", {"forget_verbmem_ROUGE": 0.2, "privleak": 3})
    lm_eval = {"wmdp_cyber/acc": 0.3, "wmdp_cyber/acc_stderr": 0.01, "mmlu/acc": 0.5}
    write(tmp_path / "LMEval_SUMMARY.json", lm_eval)
    assert read(tmp_path).values == {
        "forget_verbmem_rouge": 0.2,
        "privleak": 3.0,
        "wmdp_cyber_acc": 0.3,
        "mmlu_acc": 0.5,
    }


def test_the_log_of_open_unlearning_counts_where_there_is_no_summary(tmp_path: Path) -> None:
    log = {
        "forget_quality": {"agg_value": 0.0},
        "forget_truth_ratio": {"agg_value": 0.7, "value_by_index": {"0": {"score": 0.1}}},
        "privleak": {"agg_value": None},
        "broken": 3,
    }
    write(tmp_path / "TOFU_EVAL.json", log)
    assert read(tmp_path).values == {"forget_quality": 0.0, "forget_truth_ratio": 0.7}


def test_a_log_beside_its_summary_is_not_read_but_its_age_counts(tmp_path: Path) -> None:
    write(tmp_path / "TOFU_EVAL.json", "{ not read", at=100)
    path = write(tmp_path / "TOFU_SUMMARY.json", {"model_utility": 0.6}, at=500)
    scores = read(tmp_path)  # a summary made anew of an old log, as `overwrite: false` does
    assert (scores.files, scores.modified) == ([path], 100)


def test_the_results_of_lm_eval(tmp_path: Path) -> None:
    document = {
        "results": {
            "mmlu": {
                "name": "mmlu",
                "alias": "mmlu",
                "sample_len": 14042,
                "sample_count": {"acc,none": 14042},
                "acc,none": 0.25,
                "acc_stderr,none": 0.003,
            },
            "gsm8k": {
                "exact_match,strict-match": 0.5,
                "exact_match,flexible-extract": 0.6,
                "exact_match_stderr,strict-match": "N/A",
            },
            "odd": None,
        },
        "groups": {"mmlu": {"acc,none": 0.25}},
        "higher_is_better": {"mmlu": {"acc": True}},
        "n-shot": {"mmlu": 5},
    }
    write(tmp_path / "grid__uipe-1" / "results_2026-01-31T12-00-00.123456.json", document)
    assert read(tmp_path).values == {
        "gsm8k_exact_match_flexible_extract": 0.6,
        "gsm8k_exact_match_strict_match": 0.5,
        "mmlu_acc": 0.25,
    }


def test_the_older_lm_eval_and_a_name_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "results.json", {"results": {"piqa": {"acc": 0.7, "acc_stderr": 0.1}}})
    named = tmp_path / "mine_2026-01-31T12-00-00.123456.json"
    write(named, {"results": {"boolq": {"acc,none": 0.8}}})
    assert read(tmp_path).values == {"boolq_acc": 0.8, "piqa_acc": 0.7}


@pytest.mark.skipif(not LOGS.is_dir(), reason="the published logs of TOFU are not here")
@pytest.mark.parametrize(("log", "utility"), [("full", 0.622677), ("retain90", 0.613745)])
def test_the_log_of_tofu(tmp_path: Path, log: str, utility: float) -> None:
    raw = (LOGS / f"llama2-7b_{log}.json").read_bytes()
    write(tmp_path / "eval_log_aggregated.json", raw)
    values = read(tmp_path).values
    assert values["model_utility"] == pytest.approx(utility, abs=1e-6)
    assert len(values) == 10
    assert {"prob_retain", "rouge_real_authors", "truth_ratio_real_world"} <= set(values)


def test_a_log_of_tofu_without_all_splits_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "eval_log_aggregated.json", {"eval_log.json": {}})
    scores = read(tmp_path)
    assert scores.values == {}
    assert len(scores.warnings) == 1
    assert f"{path}: holds no model utility: it " in scores.warnings[0]


def test_the_table_of_tofu_stands_for_its_log(tmp_path: Path) -> None:
    write(tmp_path / "eval_log_aggregated.json", "not read")
    row = {
        "ROUGE Real Authors": 0.9,
        "Model Utility": "0.61",
        "Forget Quality": "1.8e-239",
        "Method": "GA",
        "": "0",
    }
    table(tmp_path / "aggregate_stat.csv", row)
    assert read(tmp_path).values == {
        "forget_quality": 1.8e-239,
        "model_utility": 0.61,
        "rouge_real_authors": 0.9,
    }


def test_our_own_scores(tmp_path: Path) -> None:
    own = {
        "schema": 1,
        "tool": "uipe-merge evaluate",
        "model_manifest_sha256": "ab" * 32,
        "limit": 40,
        "max_new_tokens": 200,
        "forget_quality": 0.4,
        "model_utility": None,
        "parts": {"retain": {"probability": 0.9}},
        "fluency": {"forget": 0.8},
        "questions": {"forget": {"loss": [1, 2]}},
    }
    write(tmp_path / "scores.json", own)
    scores = read(tmp_path)
    assert scores.values == {
        "fluency_forget": 0.8,
        "forget_quality": 0.4,
        "retain_probability": 0.9,
    }
    assert scores.manifest_sha256 == "ab" * 32


def test_anothers_scores_json_is_left_out_with_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.json", {"forget_quality": 0.4})
    assert read(tmp_path).warnings == [f"{path}: holds no scores; it was left out"]


def test_a_newer_schema_of_ours_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "scores.json", {"schema": 2, "tool": "uipe-merge evaluate"})
    with pytest.raises(CorruptInputError, match="has schema 2, this version reads 1"):
        results.read(tmp_path)


def test_a_table_by_variant_or_alpha(tmp_path: Path) -> None:
    path = table(
        tmp_path / "all.csv",
        {"variant": "uipe-1", "alpha": "", "family": "", "Model Utility": "0.5"},
        {"variant": "", "alpha": "2.0", "family": "", "Model Utility": "0.4"},
        {"variant": "", "alpha": "2", "family": "control", "Model Utility": "0.3"},
        {"variant": "", "alpha": "3", "family": "", "Model Utility": "0.2"},
        {"variant": "", "alpha": "3", "family": "", "Model Utility": "0.1"},
    )

    def utility(name: str, family: str, alpha: float) -> float | None:
        return results.read_file(path, name, family, alpha).values.get("model_utility")

    assert utility("uipe-1", "uipe", 1) == 0.5
    assert utility("x", "uipe", 2) == 0.4
    assert utility("x", "control", 2) == 0.3  # an α alone is never a control's
    assert utility("x", "uipe", 1) is None
    assert utility("x", "uipe", 3) == 0.1
    assert "2 rows for x" in results.read_file(path, "x", "uipe", 3).warnings[0]


def test_rows_that_do_not_say_whose_they_are_are_left_out(tmp_path: Path) -> None:
    path = table(tmp_path / "samples.csv", {"loss": 1}, {"loss": 2})
    scores = results.read_file(path, "uipe-1", "uipe", 1)
    assert scores.values == {}
    assert "holds no row that says it is this variant's" in scores.warnings[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"Entry not found",
        b"[1, 2]",
        b"3",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" + b"1," * 2_100_000 + b"1]",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_not_json_is_refused_and_named(tmp_path: Path, raw: bytes) -> None:
    path = write(tmp_path / "a" / "TOFU_SUMMARY.json", raw)
    with pytest.raises(CorruptInputError) as caught:
        results.read(tmp_path)
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b'a,b\n"1', b"a\n" + b"1" * 200_000])
def test_what_is_no_csv_is_refused_and_named(tmp_path: Path, raw: bytes) -> None:
    path = write(tmp_path / "x.csv", raw)
    with pytest.raises(CorruptInputError, match="is no CSV") as caught:
        results.read(tmp_path)
    assert caught.value.file == str(path)


def test_numbers_beyond_a_float_are_infinite(tmp_path: Path) -> None:
    write(tmp_path / "TOFU_SUMMARY.json", f'{{"a": 1{"0" * 400}, "b": -1{"0" * 400}, "c": 1e999}}')
    assert read(tmp_path).values == {"a": math.inf, "b": -math.inf, "c": math.inf}


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "TOFU_SUMMARY.json"
    with path.open("wb") as file:
        file.truncate(results.MOST_BYTES + 1)  # takes no room
    with pytest.raises(CorruptInputError, match=f"larger than the {results.MOST_BYTES} bytes"):
        results.read(tmp_path)


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "TOFU_SUMMARY.json")
    with pytest.raises(CorruptInputError, match="not a regular file"):
        results.read(tmp_path)


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "TOFU_SUMMARY.json").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="no such file"):
        results.read(tmp_path)


def test_other_files_and_links_in_a_circle_are_passed_by(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "config.json", "not JSON")
    write(tmp_path / "a" / "b" / "samples_mmlu_2026.jsonl", "not JSON")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "odd_SUMMARY.json").mkdir()
    assert results.find(tmp_path) == []
    assert results.read(tmp_path) is None
    assert results.read(tmp_path / "nowhere") is None


def test_depth_and_number_of_files_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path.joinpath(*["d"] * results.DEEPEST)
    path = write(deep / "TOFU_SUMMARY.json", {"a": 1})
    write(deep / "d" / "MUSE_SUMMARY.json", {"b": 1})
    assert results.find(tmp_path) == [path]
    monkeypatch.setattr(results, "MOST_ENTRIES", 5)
    with pytest.raises(UsageError, match="more than 5 files below it; name the directory"):
        results.find(tmp_path)


def test_of_a_metric_in_two_files_the_newest_counts_and_both_are_named(tmp_path: Path) -> None:
    old = {"model_utility": 0.5, "forget_quality": 0.1, "privleak": float("nan")}
    first = write(tmp_path / "a" / "TOFU_SUMMARY.json", old, at=100)
    new = {"model_utility": 0.6, "forget_quality": 0.1 + 1e-12, "privleak": float("nan")}
    second = write(tmp_path / "b" / "TOFU_SUMMARY.json", new, at=200)
    scores = read(tmp_path)
    assert scores.values["model_utility"] == 0.6
    # Nothing of the older file is left: its age does not count.
    assert (scores.files, scores.modified) == ([second], 200)
    assert scores.warnings == [
        f"model_utility is 0.5 in {first} and 0.6 in {second}, which is newer and counts"
    ]


def test_files_with_different_metrics_are_put_together(tmp_path: Path) -> None:
    first = write(tmp_path / "TOFU_SUMMARY.json", {"model_utility": 0.5}, at=100)
    second = write(tmp_path / "MUSE_SUMMARY.json", {"privleak": 1}, at=200)
    scores = read(tmp_path)
    assert scores.values == {"model_utility": 0.5, "privleak": 1}
    assert scores.files == [second, first]
    assert scores.modified == 100


@pytest.mark.parametrize(
    ("digest", "modified", "said"),
    [
        (None, 99.0, "older than the model"),
        (None, 100.0, None),
        ("aa", 99.0, None),  # a digest says more than times, which a copy changes
        ("bb", 200.0, "of another model"),
    ],
)
def test_stale_scores(digest: str | None, modified: float, said: str | None) -> None:
    part = Scores({"x": 1.0}, [Path("f")], modified, digest)
    found = results.staleness([part], "aa", 100.0)
    assert found is None if said is None else found is not None and said in found
