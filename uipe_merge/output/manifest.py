"""``uipe_merge.json``: what was made, from what, and the hash of every file.

Written last, and free of times and of the machine's names, so that an interrupted and
resumed run gives the same bytes as one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import strict_json
from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import CorruptInputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST_NAME = "uipe_merge.json"
SCHEMA = 1

LARGEST_MANIFEST = 2**28
"""Bytes: of a model of a million tensors."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class FileRecord(NamedTuple):
    """Size in bytes and hex SHA-256 of one file."""

    size: int
    sha256: str


def record_of(content: bytes) -> FileRecord:
    """Return the record of a file with this content."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def encode_manifest(content: Mapping[str, object], files: Mapping[str, FileRecord]) -> bytes:
    """Return the manifest: ``content`` and the record of every file but itself."""
    document = {
        "schema": SCHEMA,
        **content,
        "files": {name: record._asdict() for name, record in sorted(files.items())},
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def is_whole(directory: Path, files: Mapping[str, FileRecord]) -> bool:
    """Tell whether every file of a manifest is there, in its size."""
    paths = ((directory / name, record) for name, record in files.items())
    return all(path.is_file() and path.stat().st_size == record.size for path, record in paths)


def read_manifest(directory: Path) -> tuple[dict[str, object], dict[str, FileRecord]]:
    """Return the whole manifest of a published directory, and its files.

    Raises:
        UsageError: There is no such directory, or it has no manifest.
        CorruptInputError: The manifest is damaged, or names files outside the directory.
        OutputError: It cannot be read.
    """
    path = directory / MANIFEST_NAME
    try:
        if not path.is_file():
            raise UsageError(
                f"has no {MANIFEST_NAME}" if directory.is_dir() else "no such directory",
                file=directory,
                remedy="name a directory written by uipe-merge",
            )
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CorruptInputError(
                f"has more than the {LARGEST_MANIFEST} bytes such a file may have", file=path
            )
        return parse_manifest(path.read_bytes(), path)
    except OSError as error:
        raise system_error(error, path) from None


def parse_manifest(raw: bytes, path: object) -> tuple[dict[str, object], dict[str, FileRecord]]:
    """Return the manifest that these bytes are, and its files; ``path`` is for messages.

    Raises:
        CorruptInputError: It is damaged, or names files outside its directory.
    """
    try:
        document = strict_json.loads(raw, naturals_only=False, any_path=True, most_values=None)
    except strict_json.StrictJsonError as error:
        raise CorruptInputError(f"is not valid: {error}", file=path) from None
    entries = document.get("files") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(entries, dict):
        raise CorruptInputError("lists no files", file=path)
    if document.get("schema") != SCHEMA:
        raise CorruptInputError(
            f"has schema {document.get('schema')!r}, this version reads {SCHEMA}",
            file=path,
            remedy="use the version of uipe-merge that wrote it",
        )
    return document, {name: _record(path, name, entry) for name, entry in entries.items()}


def _record(path: object, name: str, entry: object) -> FileRecord:
    safe = bool(name) and not name.startswith("/") and ".." not in name.split("/")
    size = entry.get("size") if isinstance(entry, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if not (
        safe
        and (type(size) is int and size >= 0)
        and (isinstance(digest, str) and _DIGEST.fullmatch(digest))
    ):
        raise CorruptInputError(f"has a damaged entry for '{name}'", file=path)
    return FileRecord(size, digest)
