"""The writing seam: every call that changes the disk, and nothing else, goes through here.

``FileSystem`` is what staging needs of a file system, in the words of POSIX. Tests replace
it to fail the N-th call or to drop what was not synced; ``LocalFileSystem`` is the real one.
Errors of the system leave it as ``OutputError``, naming the path.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from uipe_merge.aligned import PAGE, is_placed
from uipe_merge.checkpoint.storage import system_error
from uipe_merge.output import linux

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASIDE = ".old"
"""Ending of the name under which ``exchange`` keeps its second directory meanwhile."""

_WRITEBACK = 32 * 2**20
_DIRECT = 2**16  # fewer bytes are not worth a wait for the disk
# By the file system, or at its page size; or there is no descriptor left for a second one.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EMFILE, errno.ENFILE)


class OutputFile(Protocol):
    """One file being written."""

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of ``data`` at ``offset``; safe from several threads."""

    def sync(self) -> None:
        """Return when every byte is on the disk. A failure is final: rewrite the file."""

    def size(self) -> int:
        """Bytes the file system says the file has."""

    def close(self) -> None:
        """Close it; an error the system held back until now is raised."""


class FileSystem(Protocol):
    """What a staged output needs. All methods raise ``OutputError``."""

    def make_directory(self, path: Path) -> None:
        """Create one directory (mode 0777 and the umask); existing is fine."""

    def create(self, path: Path) -> OutputFile:
        """Open for writing, empty (mode 0666 and the umask)."""

    def append(self, path: Path, data: bytes) -> None:
        """Append to a file, creating it, and sync it."""

    def rename(self, source: Path, target: Path) -> None:
        """Move a file, replacing, or a directory, onto nothing or an empty directory."""

    def exchange(self, one: Path, two: Path) -> None:
        """Swap two directories: atomically where the system can, else by three renames.

        In the second case ``two`` is missing for a moment, and stands beside ``one``, under
        its name and ``ASIDE``.
        """

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""

    def remove(self, path: Path) -> None:
        """Remove a file; missing is fine."""

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all in it; missing is fine."""


class LocalFile:
    """A local file, written with ``pwrite``: whole pages past the page cache where that works.

    A page cache that will not be read again soon costs as much as all the arithmetic: pages
    are found, filled and written back. So the pages that lie whole in a block go straight to
    the disk, and the cache gets only the ends of blocks, which share a page with another.
    """

    def __init__(self, path: Path) -> None:
        """Create or truncate it."""
        self._path = path
        self._direct: int | None = None
        self._opening = threading.Lock()
        self._past_cache = hasattr(os, "O_DIRECT")
        with _naming(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o666)

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of ``data``, and start the disk on every full stretch of it."""
        view = memoryview(data)
        begin, end = -offset % PAGE, len(view) - (offset + len(view)) % PAGE
        if self._past_cache and end - begin >= _DIRECT and is_placed(view, offset):
            self._write(view[:begin], offset)
            begin += self._write_direct(view[begin:end], offset + begin)
            view, offset = view[begin:], offset + begin
        self._write(view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        done = 0
        with _naming(self._path):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        begin, end = offset // _WRITEBACK, (offset + done) // _WRITEBACK
        if end > begin:
            linux.start_writeback(self._descriptor, begin * _WRITEBACK, (end - begin) * _WRITEBACK)

    def _write_direct(self, view: memoryview, offset: int) -> int:
        """Write whole pages past the cache; return how many bytes, 0 where the system cannot."""
        with _naming(self._path):
            try:
                with self._opening:
                    if self._direct is None:
                        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT
                        self._direct = os.open(self._path, flags)
                return os.pwrite(self._direct, view, offset)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._past_cache = False
                return 0

    def sync(self) -> None:
        """Flush to the disk."""
        with _naming(self._path):
            os.fsync(self._descriptor)

    def size(self) -> int:
        """Size on the file system."""
        with _naming(self._path):
            return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close, and report what closing reports."""
        with _naming(self._path):
            try:
                if self._direct is not None:
                    os.close(self._direct)
            finally:
                os.close(self._descriptor)


class LocalFileSystem:
    """The file system of this machine."""

    def make_directory(self, path: Path) -> None:
        """Create one directory."""
        with _naming(path):
            path.mkdir(exist_ok=True)

    def create(self, path: Path) -> LocalFile:
        """Open for writing, empty."""
        return LocalFile(path)

    def append(self, path: Path, data: bytes) -> None:
        """Append and sync."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with _naming(path):
            descriptor = os.open(path, flags, 0o666)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename; the system itself refuses a target directory that is not empty."""
        with _naming(target):
            source.rename(target)

    def exchange(self, one: Path, two: Path) -> None:
        """Swap two directories."""
        with _naming(two):
            if linux.exchange(str(one), str(two)):
                return
            # Each rename is on the disk before the next: were the third there without the second,
            # the old model would stand where whatever is unfinished is thrown away.
            aside = one.with_name(one.name + ASIDE)
            self.rename(two, aside)
            self.sync_directory(two.parent)
            self.sync_directory(one.parent)
            self.rename(one, two)
            self.sync_directory(two.parent)
            self.rename(aside, one)

    def sync_directory(self, path: Path) -> None:
        """Sync the directory itself."""
        with _naming(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        with _naming(path):
            path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a tree."""
        with _naming(path):
            if path.exists():
                shutil.rmtree(path)


def write_document(filesystem: FileSystem, path: Path, data: bytes) -> None:
    """Write a small file whole and durably."""
    file = filesystem.create(path)
    try:
        file.write_at(data, 0)
        file.sync()
    finally:
        file.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise system_error(error, path) from None
