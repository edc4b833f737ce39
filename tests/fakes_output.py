"""A stand-in for the writing seam: it logs every call and fails the one it is told to."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.output.filesystem import LocalFile, LocalFileSystem

Result = TypeVar("Result")

Manner = Literal["before", "after", "onwards"]
"""How a call fails: without having done anything, though it was done, or it and all later ones."""


class Call(NamedTuple):
    """One call of the seam; the paths are relative to the root of the fake."""

    name: str
    path: str
    target: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


class FailingFileSystem:
    """The local file system, with a log and with a fault at the N-th call (counted from 1)."""

    def __init__(
        self,
        root: Path,
        fault: int | None = None,
        *,
        manner: Manner = "before",
        code: int = errno.ENOSPC,
    ) -> None:
        self.calls: list[Call] = []
        self.root = root
        self._local = LocalFileSystem()
        self._fault = fault
        self._manner = manner
        self._code = code
        self._counting = threading.Lock()

    @property
    def failed(self) -> bool:
        """Whether the call that was to fail was made."""
        return self._fault is not None and len(self.calls) >= self._fault

    def make_directory(self, path: Path) -> None:
        self.perform("make_directory", path, lambda: self._local.make_directory(path))

    def create(self, path: Path) -> "LoggedFile":
        file = LoggedFile(self, path)
        self.perform("create", path, file.open)
        return file

    def append(self, path: Path, data: bytes) -> None:
        self.perform("append", path, lambda: self._local.append(path, data))

    def rename(self, source: Path, target: Path) -> None:
        self.perform("rename", source, lambda: self._local.rename(source, target), target)

    def exchange(self, one: Path, two: Path) -> None:
        self.perform("exchange", one, lambda: self._local.exchange(one, two), two)

    def sync_directory(self, path: Path) -> None:
        self.perform("sync_directory", path, lambda: self._local.sync_directory(path))

    def remove(self, path: Path) -> None:
        self.perform("remove", path, lambda: self._local.remove(path))

    def remove_tree(self, path: Path) -> None:
        self.perform("remove_tree", path, lambda: self._local.remove_tree(path))

    def perform(
        self, name: str, path: Path, action: Callable[[], Result], target: Path | None = None
    ) -> Result:
        """Log a call and do it, unless it is to fail."""
        with self._counting:
            self.calls.append(Call(name, self._relative(path), self._relative(target)))
            number = len(self.calls)
        later = self._fault is not None and number > self._fault and self._manner == "onwards"
        if number != self._fault and not later:
            return action()
        if self._manner == "after" or name == "close":  # a close that fails still closes
            action()
        raise system_error(OSError(self._code, os.strerror(self._code)), path)

    def _relative(self, path: Path | None) -> str:
        return "" if path is None else os.path.relpath(path, self.root)


class LoggedFile:
    """A file of ``FailingFileSystem``: its calls are logged, counted and failed with the rest."""

    def __init__(self, filesystem: FailingFileSystem, path: Path) -> None:
        self._filesystem = filesystem
        self._path = path
        self._file: LocalFile | None = None

    def open(self) -> None:
        self._file = LocalFile(self._path)

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        self._perform("write", lambda file: file.write_at(data, offset))

    def sync(self) -> None:
        self._perform("sync", LocalFile.sync)

    def size(self) -> int:
        return self._perform("size", LocalFile.size)

    def close(self) -> None:
        self._perform("close", LocalFile.close)

    def _perform(self, name: str, action: Callable[[LocalFile], Result]) -> Result:
        file = self._file
        assert file is not None, f"{name} of a file that was not opened: {self._path}"
        return self._filesystem.perform(name, self._path, lambda: action(file))


class _Change(NamedTuple):
    """A change of names, and the directory that must be synced for it to be on the disk."""

    directory: Path
    undo: Callable[[], None]


class VolatileFileSystem(FailingFileSystem):
    """A file system whose power fails at the N-th call: nothing works from there on.

    ``power_cut`` then takes away what was not synced: the bytes of files, and changes of names,
    the last first. What was removed or replaced is kept aside in ``grave`` until then.
    """

    def __init__(self, root: Path, fault: int, grave: Path, partial: Path) -> None:
        super().__init__(root, fault, manner="onwards")
        self._grave = grave
        self._buried = 0
        self._dirty: dict[int, Path] = {}
        # The lock makes the partial directory, behind the seam's back.
        self._pending = [_Change(root, lambda: shutil.rmtree(partial, ignore_errors=True))]

    def perform(
        self, name: str, path: Path, action: Callable[[], Result], target: Path | None = None
    ) -> Result:
        undoing = self._undoing(name, path, target)
        result = super().perform(name, path, action, target)
        if undoing is not None:
            self._pending.append(undoing)
        if name == "create":
            self._dirty[path.stat().st_ino] = path
        elif name == "sync":
            self._dirty.pop(path.stat().st_ino)
        elif name == "rename" and target is not None and target.is_file():
            self._dirty |= {ino: target for ino in self._dirty if ino == target.stat().st_ino}
        elif name == "sync_directory":
            self._pending = [change for change in self._pending if change.directory != path]
        return result

    def power_cut(self, undone: int, *, zeros: bool) -> None:
        """Undo this many of the changes of names that were not synced; lose unsynced bytes.

        ``zeros``: a file that was not synced keeps its size; else it is empty.
        """
        for path in self._dirty.values():
            size = path.stat().st_size
            os.truncate(path, 0)
            os.truncate(path, size if zeros else 0)
        for change in self._pending[::-1][:undone]:
            change.undo()

    @property
    def unsynced_names(self) -> int:
        """How many changes of names a power cut could take away now."""
        return len(self._pending)

    def _undoing(self, name: str, path: Path, target: Path | None) -> _Change | None:
        """Prepare to undo a call that is about to be made."""
        if name == "create" and not path.exists():
            return _Change(path.parent, path.unlink)
        if name == "make_directory" and not path.exists():
            return _Change(path.parent, lambda: shutil.rmtree(path))
        if name == "rename" and target is not None:
            replaced = self._bury(target) if target.is_file() else None
            return _Change(target.parent, lambda: _move(target, path, replaced))
        if name == "exchange" and target is not None:
            return _Change(target.parent, lambda: self._local.exchange(path, target))
        if name in ("remove", "remove_tree") and path.exists():
            buried = self._bury(path)
            return _Change(path.parent, lambda: _move(buried, path, None))
        return None

    def _bury(self, path: Path) -> Path:
        """Keep a copy of what is about to go."""
        self._buried += 1
        copy = self._grave / str(self._buried)
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy2(path, copy)
        return copy


def _move(source: Path, target: Path, replaced: Path | None) -> None:
    """Move something back, and what it had replaced too."""
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
    if replaced is not None:
        replaced.rename(source)
