"""Checkpoints by URL: object stores and mounts, read and written through fsspec.

A ``RemoteFolder`` is what lies under one URL. Every request goes through ``Store.ask``.
"""

from __future__ import annotations

import functools
import hashlib
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from uipe_merge.checkpoint.storage import HIDDEN, Absent, Stamp
from uipe_merge.checkpoint.store import IgnoresRangesError, Store, System
from uipe_merge.errors import CorruptInputError, UnsafeInputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PIECE = 8 * 2**20
"""Bytes of an object that are in memory at once where it is copied or hashed."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9.-]*)://(.*)", re.DOTALL)
_MOST_PARTS = 9_000  # S3 takes 10 000
# Not ten pieces of 50 MB at once.
_PUT: dict[str, dict[str, int]] = {"s3": {"chunksize": PIECE, "max_concurrency": 1}}
# What stores call the version of an object, the surest first; the time is the last resort.
_TAGS = ("ETag", "etag", "generation", "blob_id", "content_md5", "md5Hash", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")


def is_url(location: str) -> bool:
    """Tell whether a location is a URL of something else than this machine's files."""
    match = _URL.match(location)
    return match is not None and match[1].lower() != "file"


def local(location: str) -> str:
    """Return a location without ``file://``."""
    match = _URL.match(location)
    return match[2] if match is not None and match[1].lower() == "file" else location


class RemoteFolder:
    """The objects under one URL."""

    def __init__(self, location: str) -> None:
        """Connect to nothing yet.

        Raises:
            UsageError: The URL holds credentials or names no folder, or its scheme is unknown or
                needs a package that is not installed.
        """
        match = _URL.match(location)
        assert match is not None  # noqa: S101 - asked with is_url
        self.location = location.rstrip("/")
        authority = match[2].split("/")[0]
        if "@" in authority or "?" in location or "#" in location:
            raise UsageError(
                "holds credentials or a query, which would end up in logs and in the output",
                file=f"{match[1]}://{authority.rpartition('@')[2].split('?')[0].split('#')[0]}/…",
                remedy="name the bare URL and give credentials by the environment or the store's "
                "configuration file",
            )
        if not match[2].strip("/"):
            raise UsageError("names no folder", file=location, remedy="name one in the store")
        self._store = Store(match[1].lower(), self.location)
        self._root = self._store.path(self.location)

    @property
    def identity(self) -> tuple[str, str]:
        """Kind of store and path in it: equal for two URLs of one place."""
        return self._store.kind, self._root

    def names(self) -> list[str]:
        """Sorted relative names of all objects, hidden trees left out."""
        return sorted(self.stamps())

    def stamps(self) -> dict[str, Stamp]:
        """Return size and tag of every object, by its relative name, from one listing.

        Raises:
            RemoteError: The store refuses or cannot be reached.
            UnsafeInputError: A name would leave the folder where it is copied to.
        """
        listing = self._store.ask_for(
            self.location, lambda system: system.find(self._root, detail=True)
        )
        found: dict[str, Stamp] = {}
        for path, info in (listing or {}).items():
            name = path.removeprefix(f"{self._root}/")
            # Consoles mark a "directory" by an empty object whose name ends in a slash.
            if not path.startswith(f"{self._root}/") or name.endswith("/") or _hidden(name):
                continue
            if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
                raise UnsafeInputError(
                    f"holds '{name}', which is no name of a file",
                    file=self.location,
                    remedy="remove that object",
                )
            found[name] = _stamp(info)
        return found

    def absent(self, names: Iterable[str]) -> Absent:
        """Return nothing: files are read where they are."""
        del names
        return Absent([], 0, self.location)

    def fetch(self, names: Iterable[str]) -> None:
        """Do nothing: files are read where they are."""

    def open_file(self, name: str) -> RemoteFile:
        """Look one object up, and return it for reading.

        Raises:
            CorruptInputError: There is none of that name.
            RemoteError: The store refuses or cannot be reached.
        """
        shown, path = f"{self.location}/{name}", f"{self._root}/{name}"
        info = self._store.ask_for(shown, lambda system: system.info(path))
        if info is None:
            raise CorruptInputError(
                "no such file", file=shown, remedy="upload the checkpoint again"
            )
        if info["type"] == "directory":
            raise CorruptInputError("is a directory, not a regular file", file=shown)
        return RemoteFile(self._store, path, shown, _stamp(info))

    def upload(self, name: str, source: Path) -> None:
        """Store a local file under ``name``, a piece at a time where it is large.

        Raises:
            RemoteError: The store refuses or cannot be reached.
        """
        path, options = f"{self._root}/{name}", dict(_PUT.get(self._store.kind, {}))
        if options:  # so many parts, and no more, may an object of S3 have
            options["chunksize"] = max(PIECE, source.stat().st_size // _MOST_PARTS)
        self._store.ask(
            f"{self.location}/{name}",
            lambda system: system.put_file(str(source), path, **options),
        )

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one after the other; what is missing is fine."""
        for name in names:
            shown, path = f"{self.location}/{name}", f"{self._root}/{name}"
            self._store.ask_for(shown, functools.partial(_remove, path))

    def hash(self, name: str) -> tuple[int, str, Stamp] | None:
        """Read an object back: size, hex SHA-256, stamp; ``None`` where there is none."""
        try:
            file = self.open_file(name)
        except CorruptInputError:
            return None
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(PIECE, file.stamp.size)))
        for start in range(0, file.stamp.size, PIECE):
            piece = buffer[: min(PIECE, file.stamp.size - start)]
            file.read_into(piece, start)
            digest.update(piece)
        return file.stamp.size, digest.hexdigest(), file.stamp


class RemoteFile:
    """One object, read by ranges."""

    def __init__(self, store: Store, path: str, shown: str, stamp: Stamp) -> None:
        """Remember where it is; ``shown`` is its name in messages."""
        self.path = shown
        self.stamp = stamp
        self._store = store
        self._path = path

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what came before a cut is not asked for again.

        Raises:
            CorruptInputError: The object ends before.
            RemoteError: The store refuses, fails, or sends other bytes than those asked for.
        """
        if offset + len(buffer) > self.stamp.size and len(buffer):
            raise CorruptInputError(
                f"ends at byte {self.stamp.size}, {offset + len(buffer) - self.stamp.size} bytes "
                "short of what its header promised",
                file=self.path,
                remedy="upload the checkpoint again",
            )
        done, end = 0, offset + len(buffer)
        while done < len(buffer):
            request = functools.partial(_range, self._path, offset + done, end)
            data = self._store.ask(self.path, request)
            buffer[done : done + len(data)] = data
            done += len(data)

    def close(self) -> None:
        """Nothing is held open."""


def _range(path: str, start: int, end: int, system: System) -> bytes:
    data: bytes = system.cat_file(path, start=start, end=end)
    if len(data) > end - start:
        raise IgnoresRangesError
    if not data:
        raise ConnectionError
    return data


def _remove(path: str, system: System) -> None:
    system.rm_file(path)


def _stamp(info: dict[str, Any]) -> Stamp:
    versions = (info.get(key) for key in (*_TAGS, *_TIMES))
    tag = next((version for version in versions if version), "")
    if isinstance(tag, datetime):  # a listing may give the same time as a number
        tag = tag.timestamp()
    return Stamp(int(info["size"] or 0), 0, str(tag).strip('"'))


def _hidden(name: str) -> bool:
    return any(part in HIDDEN for part in name.split("/")[:-1])
