"""Files from outside, made by hypothesis, and what fuzzing has found so far, by name.

``make fuzz`` drives the same targets by coverage; see ``tests/fuzz/fuzz_one.py``.
"""

import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import fuzzing
import pytest
import yaml
from fakes import MemoryFile, MemoryFolder
from helpers import (
    CONFIG,
    assert_refused,
    moved,
    random_tensors,
    run_here,
    write_checkpoint,
    write_pair,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from uipe_merge.checkpoint import pickled
from uipe_merge.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from uipe_merge.checkpoint.model import open_checkpoint
from uipe_merge.checkpoint.patterns import (
    LONGEST_KEY,
    LONGEST_NAME,
    MOST_KEYS,
    PatternError,
    compile_keys,
)
from uipe_merge.cli.console import Bar
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, UipeMergeError
from uipe_merge.output.card import encode_card
from uipe_merge.output.manifest import LARGEST_MANIFEST, read_manifest
from uipe_merge.plan import NUMERICS
from uipe_merge.recipe import Recipe
from uipe_merge.recorded import Record
from uipe_merge.report import summarise

SEEDS = fuzzing.seeds()
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, 2, -1, 10**400, 1e308])
)
words = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["../x", "/", "..", "a.b", "(.*)*", "[", "\ud800", "\x1b[2J", "original", "0"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, document: object) -> Any:
    """A document with some of its parts replaced, removed, renamed or added to."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    if isinstance(document, dict):
        found = {}
        for key, value in document.items():
            what = draw(st.integers(0, 19))
            if what:
                found[draw(words) if what == 1 else key] = draw(spoilt(value))
        return found | draw(st.dictionaries(words, values, max_size=draw(st.integers(0, 1))))
    if isinstance(document, list):
        return [draw(spoilt(value)) for value in document]
    return document


@st.composite
def other_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with a few set, put in or removed."""
    found = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        stop = draw(st.integers(start, min(start + 4, len(found))))
        found[start:stop] = draw(st.binary(max_size=4))
    return bytes(found)


def written(name: str, document: object) -> bytes:
    """A document in the format of a target."""
    if name == "recipe_yaml":
        return yaml.safe_dump(document, allow_unicode=False).encode("utf-8", "replace")
    return json.dumps(document).encode()


def document_of(name: str) -> object:
    seed = SEEDS["recipe_json" if name == "recipe_yaml" else name][0]
    return json.loads(seed)


@pytest.mark.parametrize("name", ["index", "config", "adapter", "recipe_yaml", "recipe_json", "manifest", "grid", "scores"])  # fmt: skip
@settings(unhurried, max_examples=40)
@given(st.data())
def test_documents_with_other_parts(name: str, data: st.DataObject) -> None:
    document = data.draw(spoilt(document_of(name)))
    try:
        raw = written(name, document)
    except (ValueError, yaml.YAMLError):  # YAML has no such text
        return
    fuzzing.TARGETS[name](raw)


@pytest.mark.parametrize("name", fuzzing.TARGETS)
@settings(unhurried, max_examples=25)
@given(st.data())
def test_files_with_other_bytes(name: str, data: st.DataObject) -> None:
    fuzzing.TARGETS[name](data.draw(other_bytes(data.draw(st.sampled_from(SEEDS[name])))))


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_what_fuzzing_begins_with_is_read(name: str) -> None:
    for seed in SEEDS[name]:
        fuzzing.TARGETS[name](seed)


# ------------------------------------------------------------- found by fuzzing


def open_with(**config: object) -> None:
    base = open_checkpoint(MemoryFolder({"model.safetensors": fuzzing.SINGLE}))
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    files = {CONFIG_NAME: json.dumps(said).encode(), WEIGHTS_NAME: fuzzing.FACTORS}
    open_adapter(MemoryFolder(files), base)


@pytest.mark.parametrize("key", ["(", "[", "a{2,1}", "*", r"\7", r"\1", "(?P<a>x)", "a**", "(?=a)", "x\\"])  # fmt: skip
def test_a_key_of_an_adapter_that_is_no_pattern(key: str) -> None:
    with pytest.raises(IncompatibleModelsError, match="its key"):
        open_with(rank_pattern={key: 2})


@pytest.mark.parametrize("config", [{"r": 10**400}, {"lora_alpha": 10**400}, {"lora_alpha": -(10**400)}, {"rank_pattern": {"q_proj": 10**400}}, {"alpha_pattern": {"q_proj": 10**309}}, {"lora_alpha": float("inf")}])  # fmt: skip
def test_numbers_of_an_adapter_that_no_float_holds(config: dict[str, object]) -> None:
    with pytest.raises(CorruptInputError, match="no usable number"):
        open_with(**config)


@pytest.mark.parametrize("key", ["(a+)+$", "(a|a)*b", "(a*)*b", "(.*)*c", ".*a.*a.*a.*a.*b", "((a|b)+)+c"])  # fmt: skip
def test_a_key_that_would_keep_re_busy_for_years(key: str) -> None:
    """In a process of its own, which has a second of processor time for all but its start."""
    code = (
        "import resource, sys\n"
        "from uipe_merge.checkpoint.patterns import PatternError, compile_keys\n"
        "spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (spent + 10, spent + 10))\n"
        "try:\n"
        "    pattern = compile_keys([sys.argv[1]])[sys.argv[1]]\n"
        "    assert not pattern.matches('a' * 400 + '!')\n"
        "except PatternError: pass\n"
    )
    subprocess.run([sys.executable, "-c", code, key], check=True, timeout=120)


PARTS = ["a", "b", ".", r"\.", ".*", "[ab]", "(a|b)", "(ab)?", "(a.)*", "b+", r"\w", "[^.]+", "^", "$", "(?:a|bb)*", "|", "(a|(b.)*)+"]  # fmt: skip


@settings(unhurried, max_examples=300)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=5), st.text("ab.", max_size=7))
def test_patterns_match_what_re_does(parts: list[str], name: str) -> None:
    """As PEFT has it, with the library that PEFT uses."""
    key = "".join(parts)
    try:
        pattern = compile_keys([key])[key]
    except PatternError:
        return
    assert pattern.matches(name) == (re.fullmatch(rf"(.*\.)?({key})", name) is not None)


def test_patterns_have_bounds() -> None:
    with pytest.raises(PatternError, match="too long"):
        compile_keys(["(a|b)" * LONGEST_KEY])
    with pytest.raises(PatternError, match="one pattern too many"):
        compile_keys([f"(a|b){number}" for number in range(MOST_KEYS + 1)])
    with pytest.raises(IncompatibleModelsError, match="longer than"):
        compile_keys(["(a|b)"])["(a|b)"].matches("a" * (LONGEST_NAME + 1))
    assert compile_keys(["q_proj"])["q_proj"].matches("x." * LONGEST_NAME + "q_proj")


ROW = ["a", "F32", "0", 6, 0, [2, 3], [3, 1]]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "\x1b[2J", "control characters"),
        (0, "\ud800", "control characters"),
        (1, "nt", "unknown dtype"),
        (3, -1, "outside its storage"),
        (3, 2**70, "missing or cut off"),
        (5, [2] * 65, "impossible shape"),
        (5, [2**70, 0], "impossible shape"),
        (6, [3], "transposed or strided"),
        (6, [], "transposed or strided"),
    ],
)
def test_a_row_of_a_pickle(place: int, value: object, said: str) -> None:
    row = [value if number == place else old for number, old in enumerate(ROW)]
    file, storages = MemoryFile("f", bytes(64)), {"0": pickled.Entry(0, 24)}
    assert pickled.spec_of(ROW, storages, file, "f").nbytes == 24
    with pytest.raises(UipeMergeError, match=said):
        pickled.spec_of(row, storages, file, "f")


def test_a_pickled_name_of_a_type_that_is_none(tmp_path: Path) -> None:
    """Through the whole program: the child lets it pass as a text."""
    import zipfile

    import torch

    write_checkpoint(tmp_path / "original", {"a": torch.zeros(2)})
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    changed = tmp_path / "unlearned" / "pytorch_model.bin"
    changed.parent.mkdir()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name.endswith("data.pkl"):
                said = b"ctorch\nFloatStorage\n"
                assert said in raw
                raw = raw.replace(said, pickle.dumps("evil", protocol=2)[2:-1].replace(b"q\0", b""))
            new.writestr(name, raw)
    words = ("original", "unlearned", "--alpha", 1, "-o", "out", "--allow-pickle")
    assert_refused(run_here(*words, cwd=tmp_path), 4, "unknown dtype")


def test_a_size_below_zero_in_a_manifest(tmp_path: Path) -> None:
    files = {"a": {"size": -1, "sha256": "0" * 64}}
    (tmp_path / "uipe_merge.json").write_text(json.dumps({"schema": 1, "files": files}))
    with pytest.raises(CorruptInputError, match="damaged entry for 'a'"):
        read_manifest(tmp_path)


@pytest.mark.found("a list for a size in the manifest's record of the inputs was a traceback")
@pytest.mark.parametrize("key", ["name", "size", "header_sha256"])
@pytest.mark.parametrize("value", [[], {}, None, 1.5], ids=str)
def test_a_wrong_record_of_the_inputs_in_a_manifest(key: str, value: object) -> None:
    base = open_checkpoint(MemoryFolder({"model.safetensors": fuzzing.SINGLE}))
    [shard] = base.shards
    said = {"name": shard.name, "size": shard.stamp.size, "header_sha256": shard.header_sha256}
    for changed in ({}, {key: value}):
        sides = {"shards": [said]}, {"shards": [{**said, **changed}]}
        inputs = dict(zip(("original", "unlearned"), sides, strict=True))
        record = Record({"tool": {"numerics": NUMERICS}, "inputs": inputs}, "OUT/uipe_merge.json")
        if changed:
            with pytest.raises(IncompatibleModelsError, match="not what the model was made from"):
                record.require_inputs([base, base])
        else:
            record.require_inputs([base, base])


# ------------------------------------------------------------ found by attacking


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "uipe_merge.json").open("wb") as file:
        file.truncate(LARGEST_MANIFEST + 1)
    with pytest.raises(CorruptInputError, match="bytes such a file may have"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model_type": "llama", "x": "\\ud800"}',
        b'{"model_type": "llama", "\\udfff": 1}',
        b'{"x_config":' * 200 + b"1" + b"}" * 200,
        b"[" * 100_000,
    ],
    ids=["surrogate", "surrogate as key", "nested", "nested without end"],
)
def test_a_config_that_cannot_be_written_again(tmp_path: Path, raw: bytes) -> None:
    write_pair(tmp_path)
    (tmp_path / "unlearned" / "config.json").write_bytes(raw)
    words = ("original", "unlearned", "--alpha", 1, "--dtype", "float32", "-o", "out")
    assert_refused(run_here(*words, cwd=tmp_path), 4, "unlearned/config.json")


ESCAPE = "model\x1b]0;mine\x07-00001-of-00002.safetensors"


def test_a_shard_whose_name_drives_the_terminal(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_checkpoint(tmp_path / "original", tensors)
    path = write_checkpoint(tmp_path / "unlearned", moved(tensors), shards=2)
    (path / "model-00001-of-00002.safetensors").rename(path / ESCAPE)
    index = path / "model.safetensors.index.json"
    escaped = json.dumps(ESCAPE).strip('"')
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", escaped))
    words = ("original", "unlearned", "--alpha", 1, "-o", "out")
    assert_refused(run_here(*words, cwd=tmp_path), 4, r"model\x1b]0;mine\x07", "control characters")


def test_a_progress_bar_is_driven_by_no_name() -> None:
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=200))
    bar.start(5)
    bar.advance(1, f"[red]{ESCAPE}")
    bar.close()
    assert r"[red]model\x1b]0;mine\x07-00001" in stream.getvalue()
    assert "\x1b]" not in stream.getvalue()


def test_a_card_is_one_document_whatever_the_inputs_are_called() -> None:
    name = "dir/x`\n---\nlicense: evil\n---\n<script>"
    one = open_checkpoint(
        MemoryFolder({"model.safetensors": fuzzing.SINGLE, "config.json": json.dumps(CONFIG).encode()}, name)
    )  # fmt: skip
    card = encode_card(one, one, "command", summarise([], {}, 1.0, steered=False), Recipe(1.0))
    lines = card.decode().split("\n")
    assert lines[0] == "---"
    assert [line for line in lines if line == "---"] == ["---", "---"]
    assert not [line for line in lines if line.startswith(("license", "<script"))]


def test_what_a_name_matches_is_found_in_bounded_time(tmp_path: Path) -> None:
    """A rule of many stars against names of many letters: the rules are globs, never ``re``'s."""
    tensors = {f"{'a' * 400}.{number}": each for number, each in enumerate(random_tensors().values())}  # fmt: skip
    write_checkpoint(tmp_path / "original", tensors)
    write_checkpoint(tmp_path / "unlearned", moved(tensors))
    rule = f"{'*a' * 100}*b=1"
    words = ("original", "unlearned", "--alpha", 1, "--alpha-rule", rule, "-o", "out")
    assert_refused(run_here(*words, cwd=tmp_path), 3, "matches no tensor")


def test_other_exceptions_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a target would show a bug at all."""

    def fail(*_: object) -> NoReturn:
        raise KeyError("a bug")

    monkeypatch.setattr(fuzzing, "read_index", fail)
    with pytest.raises(KeyError, match="a bug"):
        fuzzing.TARGETS["index"](SEEDS["index"][0])
