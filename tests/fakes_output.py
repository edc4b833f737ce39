"""A stand-in for the writing seam: it logs every call and fails the one it is told to."""

import errno
import os
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
