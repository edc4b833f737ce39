"""A published model, to be verified: in a directory, or under a URL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from uipe_merge.checkpoint.storage import LocalFolder, read_document
from uipe_merge.checkpoint.urls import RemoteFolder
from uipe_merge.errors import UsageError
from uipe_merge.output.manifest import (
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    FileRecord,
    parse_manifest,
    read_manifest,
)
from uipe_merge.output.staging import hash_file

if TYPE_CHECKING:
    from uipe_merge.checkpoint.storage import InputFile


class Published(Protocol):
    """A model that a merge made, wherever it is."""

    @property
    def manifest_path(self) -> str:
        """The manifest, as messages name it."""

    def manifest(self) -> tuple[dict[str, object], dict[str, FileRecord]]:
        """Return the manifest, and the record of every file."""

    def hash(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 of a file; ``None`` where it is missing."""

    def open_file(self, name: str) -> InputFile:
        """Open a file for reading; raises what ``Folder.open_file`` raises."""

    def names(self) -> list[str]:
        """Return all files, relative."""


class InDirectory:
    """A model in a directory."""

    def __init__(self, location: str) -> None:
        """Name the directory."""
        self._directory = Path(location)
        self.manifest_path = f"{location}/{MANIFEST_NAME}"

    def manifest(self) -> tuple[dict[str, object], dict[str, FileRecord]]:
        """Return the manifest, and the record of every file. Raises what ``read_manifest`` raises."""
        return read_manifest(self._directory)

    def hash(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 of a file; ``None`` where it is missing."""
        return hash_file(self._directory / name)

    def open_file(self, name: str) -> InputFile:
        """Open a file for reading; raises what ``Folder.open_file`` raises."""
        return LocalFolder(self._directory).open_file(name)

    def names(self) -> list[str]:
        """Return all files, relative."""
        files = (path for path in self._directory.rglob("*") if path.is_file())
        return [path.relative_to(self._directory).as_posix() for path in files]


class InBucket:
    """A model in an object store."""

    def __init__(self, location: str) -> None:
        """Name the folder."""
        self._folder = RemoteFolder(location)
        self.manifest_path = f"{self._folder.location}/{MANIFEST_NAME}"

    def manifest(self) -> tuple[dict[str, object], dict[str, FileRecord]]:
        """Return the manifest, and the record of every file.

        Raises:
            UsageError: Nothing is published there.
            CorruptInputError: The manifest is damaged.
            RemoteError: The store refuses or cannot be reached.
        """
        where = self._folder.location
        if MANIFEST_NAME not in self._folder.names():
            raise UsageError(
                f"has no {MANIFEST_NAME}", file=where, remedy="name a folder that a merge published"
            )
        raw = read_document(self._folder, MANIFEST_NAME, LARGEST_MANIFEST)
        return parse_manifest(raw, self.manifest_path)

    def hash(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 of an object; ``None`` where it is missing."""
        found = self._folder.hash(name)
        return None if found is None else found[:2]

    def open_file(self, name: str) -> InputFile:
        """Look an object up for reading; raises what ``Folder.open_file`` raises."""
        return self._folder.open_file(name)

    def names(self) -> list[str]:
        """Return all files, relative."""
        return self._folder.names()
