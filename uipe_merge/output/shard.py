"""One output shard: header first, bytes to their place, hashed in order, made durable."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from uipe_merge.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from uipe_merge.output.filesystem import FileSystem


class ShardAborted(Exception):  # noqa: N818 - not an error: another thread has the error
    """Another thread failed; this one only stops waiting for it."""


class ShardWriter:
    """Writes a shard under a temporary name and gives it its own when it is on the disk.

    Several threads may write blocks; the digest is over the bytes in file order, so each
    block waits until the one before it was hashed.
    """

    def __init__(self, filesystem: FileSystem, path: Path, header: bytes) -> None:
        """Create the temporary file and write the header."""
        self._filesystem = filesystem
        self._path = path
        self._draft = path.with_name(path.name + ".tmp")
        self._file = filesystem.create(self._draft)
        self._digest = hashlib.sha256(header)
        self._turn = threading.Condition()
        self._next = 0
        self._position = len(header)
        self._aborted = False
        self._open = True
        try:
            self._file.write_at(header, 0)
        except BaseException:
            self.close()
            raise

    def write(self, sequence: int, data: memoryview, offset: int) -> None:
        """Write block number ``sequence`` at ``offset`` and hash it when its turn comes.

        Raises:
            OutputError: The write failed.
            ShardAborted: Another thread failed on an earlier block.
        """
        self._file.write_at(data, offset)
        with self._turn:
            self._turn.wait_for(lambda: self._aborted or self._next == sequence)
            if self._aborted:
                raise ShardAborted
        # The turn is ours alone: hash outside the lock, hashlib releases the interpreter.
        self._digest.update(data)
        with self._turn:
            self._next += 1
            self._position += len(data)
            self._turn.notify_all()

    def finish(self, size: int) -> str:
        """Make the shard durable under its name; return its SHA-256.

        Order: size check, fsync, checked close, rename, fsync of the directory.

        Raises:
            OutputError: A step failed, or the file is not ``size`` bytes long.
        """
        written = self._file.size()
        if not written == self._position == size:
            raise OutputError(f"has {written} bytes where {size} were planned", file=self._draft)
        self._file.sync()
        self.close()
        self._filesystem.rename(self._draft, self._path)
        self._filesystem.sync_directory(self._path.parent)
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Let nobody wait for this shard any more; safe to repeat.

        The file stays open: another thread may be writing to it, and a descriptor that is
        closed under its feet could by then be another file's.
        """
        with self._turn:
            self._aborted = True
            self._turn.notify_all()

    def close(self) -> None:
        """Close the file, when no thread writes any more; safe to repeat."""
        if self._open:
            self._open = False
            self._file.close()
