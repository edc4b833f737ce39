"""The journal of a run: which plan it follows and which shards are done.

One JSON value a line, each behind its CRC-32, appended and synced. A torn last line, or any
line whose CRC is wrong, ends the journal there: what came before is trusted no further than
the hashes it holds.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import OutputError
from uipe_merge.output.filesystem import write_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from uipe_merge.output.filesystem import FileSystem

SCHEMA = 1


class ShardRecord(NamedTuple):
    """A finished shard.

    Attributes:
        name: File name.
        size: Bytes.
        sha256: Hex digest of its content.
        moments: One list of sums per tensor, in the order of the plan; see the engine.
    """

    name: str
    size: int
    sha256: str
    moments: list[list[float] | None]


class Journal:
    """The journal file of one partial directory."""

    def __init__(self, filesystem: FileSystem, path: Path) -> None:
        """Remember where it is; nothing is read or written yet."""
        self._filesystem = filesystem
        self._path = path

    def begin(self, identity: dict[str, object], done: Iterable[ShardRecord]) -> None:
        """Start the journal of a run, with the shards that an earlier run finished.

        It replaces an older journal in one step, so that a torn end never stands before new
        lines.
        """
        lines = [{"schema": SCHEMA, **identity}, *(record._asdict() for record in done)]
        draft = self._path.with_name(self._path.name + ".tmp")
        write_document(self._filesystem, draft, b"".join(_encode(line) for line in lines))
        self._filesystem.rename(draft, self._path)
        self._filesystem.sync_directory(self._path.parent)

    def finish_shard(self, record: ShardRecord) -> None:
        """Record a shard whose bytes and name are on the disk."""
        self._append(record._asdict())

    def publishing(self, inode: int) -> None:
        """Record that the directory with this inode number is about to be published."""
        self._append({"publishing": inode})

    def published(self) -> int | None:
        """Return the inode number of the directory that was to be published, if any."""
        for line in self._lines():
            inode = line.get("publishing")
            if isinstance(inode, int):
                return inode
        return None

    def identity(self) -> dict[str, object] | None:
        """Return what ``begin`` recorded; ``None`` where there is no usable journal."""
        first = next(self._lines(), None)
        if first is None or first.get("schema") != SCHEMA:
            return None
        return {name: value for name, value in first.items() if name != "schema"}

    def shards(self) -> dict[str, ShardRecord]:
        """Return the finished shards by name."""
        fields = set(ShardRecord._fields)
        lines = [line for line in self._lines() if line.keys() == fields]
        return {str(line["name"]): ShardRecord(**line) for line in lines}

    def _append(self, value: dict[str, object]) -> None:
        self._filesystem.append(self._path, _encode(value))

    def _lines(self) -> Iterator[dict[str, Any]]:
        return _lines(self._path)


class Memo:
    """One value that was computed, and from what; replaced in one step."""

    def __init__(self, filesystem: FileSystem, path: Path) -> None:
        """Remember where it is; nothing is read or written yet."""
        self._filesystem = filesystem
        self._path = path

    def recall(self, key: str) -> Any | None:  # noqa: ANN401 - what ``keep`` was given
        """Return what was kept under ``key``; ``None`` where that is not what is there."""
        line = next(_lines(self._path), {})
        return line.get("value") if line.get("key") == key else None

    def keep(self, key: str, value: object) -> None:
        """Keep a value that JSON can say instead of what is there."""
        draft = self._path.with_name(self._path.name + ".tmp")
        write_document(self._filesystem, draft, _encode({"key": key, "value": value}))
        self._filesystem.rename(draft, self._path)
        self._filesystem.sync_directory(self._path.parent)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise system_error(error, path) from None
    for line in raw.split(b"\n")[:-1]:  # what follows the last newline is torn
        crc, _, text = line.partition(b" ")
        if crc != f"{zlib.crc32(text):08x}".encode():
            return
        value = json.loads(text)
        if not isinstance(value, dict):
            return
        yield value


def _encode(value: dict[str, object]) -> bytes:
    text = json.dumps(value, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def differing(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """Name the fields in which two identities differ."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def refuse_other_run(path: Path, fields: list[str]) -> OutputError:
    """Return the error for a partial directory that another command left."""
    return OutputError(
        f"holds an unfinished run that differs in {', '.join(fields)}",
        file=path,
        remedy="run the command that began it, or add --overwrite to start anew",
    )
