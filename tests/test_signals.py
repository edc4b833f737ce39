"""Signals that ask a run to end, and inputs that change under it."""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from helpers import contents
from runs import Child, Merge
from typer.core import TyperCommand

from uipe_merge.cli import app
from uipe_merge.errors import CorruptInputError

SHARDS = 30


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path, shards=SHARDS).write_inputs()


def stopped_half_way(merge: Merge, ignored: tuple[signal.Signals, ...] = ()) -> Child:
    """A run that is frozen when some shards are done and some are not."""
    while True:
        child = Child(merge.command(), ignored=ignored)
        if child.stop_when(lambda: merge.lines() > 3) and merge.lines() < SHARDS:
            return child
        child.send(signal.SIGKILL)  # it was too fast for this machine: once more
        child.finish()
        merge.clear()


def resumes(merge: Merge, complete: dict[str, bytes]) -> None:
    """What is left is only a partial directory, unlocked; a rerun goes on with it."""
    assert merge.state(complete) == "absent"
    assert merge.left_over() == [merge.partial.name]
    assert sorted(path.name for path in merge.partial.iterdir()) == ["journal", "model"]
    assert merge.run().resumed >= 3
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_hazard_signal_ends_a_run_that_can_be_continued(
    tmp_path: Path, number: signal.Signals, code: int, threads: int
) -> None:
    merge = Merge(tmp_path, shards=SHARDS, threads=threads).write_inputs()
    complete = merge.undisturbed()
    child = stopped_half_way(merge)
    child.send(number, signal.SIGCONT)
    assert child.finish() == (
        code,
        f"error: stopped by {number.name}; the same command goes on where this one stopped\n",
    )
    resumes(merge, complete)


@pytest.mark.parametrize(
    "words",
    [["verify", "m"], ["evaluate", "m", "--forget", "f", "--retain", "r"], ["lm-eval", "run"]],
    ids=["verify", "evaluate", "lm-eval"],
)
def test_hazard_what_begins_anew_is_not_said_to_go_on(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: object, *words: object, **more: object) -> None:
        raise app.Interrupted(signal.SIGINT)

    monkeypatch.setattr(TyperCommand, "invoke", stopped)
    assert app._run(words) == 130
    assert capsys.readouterr().err == "error: stopped by SIGINT\n"


def test_hazard_a_signal_before_there_are_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: object) -> None:
        raise app.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(typer.main, "get_command", stopped)
    assert app._run(["verify", "m"]) == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"


def test_a_run_under_nohup_outlives_the_terminal(merge: Merge) -> None:
    complete = merge.undisturbed()
    child = stopped_half_way(merge, ignored=(signal.SIGHUP, signal.SIGINT))
    child.send(signal.SIGHUP, signal.SIGINT, signal.SIGCONT)
    assert child.finish() == (0, "")
    assert merge.state(complete) == "complete"


@pytest.mark.parametrize("threads", [1, 2])
def test_hazard_signal_while_the_arithmetic_is_loaded(tmp_path: Path, threads: int) -> None:
    merge = Merge(tmp_path, alpha=2.0, threads=threads).write_inputs()
    complete = merge.undisturbed()
    child = Child(merge.command())
    assert child.wait_for(merge.journal.exists)  # the next step imports torch
    child.send(signal.SIGINT)
    code, err = child.finish()
    assert (code, err.count("\n")) == (130, 1), err
    assert merge.state(complete) == "absent"
    merge.run()
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """A pipe that nobody empties: whoever writes to it waits for ever."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while os.write(writing, bytes(fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ))):
            pass
    except BlockingIOError:
        os.set_blocking(writing, True)
    yield writing
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_hazard_the_second_signal_ends_at_once(
    merge: Merge, full_pipe: int, second: signal.Signals
) -> None:
    complete = merge.undisturbed()
    while True:
        child = Child(merge.command(), stderr=full_pipe)
        running = child.stop_when(lambda: merge.lines() > 3)
        child.send(signal.SIGINT, signal.SIGCONT)
        # Having tidied up it hangs: the message it owes goes into a pipe that is full.
        if running and child.wait_for(lambda: not (merge.partial / "lock").exists()):
            break
        child.finish()
        merge.clear()
    child.send(second)
    assert child.finish() == (-second, "")
    resumes(merge, complete)


def keeping_time(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same change, after which the file claims not to have changed."""

    def changed(path: Path) -> None:
        status = path.stat()
        change(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return changed


def rewrite(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


CHANGES: dict[str, Callable[[Path], object]] = {
    "one byte, in place": rewrite,
    "longer, at the same time": keeping_time(lambda path: path.write_bytes(path.read_bytes() * 2)),
    "truncated, at the same time": keeping_time(lambda path: os.truncate(path, 100)),
    "emptied": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("shard", [1, SHARDS], ids=["a shard that was read", "one that was not"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hazard_input_changed_mid_run(
    merge: Merge, change: Callable[[Path], object], shard: int
) -> None:
    file = merge.inputs[1] / f"model-{shard:05d}-of-{SHARDS:05d}.safetensors"
    child = stopped_half_way(merge)
    change(file)
    child.send(signal.SIGCONT)
    code, err = child.finish()
    assert (code, err.count("\n")) == (4, 1), err
    assert f"error: {file}: changed since its header was read; run again" in err
    assert not merge.output.exists()
    assert merge.left_over() == []  # it would not be the same run any more


def test_hazard_input_removed_mid_run(merge: Merge) -> None:
    child = stopped_half_way(merge)
    (file := merge.inputs[0] / f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors").unlink()
    unlearned = merge.inputs[1] / file.name
    unlearned.unlink()
    child.send(signal.SIGCONT)
    code, err = child.finish()
    assert (code, err.count("\n")) == (4, 1), err
    assert f"{file.name}: no such file" in err
    assert not merge.output.exists()


class Truncate:
    """A watcher that cuts a file short as soon as its first tensor has been done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, total: int) -> None:
        assert total > 0

    def advance(self, written: int, shard: str) -> None:
        os.truncate(self.path, 5000)  # within the second

    def close(self) -> None:
        assert self.path.stat().st_size == 5000


def test_hazard_input_truncated_while_it_is_read_is_no_sigbus(tmp_path: Path) -> None:
    merge = Merge(tmp_path, shards=1).write_inputs(size=100)
    file = merge.inputs[1] / "model.safetensors"
    with pytest.raises(CorruptInputError, match=r"ends at byte 5000, \d+ bytes short") as caught:
        merge.run(progress=Truncate(file))
    assert caught.value.file == str(file)
    assert merge.left_over() == []
    assert not merge.output.exists()


def test_hazard_input_changed_between_runs_is_refused_naming_it(merge: Merge) -> None:
    child = stopped_half_way(merge)
    child.send(signal.SIGKILL)
    child.finish()
    (merge.partial / "lock").unlink()  # a stale one is removed by whoever comes next
    rewrite(merge.inputs[1] / f"model-00001-of-{SHARDS:05d}.safetensors")
    left = contents(merge.partial)
    for more in ([], ["--dry-run"]):
        code, err = Child(merge.command(*more)).finish()
        assert (code, err.count("\n")) == (8, 1), err
        assert f"error: {merge.partial}: holds an unfinished run that differs in plan," in err
        assert "unlearned; run the command that began it, or add --overwrite" in err
        assert contents(merge.partial) == left
    assert Child(merge.command("--overwrite")).finish() == (0, "")
    made = contents(merge.output)
    merge.clear()
    assert made == merge.undisturbed()
