"""The reading seam: a folder of files that can be read at any offset.

``Folder`` and ``InputFile`` are all the rest of the program knows about where a checkpoint
lives. ``LocalFolder`` is the one for directories, ``hub.HubFolder`` the one for repositories
and ``urls.RemoteFolder`` the one for buckets.

A local file is opened by ``open_file`` only after it was looked at: it must be a regular
file (a FIFO or a device would hang or never end) and must not leave its directory by a
symlink. The snapshots of the Hugging Face cache, whose files are links to
``../../blobs/…``, are let through.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from uipe_merge.errors import (
    CorruptInputError,
    OutputError,
    UipeMergeError,
    UnsafeInputError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


class Stamp(NamedTuple):
    """What tells that a file is still the one that was planned with.

    Attributes:
        size: Bytes.
        mtime_ns: Time of last modification in nanoseconds; 0 where ``tag`` says more.
        tag: What a remote store calls this version of the file: an ETag, a hash.
    """

    size: int
    mtime_ns: int
    tag: str = ""


class Absent(NamedTuple):
    """What has to be downloaded before it can be read whole.

    Attributes:
        names: The files.
        nbytes: Their bytes.
        directory: Below which they will be put.
    """

    names: list[str]
    nbytes: int
    directory: str


class InputFile(Protocol):
    """One open file."""

    @property
    def path(self) -> str:
        """The name to show in messages."""

    @property
    def stamp(self) -> Stamp:
        """Size and modification time, taken when it was opened."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole ``buffer`` (bytes, writable) from ``offset``.

        Raises:
            CorruptInputError: The file ends before the buffer is full.
            OutputError: The system reports a read error.
        """

    def close(self) -> None:
        """Give the descriptor back."""


class Folder(Protocol):
    """One checkpoint's files, by name relative to the folder."""

    @property
    def location(self) -> str:
        """The folder as the user named it."""

    def names(self) -> list[str]:
        """Sorted relative names of all files, with ``/`` between the parts."""

    def open_file(self, name: str) -> InputFile:
        """Open one file for reading.

        Raises:
            CorruptInputError: There is no such file, or it is not a regular file.
            UnsafeInputError: It is a link that leaves the folder.
            OutputError: Permission denied, or another system error.
        """

    def absent(self, names: Iterable[str]) -> Absent:
        """Return which of these files ``fetch`` would have to download."""

    def fetch(self, names: Iterable[str]) -> None:
        """Download what is absent of these files, which are going to be read whole.

        Raises:
            RemoteError: A file cannot be had.
            CorruptInputError: One did not arrive as it should be.
            OutputError: The disk refuses it.
        """


HIDDEN = (".git", ".cache")
"""Directories of a checkpoint that are none of its own."""

_DEEPEST = 8  # a model directory is flat; this only bounds a hostile tree


class LocalFolder:
    """A directory on a mounted file system."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        """Check that the directory exists.

        Raises:
            UsageError: There is no such directory.
            OutputError: It cannot be looked at.
        """
        self._location = os.fspath(location)
        self.root = Path(os.path.realpath(self._location))
        try:
            directory = stat.S_ISDIR(self.root.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                "no such directory",
                file=self._location,
                remedy="name a checkpoint directory, or ORG/NAME or ORG/NAME@REVISION on a hub",
            ) from None
        except OSError as error:
            raise system_error(error, self._location) from None
        if not directory:
            raise UsageError(
                "is a file",
                file=self._location,
                remedy="name the directory that holds the checkpoint",
            )

    @property
    def location(self) -> str:
        """The directory as the user named it."""
        return self._location

    def names(self) -> list[str]:
        """Sorted relative names of all files below the directory, hidden trees left out."""
        found: list[str] = []

        def report(error: OSError) -> None:
            raise system_error(error, error.filename or self._location) from None

        for directory, subdirectories, files in os.walk(self.root, onerror=report):
            relative = Path(directory).relative_to(self.root)
            subdirectories[:] = sorted(
                name
                for name in subdirectories
                if name not in HIDDEN and len(relative.parts) < _DEEPEST
            )
            found += [(relative / name).as_posix() for name in files]
        return sorted(found)

    def open_file(self, name: str) -> LocalFile:
        """Open one regular file of this directory."""
        path = self.root / name
        shown = os.path.join(self._location, name)
        try:
            target = Path(os.path.realpath(path, strict=True))
            if not (target.is_relative_to(self.root) or self._in_hub_cache(target)):
                raise UnsafeInputError(
                    f"is a link to {target}, outside its directory",
                    file=shown,
                    remedy="replace the link by the file itself",
                )
            mode = target.stat().st_mode
            if not stat.S_ISREG(mode):
                raise CorruptInputError(f"is {_kind(mode)}, not a regular file", file=shown)
            return LocalFile(target, shown)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptInputError(
                "no such file", file=shown, remedy="download the checkpoint again"
            ) from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise CorruptInputError("no such file: its name is too long", file=shown) from None
            if error.errno == errno.ELOOP:
                raise CorruptInputError("is a link to itself", file=shown) from None
            raise system_error(error, shown) from None

    def absent(self, names: Iterable[str]) -> Absent:
        """Return nothing: all is here."""
        del names
        return Absent([], 0, self._location)

    def fetch(self, names: Iterable[str]) -> None:
        """Do nothing: all is here."""

    def _in_hub_cache(self, target: Path) -> bool:
        # .../models--ORG--NAME/snapshots/COMMIT/file -> .../models--ORG--NAME/blobs/HASH
        snapshots = self.root.parent
        return snapshots.name == "snapshots" and target.parent == snapshots.parent / "blobs"


class LocalFile:
    """One open local file, read with ``preadv``.

    Large positional reads, not a memory map: a map dies by SIGBUS when the file shrinks and
    faults page by page on network file systems.
    """

    def __init__(self, target: Path, shown: str) -> None:
        """Open ``target``; ``shown`` is its name in messages."""
        self.path = shown
        self._descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        self.stamp = Stamp(status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise system_error(error, self.path) from None
            if count == 0:
                raise CorruptInputError(
                    f"ends at byte {offset + done}, {len(buffer) - done} bytes short of what "
                    "its header promised",
                    file=self.path,
                    remedy="it changed while it was read: run again when nothing writes to it",
                )
            done += count

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def read_document(folder: Folder, name: str, limit: int) -> bytes:
    """Return the whole content of a small file.

    Raises:
        CorruptInputError: It is larger than ``limit`` bytes (and what ``open_file`` raises).
    """
    file = folder.open_file(name)
    try:
        if file.stamp.size > limit:
            raise CorruptInputError(
                f"is {file.stamp.size} bytes, more than the {limit} such a file may have",
                file=file.path,
            )
        content = bytearray(file.stamp.size)
        file.read_into(memoryview(content), 0)
        return bytes(content)
    finally:
        file.close()


def system_error(error: OSError, path: object) -> UipeMergeError:
    """Turn what the operating system says into an error that names the path."""
    reason = (error.strerror or str(error)).lower()
    remedies = {
        errno.EACCES: "give yourself permission to it",
        errno.EPERM: "give yourself permission to it",
        errno.EROFS: "choose a file system that is not mounted read-only",
        errno.ENOSPC: "free some disk space and run the same command again",
        errno.EDQUOT: "free some of your quota and run the same command again",
        errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
        errno.EFBIG: "raise the limit of file sizes (`ulimit -f`)",
        errno.EIO: "check the disk, then run the same command again",
    }
    return OutputError(reason, file=path, remedy=remedies.get(error.errno or 0))


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((text for check, text in kinds if check(mode)), "a special file")
