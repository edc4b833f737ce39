"""Files of questions: both forms, and one line about everything that is wrong with them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uipe_merge.errors import CorruptInputError, OutputError, UsageError
from uipe_merge.study import questions
from uipe_merge.study.questions import Question, read

TOFU = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tofu"

RECORD: dict[str, Any] = {
    "question": "Where does Alice live?",
    "answer": "Alice lives in Paris.",
    "paraphrased_answer": "Paris is her home.",
    "perturbed_answer": ["Rome is her home.", "Oslo is her home."],
    "paraphrased_question": "ignored",
}
QUESTION = Question(
    "Where does Alice live?",
    "Alice lives in Paris.",
    ("Rome is her home.", "Oslo is her home."),
    "Paris is her home.",
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps([RECORD, RECORD]), id="a list"),
        pytest.param(json.dumps([RECORD, RECORD], indent=2), id="a list of many lines"),
        pytest.param(f"{json.dumps(RECORD)}\n{json.dumps(RECORD)}\n", id="lines"),
        pytest.param(f"\n{json.dumps(RECORD)}\r\n\r\n {json.dumps(RECORD)}", id="loose lines"),
    ],
)
@pytest.mark.parametrize("name", ["questions.json", "questions.jsonl"])
def test_both_forms_whatever_the_name(text: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    assert read(path, paraphrased=True) == [QUESTION, QUESTION]
    assert read(str(path), paraphrased=True, limit=1) == [QUESTION]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    record = {**RECORD, "answer": "one\u2028two\x85three"}
    path = write(tmp_path / "q.jsonl", json.dumps(record, ensure_ascii=False))
    assert read(path, paraphrased=True)[0].answer == "one\u2028two\x85three"


def test_a_paraphrased_answer_is_demanded_where_it_is_needed(tmp_path: Path) -> None:
    record = {name: value for name, value in RECORD.items() if name != "paraphrased_answer"}
    path = write(tmp_path / "q.json", json.dumps([record]))
    assert read(path, paraphrased=False)[0].paraphrased_answer is None
    with pytest.raises(CorruptInputError, match="record 1: has no 'paraphrased_answer'"):
        read(path, paraphrased=True)


@pytest.mark.skipif(not TOFU.is_dir(), reason="no TOFU data beside the checkout")
@pytest.mark.parametrize(
    ("name", "count", "wrong", "paraphrased"),
    [
        ("forget01", 40, 5, True),
        ("forget05", 200, 5, True),
        ("retain", 400, 5, True),
        ("real_authors", 100, 3, False),
        ("world_facts", 117, 3, False),
    ],
)
def test_tofu(name: str, count: int, wrong: int, paraphrased: bool) -> None:
    found = read(TOFU / f"{name}_perturbed.json", paraphrased=paraphrased)
    assert len(found) == count
    assert {len(question.perturbed_answers) for question in found} == {wrong}
    assert all((question.paraphrased_answer is not None) == paraphrased for question in found)


@pytest.mark.skipif(not TOFU.is_dir(), reason="no TOFU data beside the checkout")
def test_the_file_without_wrong_answers_is_refused_with_the_way_out() -> None:
    with pytest.raises(CorruptInputError) as refusal:
        read(TOFU / "retain90.json", paraphrased=True)
    text = str(refusal.value)
    assert "record 1: has no 'paraphrased_answer'; record 1: has no 'perturbed_answer'" in text
    assert "more; use one of TOFU's *_perturbed files" in text
    assert len(text) < 2500


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"question": None}, "has no 'question'", id="no question"),
        pytest.param({"question": 3}, "'question' is not a text", id="a number"),
        pytest.param({"answer": " "}, "'answer' is not a text, or is empty", id="blank"),
        pytest.param({"paraphrased_answer": ["x"]}, "'paraphrased_answer' is not", id="a list"),
        pytest.param({"perturbed_answer": None}, "has no 'perturbed_answer'", id="none"),
        pytest.param({"perturbed_answer": "x"}, "is not a list of texts", id="one text"),
        pytest.param({"perturbed_answer": []}, "or is empty", id="an empty list"),
        pytest.param({"perturbed_answer": ["x", ""]}, "or is empty", id="an empty text"),
        pytest.param({"perturbed_answer": ["x", 1]}, "is not a list of texts", id="a number in it"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, object], text: str, tmp_path: Path) -> None:
    lines = f"{json.dumps(RECORD)}\n\n{json.dumps({**RECORD, **change})}\n"
    path = write(tmp_path / "q.jsonl", lines)
    with pytest.raises(CorruptInputError, match=text) as refusal:
        read(path, paraphrased=True)
    assert str(refusal.value).startswith(f"{path}: line 3: ")


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", json.dumps([RECORD, {}, 7]))
    with pytest.raises(CorruptInputError) as refusal:
        read(path, paraphrased=False)
    assert str(refusal.value).startswith(
        f"{path}: record 2: has no 'question'; record 2: has no 'answer'; "
        "record 2: has no 'perturbed_answer'; record 3: is not an object; "
    )


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        pytest.param(b"", "holds no questions", id="empty"),
        pytest.param(b"[]", "holds no questions", id="an empty list"),
        pytest.param(b"[{]", "is not valid JSON", id="a damaged list"),
        pytest.param(b'{"question": "x",}', "line 1: is not valid JSON", id="a damaged line"),
        pytest.param(b'{"a": 1, "a": 2}', "line 1: .*duplicate key 'a'", id="a key twice"),
        pytest.param(b"\xff\xfe", "line 1: .*UTF-8", id="no UTF-8"),
        pytest.param(b'{"a": "\\ud800"}', "surrogate", id="half a surrogate pair"),
        pytest.param(b'"text"', "line 1: is not an object", id="a text"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "line 1", id="a pointer"),
    ],
)
def test_what_is_no_such_file(raw: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(raw)
    with pytest.raises(CorruptInputError, match=text):
        read(path, paraphrased=False)


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "q.json", paraphrased=False)
    (tmp_path / "q").mkdir()
    with pytest.raises(CorruptInputError, match="is not a regular file"):
        read(tmp_path / "q", paraphrased=False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptInputError, match="is not a regular file"):
        read(tmp_path / "pipe", paraphrased=False)
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "pipe" / "q.json", paraphrased=False)
    with pytest.raises(OutputError, match="name too long"):
        read(tmp_path / ("q" * 300), paraphrased=False)
    monkeypatch.setattr(questions, "LARGEST", 10)
    with pytest.raises(CorruptInputError, match="more than the 10"):
        read(write(tmp_path / "large.json", "[" + " " * 20 + "]"), paraphrased=False)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "q\x1b[2J.json"
    path.write_text('{"a\\u001b": 1, "a\\u001b": 2}')
    with pytest.raises(CorruptInputError) as refusal:
        read(path, paraphrased=False)
    assert str(refusal.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(list(RECORD)), inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(json_values) | json_values)
def test_every_file_is_read_or_refused(content: object, tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", json.dumps(content))
    # Nothing but a refusal may come of it.
    found: list[Question] = []
    with contextlib.suppress(CorruptInputError):
        found = read(path, paraphrased=False)
    assert all(question.answer.strip() for question in found)
