"""The journal: what a damaged one still says, and what a run does with what it finds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import contents, moved, random_tensors, write_checkpoint
from runs import Merge, interrupt

import uipe_merge.job
from uipe_merge.errors import OutputError
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.output.journal import Journal, ShardRecord

IDENTITY: dict[str, object] = {"version": "1", "alpha": "0x1.8p+0", "limit": None}
RECORDS = [
    ShardRecord("a b.safetensors", 10, "0" * 64, [None, [0.1, 2.0, 1e-300, 0.0, 3.0]]),
    ShardRecord("é\n.safetensors", 0, "f" * 64, []),
    ShardRecord("c.safetensors", 2**60, "1" * 64, [[float("inf")] * 5]),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(path: Path) -> Journal:
    """A whole journal: the header, three shards, and the note before publishing."""
    journal = Journal(LocalFileSystem(), path)
    journal.begin(IDENTITY, RECORDS[:1])
    for record in RECORDS[1:]:
        journal.finish_shard(record)
    journal.publishing(4711)
    return journal


def what_it_says(journal: Journal) -> tuple[object, list[ShardRecord], int | None]:
    return journal.identity(), list(journal.shards().values()), journal.published()


def prefix(lines: int) -> tuple[object, list[ShardRecord], int | None]:
    """What a journal says of which this many of the five lines are whole."""
    identity = IDENTITY if lines else None
    return identity, RECORDS[: max(lines - 1, 0)], 4711 if lines == 5 else None


def test_everything_comes_back_bit_for_bit(journal: Journal) -> None:
    assert what_it_says(journal) == prefix(5)


def test_there_is_nothing_in_a_journal_that_is_not_there(path: Path) -> None:
    assert what_it_says(Journal(LocalFileSystem(), path)) == prefix(0)


def test_torn_at_every_byte_it_says_what_its_whole_lines_say(journal: Journal, path: Path) -> None:
    whole = path.read_bytes()
    assert whole.count(b"\n") == 5
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert what_it_says(journal) == prefix(whole[:length].count(b"\n")), length


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_flipped_at_every_byte_it_says_what_stands_before(
    journal: Journal, path: Path, flip: int
) -> None:
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        # A flip of a line's end joins it to the next: both are lost.
        assert what_it_says(journal) == prefix(whole[:position].count(b"\n")), position


def test_the_zeros_that_a_power_cut_leaves_end_it(journal: Journal, path: Path) -> None:
    whole = path.read_bytes()
    third = [n for n, byte in enumerate(whole) if byte == ord("\n")][2] + 1
    path.write_bytes(whole[:third] + bytes(len(whole) - third))
    assert what_it_says(journal) == prefix(3)


def test_beginning_anew_replaces_it(journal: Journal) -> None:
    journal.begin(IDENTITY, [])
    assert what_it_says(journal) == prefix(1)


# ------------------------------------------------------------- what a run does


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path).write_inputs()


def damage_cases() -> dict[str, Callable[[bytes], bytes]]:
    def cut(keep: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
        return lambda raw: raw[: keep(raw)]

    def flip(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
        return lambda raw: raw[: at(raw)] + bytes([raw[at(raw)] ^ 4]) + raw[at(raw) + 1 :]

    def first(raw: bytes) -> int:
        return raw.index(b"\n")

    return {
        "empty": cut(lambda raw: 0),
        "torn header": cut(lambda raw: 40),
        "header without its newline": cut(first),
        "torn first shard": cut(lambda raw: first(raw) + 30),
        "last newline missing": cut(lambda raw: len(raw) - 1),
        "torn last line": cut(lambda raw: len(raw) - 20),
        "flipped header": flip(lambda raw: 50),
        "flipped newline": flip(first),
        "flipped last line": flip(lambda raw: len(raw) - 9),
        "garbage appended": lambda raw: raw + b"\xff\x00 garbage",
        "a line of another program": lambda raw: raw + b"done\n",
    }


@pytest.mark.parametrize("damage", damage_cases().values(), ids=damage_cases())
def test_hazard_torn_or_flipped_journal_ends_in_the_same_bytes(
    merge: Merge, damage: Callable[[bytes], bytes]
) -> None:
    complete = merge.undisturbed()
    interrupt(merge, shards=2)
    merge.journal.write_bytes(damage(merge.journal.read_bytes()))
    merge.run()
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


@pytest.mark.parametrize("alpha", [0.0, 2.0], ids=["copying", "arithmetic"])
def test_an_undamaged_journal_saves_the_finished_shards_and_their_sums(
    merge: Merge, alpha: float
) -> None:
    merge = Merge(merge.root, alpha)
    complete = merge.undisturbed()
    interrupt(merge, shards=2)
    recorded = merge.model.glob("model-0000[12]-*.safetensors")
    before = {path.name: path.stat().st_ino for path in recorded}
    assert len(before) == 2
    assert merge.run().resumed == 2
    assert merge.state(complete) == "complete"
    after = {name: (merge.output / name).stat().st_ino for name in before}
    assert after == before, "a finished shard was written again"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.rename(path.with_suffix(".tmp")),
    ],
    ids=["flipped byte", "one byte short", "zeros of a power cut", "missing", "directory", "moved"],
)
def test_a_recorded_shard_that_is_not_what_was_recorded_is_written_again(
    merge: Merge, damage: Callable[[Path], object]
) -> None:
    complete = merge.undisturbed()
    interrupt(merge, shards=2)
    damage(merge.model / "model-00002-of-00003.safetensors")
    assert merge.run().resumed == 1
    assert merge.state(complete) == "complete"


def touch(merge: Merge) -> None:
    shard = merge.inputs[0] / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes())


def rewrite(merge: Merge) -> None:
    tensors = {**moved(random_tensors(), seed=9), "more": torch.zeros(3)}
    for path in merge.inputs:
        for file in path.glob("model*"):
            file.unlink()
        write_checkpoint(path, tensors)


@pytest.mark.parametrize(
    ("options", "change", "fields"),
    [
        ({"alpha": 2.0}, None, ["alpha", "plan"]),
        ({"alpha": -1.0}, None, ["alpha", "plan"]),
        ({"options": {"--dtype": "float32"}}, None, ["dtype", "plan"]),
        ({}, touch, ["original", "plan"]),
        ({}, rewrite, ["original", "plan", "unlearned"]),
    ],
    ids=["alpha", "alpha -1", "dtype", "input touched", "inputs rewritten"],
)
def test_hazard_resume_with_another(
    merge: Merge,
    options: dict[str, object],
    change: Callable[[Merge], None] | None,
    fields: list[str],
) -> None:
    interrupt(merge, shards=2)
    left = contents(merge.partial)
    other = Merge(merge.root, **options)  # type: ignore[arg-type]
    if change is not None:
        change(other)
    with pytest.raises(OutputError) as refusal:
        other.run()
    assert refusal.value.exit_code == 8
    assert f"an unfinished run that differs in {', '.join(fields)};" in str(refusal.value)
    assert "add --overwrite to start anew" in str(refusal.value)
    assert contents(merge.partial) == left, "the refusal touched what it refused"
    other.run(overwrite=True)
    found = contents(other.output)
    other.clear()
    assert found == other.undisturbed()
    assert other.left_over() == []


@pytest.mark.parametrize(("name", "field"), [("__version__", "version"), ("NUMERICS", "numerics")])
def test_hazard_resume_with_another_version(
    merge: Merge, monkeypatch: pytest.MonkeyPatch, name: str, field: str
) -> None:
    complete = merge.undisturbed()
    interrupt(merge, shards=1)
    with monkeypatch.context() as patch:
        patch.setattr(uipe_merge.job, name, "0.0.0.other")
        with pytest.raises(OutputError, match=f"differs in {field};"):
            merge.run()
    merge.run()
    assert merge.state(complete) == "complete"


def test_the_journal_holds_alpha_as_the_exact_float(merge: Merge) -> None:
    other = Merge(merge.root, alpha=0.1)
    interrupt(other, shards=1)
    header = json.loads(other.journal.read_text().splitlines()[0].partition(" ")[2])
    assert float.fromhex(header["alpha"]) == 0.1
    assert header["alpha"] == (0.1).hex()
