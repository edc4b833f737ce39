"""The durable write: the order of its calls, and what every failing call leaves behind."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from fakes_output import Call, FailingFileSystem, Manner, Result
from helpers import contents
from runs import Merge, in_memory, interrupt

from uipe_merge.errors import OutputError

PARTIAL = ".out.uipe-partial"
MODEL = f"{PARTIAL}/model"


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path).write_inputs()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as directory:
        yield directory


def document(path: str, *, pieces: int = 1) -> list[str]:
    return [f"create {path}", *[f"write {path}"] * pieces, f"sync {path}", f"close {path}"]


def shard(name: str) -> list[str]:
    """Header and two tensors; the size is checked; then the bytes, and only then the name."""
    path = f"{MODEL}/{name}"
    return [
        f"create {path}.tmp",
        *[f"write {path}.tmp"] * 3,
        f"size {path}.tmp",
        f"sync {path}.tmp",
        f"close {path}.tmp",
        f"rename {path}.tmp {path}",
        f"sync_directory {MODEL}",
        f"append {PARTIAL}/journal",
    ]


BEGIN = [
    f"make_directory {MODEL}",
    "sync_directory .",
    *document(f"{PARTIAL}/journal.tmp"),
    f"rename {PARTIAL}/journal.tmp {PARTIAL}/journal",
    f"sync_directory {PARTIAL}",
]
REST = [
    *document(f"{MODEL}/README.unlearned.md"),
    f"make_directory {MODEL}/code",
    f"make_directory {MODEL}/code/deep",
    *document(f"{MODEL}/code/deep/notes.txt"),
    f"make_directory {MODEL}/code",
    *document(f"{MODEL}/code/modeling_own.py"),
    *document(f"{MODEL}/config.json"),
    *document(f"{MODEL}/tokenizer.json"),
    *document(f"{MODEL}/README.md"),
    *document(f"{MODEL}/model.safetensors.index.json"),
    *document(f"{MODEL}/uipe_merge.json"),
    f"sync_directory {MODEL}/code",
    f"sync_directory {MODEL}/code/deep",
    f"sync_directory {MODEL}",
    f"append {PARTIAL}/journal",
]
NAMES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_shards_come_first_the_manifest_last_and_the_name_when_all_is_on_the_disk(
    merge: Merge,
) -> None:
    fake = FailingFileSystem(merge.root)
    merge.run(fake)
    assert list(map(str, fake.calls)) == [
        *BEGIN,
        *(call for name in NAMES for call in shard(name)),
        *REST,
        f"rename {MODEL} out",
        "sync_directory .",
        f"remove {PARTIAL}/journal",
    ]


def test_overwriting_exchanges_and_removes_the_old_model_after_the_new_name_is_durable(
    merge: Merge,
) -> None:
    merge.run()
    fake = FailingFileSystem(merge.root)
    merge.run(fake, overwrite=True)
    assert list(map(str, fake.calls))[-4:] == [
        f"exchange {MODEL} out",
        "sync_directory .",
        f"remove_tree {MODEL}",
        f"remove {PARTIAL}/journal",
    ]


def test_a_resumed_run_writes_only_the_shards_that_are_missing(merge: Merge) -> None:
    interrupt(merge, shards=2)
    fake = FailingFileSystem(merge.root)
    report = merge.run(fake)
    assert report.resumed == 2
    created = {call.path for call in fake.calls if call.name == "create"}
    assert {f"{MODEL}/{name}.tmp" for name in NAMES} & created == {f"{MODEL}/{NAMES[2]}.tmp"}


class Unsynced:
    """Follows a log and keeps what a power cut would lose: bytes of files, names in folders."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.folders: set[str] = set()

    def follow(self, call: Call) -> None:
        folder = str(Path(call.path).parent)
        match call.name:
            case "create":
                self.files.add(call.path)
                self.folders.add(folder)
            case "write":
                self.files.add(call.path)
            case "sync":
                self.files.discard(call.path)
            case "make_directory" | "remove" | "remove_tree":
                self.folders.add(folder)
            case "rename" | "exchange":
                self.folders |= {folder, str(Path(call.target).parent)}
            case "sync_directory":
                self.folders.discard(call.path)

    def below(self, top: str) -> list[str]:
        return sorted(path for path in self.files | self.folders if path.startswith(top))


def check_durability(calls: Iterable[Call]) -> list[str]:
    """Follow a whole run; return the calls that promise something, all of them checked."""
    unsynced = Unsynced()
    promises = []
    for call in calls:
        if call.name in ("append", "exchange") or str(call).startswith(f"rename {MODEL} "):
            # A journal line, or the name of the output, stands for what is on the disk.
            assert not unsynced.below(MODEL), (call, unsynced.below(MODEL))
            promises.append(call.name)
        if call.path == f"{PARTIAL}/journal" and call.name == "remove":
            assert "." not in unsynced.folders, "the run is forgotten before the name is durable"
            promises.append("forget")
        unsynced.follow(call)
    return promises


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("done", [0, 1, 3], ids="{}-shards-done".format)
def test_nothing_is_promised_before_it_is_on_the_disk(
    tmp_path: Path, threads: int, done: int
) -> None:
    merge = Merge(tmp_path, threads=threads).write_inputs()
    if done:
        interrupt(Merge(tmp_path), shards=done)
    for overwrite, publish in ((False, "rename"), (True, "exchange")):
        fake = FailingFileSystem(tmp_path)
        merge.run(fake, overwrite=overwrite)
        if threads == 1:  # with more, a journal line may come while the next shard is written
            lines = (3 if overwrite else 3 - done) + 1
            assert check_durability(fake.calls) == ["append"] * lines + [publish, "forget"]
        else:
            last = max(n for n, call in enumerate(fake.calls) if call.name == "append")
            assert check_durability(fake.calls[last:]) == ["append", publish, "forget"]


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
    memory: Path, manner: Manner, overwrite: bool
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
        seen.add(state := merge.state(complete, old))
        assert merge.left_over() in ([], [PARTIAL])
        if merge.left_over() or state != "complete":
            merge.run(overwrite=overwrite)
        assert merge.state(complete) == "complete", fake.calls[number - 1]
        assert merge.left_over() == [], fake.calls[number - 1]
    assert number > 70, "the run survived too early"
    assert seen == {"complete", "old" if overwrite else "absent"}
    assert [contents(path) for path in merge.inputs] == inputs


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
        if name == "write" and first and path.name == f"{NAMES[0]}.tmp":
            assert self.entered.wait(60)
            threading.Timer(0.2, self.release.set).start()
            raise OutputError("no space left on device", file=path)
        if name == "write" and first and path.name == f"{NAMES[1]}.tmp":
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
    assert sorted(closed) == [f"{PARTIAL}/journal.tmp", *(f"{MODEL}/{n}.tmp" for n in NAMES[:2])]


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
