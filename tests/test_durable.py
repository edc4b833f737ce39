"""The durable write: the order of its calls, and what is on the disk when."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from fakes_output import Call, FailingFileSystem, LoggedFile
from runs import Merge, interrupt

from uipe_merge.errors import OutputError

PARTIAL = ".out.uipe-partial"
MODEL = f"{PARTIAL}/model"


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path).write_inputs()


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
    f"sync_directory {MODEL}/code",
    f"sync_directory {MODEL}/code/deep",
    f"make_directory {MODEL}/code",
    *document(f"{MODEL}/code/modeling_own.py"),
    f"sync_directory {MODEL}/code",
    *document(f"{MODEL}/config.json"),
    *document(f"{MODEL}/tokenizer.json"),
    *document(f"{MODEL}/README.md"),
    *document(f"{MODEL}/model.safetensors.index.json"),
    *document(f"{MODEL}/uipe_merge.json"),
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


@pytest.mark.found("the journal could be gone while what it is about was still there")
def test_overwriting_exchanges_and_removes_the_old_model_after_the_new_name_is_durable(
    merge: Merge,
) -> None:
    merge.run()
    fake = FailingFileSystem(merge.root)
    merge.run(fake, overwrite=True)
    assert list(map(str, fake.calls))[-5:] == [
        f"exchange {MODEL} out",
        "sync_directory .",
        f"remove_tree {MODEL}",
        f"sync_directory {PARTIAL}",
        f"remove {PARTIAL}/journal",
    ]


def test_a_resumed_run_writes_only_the_shards_that_are_missing(merge: Merge) -> None:
    interrupt(merge, shards=2)
    fake = FailingFileSystem(merge.root)
    report = merge.run(fake)
    assert report.resumed == 2
    created = {call.path for call in fake.calls if call.name == "create"}
    assert {f"{MODEL}/{name}.tmp" for name in NAMES} & created == {f"{MODEL}/{NAMES[2]}.tmp"}


def test_a_shard_of_another_size_than_planned_is_never_given_its_name(merge: Merge) -> None:
    """Some file systems say so only when they are asked."""

    class Short(LoggedFile):
        def size(self) -> int:
            return super().size() - 1

    class Shorter(FailingFileSystem):
        def create(self, path: Path) -> LoggedFile:
            file = Short(self, path)
            self.perform("create", path, file.open)
            return file

    with pytest.raises(OutputError, match=r"bytes where \d+ were planned"):
        merge.run(Shorter(merge.root))
    assert not list(merge.model.glob("*.safetensors"))
    assert not merge.output.exists()


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
