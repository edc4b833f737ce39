"""What every failing call of the durable write leaves behind, and that a rerun mends it."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from fakes_output import Call, FailingFileSystem, Manner, Result
from helpers import contents
from runs import Merge, in_memory

from uipe_merge.errors import OutputError
from uipe_merge.output.filesystem import LocalFile, LocalFileSystem

PARTIAL = ".out.uipe-partial"
MODEL = f"{PARTIAL}/model"


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path).write_inputs()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as directory:
        yield directory


def run_with_fault(merge: Merge, fake: FailingFileSystem, *, overwrite: bool = False) -> None:
    """Run; where the fault ends the run, its error must name a file and a remedy."""
    error: OutputError | None = None
    try:
        merge.run(fake, overwrite=overwrite)
    except OutputError as raised:
        error = raised
    assert (error is not None) == fake.failed, fake.calls[-1]
    assert error is None or (error.file and error.remedy), fake.calls[-1]


@pytest.mark.parametrize("manner", ["before", "after", "onwards"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_any_call_may_fail_and_the_rerun_makes_the_same_bytes(
    memory: Path,
    manner: Manner,
    overwrite: bool,
    record_property: Callable[[str, object], None],
) -> None:
    old_merge = Merge(memory, alpha=-1.0, shards=2).write_inputs()
    merge = Merge(memory, shards=2)
    complete = merge.undisturbed()
    inputs = [contents(path) for path in merge.inputs]
    old = None
    seen = set()
    for number in itertools.count(1):
        merge.clear()
        if overwrite:
            old_merge.run()
            old = contents(merge.output)
        fake = FailingFileSystem(memory, number, manner=manner)
        run_with_fault(merge, fake, overwrite=overwrite)
        if not fake.failed:
            break
        seen.add(merge.state(complete, old))
        assert merge.left_over() in ([], [PARTIAL])
        merge.mend(complete, overwrite=overwrite)
    record_property("cases", number)
    assert number > 70, "the run survived too early"
    assert seen == {"complete", "old" if overwrite else "absent"}
    assert [contents(path) for path in merge.inputs] == inputs


@pytest.mark.parametrize("call", ["write", "pwrite"])
def test_a_short_write_at_every_call_is_gone_on_with(
    memory: Path, call: str, record_property: Callable[[str, object], None]
) -> None:
    merge = Merge(memory, shards=2).write_inputs()
    complete = merge.undisturbed()
    system = getattr(os, call)
    for number in itertools.count(1):
        calls = itertools.count(1)

        def cut(
            file: int, data: memoryview, *at: int, calls: Iterator[int] = calls, fault: int = number
        ) -> Any:
            cut_short = next(calls) == fault and len(data) > 1
            return system(file, memoryview(data)[: len(data) // 2] if cut_short else data, *at)

        with patch.object(os, call, cut):
            merge.run()
        assert merge.state(complete) == "complete"
        merge.clear()
        if next(calls) <= number:
            break
    record_property("cases", number)
    assert number > 4


def test_a_failing_call_under_several_threads_ends_all_of_them(memory: Path) -> None:
    merge = Merge(memory, threads=3, shards=6).write_inputs()
    complete = merge.undisturbed()
    for number in range(1, 70):
        merge.clear()
        fake = FailingFileSystem(memory, number)
        run_with_fault(merge, fake)
        assert merge.state(complete) == "absent"
        assert not [thread for thread in threading.enumerate() if "uipe" in thread.name]
        merge.run()
        assert merge.state(complete) == "complete"


def test_a_run_that_died_right_after_publishing_still_syncs_the_name(merge: Merge) -> None:
    log = FailingFileSystem(merge.root)
    merge.run(log)
    complete = contents(merge.output)
    merge.clear()
    published = log.calls.index(Call("rename", MODEL, "out")) + 1
    run_with_fault(merge, FailingFileSystem(merge.root, published, manner="after"))
    assert merge.state(complete) == "complete"
    rerun = FailingFileSystem(merge.root)
    assert merge.run(rerun).resumed == 3
    assert list(map(str, rerun.calls)) == ["sync_directory .", f"remove {PARTIAL}/journal"]
    assert merge.state(complete) == "complete"


FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors.tmp" for number in (1, 2))


class SlowWrite(FailingFileSystem):
    """Fails a write to the first shard while another thread is in one to the second."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.entered = threading.Event()
        self.release = threading.Event()
        self.during: list[Call] = []

    def perform(
        self, name: str, path: Path, action: Callable[[], Result], target: Path | None = None
    ) -> Result:
        first = len([call for call in self.calls if call.path.endswith(path.name)]) == 2
        if name == "write" and first and path.name == FIRST:
            assert self.entered.wait(60)
            threading.Timer(0.2, self.release.set).start()
            raise OutputError("no space left on device", file=path)
        if name == "write" and first and path.name == SECOND:
            before = len(self.calls)
            self.entered.set()
            assert self.release.wait(60)
            self.during = self.calls[before:]
        return super().perform(name, path, action, target)


def test_no_file_is_closed_while_another_thread_still_writes_to_it(tmp_path: Path) -> None:
    """Its number could be another file's by the time the write reaches the system."""
    merge = Merge(tmp_path, threads=2).write_inputs()
    slow = SlowWrite(tmp_path)
    with pytest.raises(OutputError, match="no space left"):
        merge.run(slow)
    assert slow.release.is_set()
    assert "close" not in {call.name for call in slow.during}
    closed = [call.path for call in slow.calls if call.name == "close"]
    assert sorted(closed) == [f"{PARTIAL}/journal.tmp", f"{MODEL}/{FIRST}", f"{MODEL}/{SECOND}"]


class FirstBlockFails(LocalFileSystem):
    """Fails the first block of a shard when the second has been written already."""

    def create(self, path: Path) -> LocalFile:
        return (
            FirstBlockFailsFile(path) if path.name == "model.safetensors.tmp" else LocalFile(path)
        )


class FirstBlockFailsFile(LocalFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header = 0
        self.second_written = threading.Event()

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        if offset == 0:
            self.header = len(data)
        elif offset == self.header:
            assert self.second_written.wait(60)
            raise OutputError("no space left on device")
        super().write_at(data, offset)
        if offset > self.header:
            self.second_written.set()


@pytest.mark.timeout(100)
def test_a_thread_that_waits_for_an_earlier_block_does_not_wait_for_ever(tmp_path: Path) -> None:
    merge = Merge(tmp_path, threads=2, shards=1).write_inputs()
    with pytest.raises(OutputError, match="no space left"):
        merge.run(FirstBlockFails())
    assert merge.left_over() == [PARTIAL]


def test_replacing_by_three_renames_gives_the_old_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange, a kill can fall between the renames."""
    Merge(tmp_path, alpha=-1.0).write_inputs().run()
    merge = Merge(tmp_path)
    old = contents(merge.output)
    interrupt_publishing = FailingFileSystem(tmp_path, manner="before")

    def first_rename_only(one: Path, two: Path) -> None:
        two.rename(one.with_name(one.name + ".old"))
        raise OutputError("power cut")

    monkeypatch.setattr(interrupt_publishing, "exchange", first_rename_only)
    with pytest.raises(OutputError, match="power cut"):
        merge.run(interrupt_publishing, overwrite=True)
    assert not merge.output.exists()
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge.run()  # without --overwrite the old model comes back, and stays
    assert contents(merge.output) == old
    merge.run(overwrite=True)
    assert merge.left_over() == []
    assert contents(merge.output) != old
