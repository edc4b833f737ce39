"""The partial directory: begun, resumed, published by one rename.

A run builds the whole model in ``.NAME.uipe-partial/model`` beside the output, keeps a
journal of finished shards next to it, and renames ``model`` to the output at the very end.
After any kill or power cut the output path therefore holds nothing, the untouched old model
or the complete new one, and the same command goes on where the journal stops.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import OutputError
from uipe_merge.output.filesystem import ASIDE
from uipe_merge.output.journal import Journal, ShardRecord, differing, refuse_other_run
from uipe_merge.output.manifest import MANIFEST_NAME
from uipe_merge.output.place import partial_directory, require_replaceable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from uipe_merge.checkpoint.storage import Stamp
    from uipe_merge.output.filesystem import FileSystem

MEASURED = "measured"
SLICES = "slices"
ATTEMPTS = "attempts"

SECTOR = 512
"""Bytes: the unit of ``st_blocks``, whatever the file system's own."""

_PIECE = 4 * 2**20


class Staging:
    """One output being built. The caller holds the lock of ``partial``.

    Attributes:
        output: The path that will be published.
        partial: The directory of this run.
        model: The directory that becomes the output.
        measured: The directory of what was measured before anything could be written.
        journal: The journal of this run.
        done: Shards that an earlier run finished and whose hashes still hold.
    """

    most_at_once = 2**31
    """Shards that may lie in ``model`` before they are delivered: here, all of them."""

    def __init__(self, filesystem: FileSystem, output: Path, partial: Path | None = None) -> None:
        """Name the paths; nothing is touched yet."""
        self._filesystem = filesystem
        self.output = output
        self.partial = partial or partial_directory(output)
        self.model = self.partial / "model"
        self.measured = self.partial / MEASURED
        self.journal = Journal(filesystem, self.partial / "journal")
        self.done: dict[str, ShardRecord] = {}

    def prepare(self) -> None:
        """Make what the partial directory stands in; here it is there already."""

    def was_published(self, identity: dict[str, object]) -> bool:
        """Tell whether this run was killed between publishing and cleaning up."""
        inode = self.journal.published()
        if inode is None or self.journal.identity() != identity:
            return False
        try:
            # The number of a directory that was removed meanwhile may have been given away.
            return self.output.stat().st_ino == inode and (self.output / MANIFEST_NAME).is_file()
        except OSError:
            return False

    def held(self, identity: dict[str, object]) -> tuple[int, int]:
        """Return bytes and files that going on would keep, or free before it writes."""
        kept = self.journal.shards() if self.journal.identity() == identity else {}
        nbytes = files = 0
        for path in self.model.rglob("*"):
            with suppress(OSError):
                status = path.lstat()
                nbytes += status.st_size if path.name in kept else status.st_blocks * SECTOR
                files += 1
        return nbytes, files

    def require_own(self, identity: dict[str, object]) -> None:
        """Refuse to go on with, or to throw away, what another command began.

        Raises:
            OutputError: Another run's partial directory is there; names what differs.
        """
        self._require_undivided()
        previous = self.journal.identity()
        if previous is not None and previous != identity:
            raise refuse_other_run(self.partial, differing(previous, identity))

    def restore(self) -> None:
        """Give the old model back where replacing it by renames was cut short."""
        aside = self.model.with_name(self.model.name + ASIDE)
        if aside.is_dir() and not os.path.lexists(self.output):
            self._filesystem.rename(aside, self.output)
            self._filesystem.sync_directory(self.output.parent)

    def require_replaceable(self, named: object, *, overwrite: bool) -> None:
        """Refuse an output that holds something which may not be replaced.

        Raises:
            OutputError: See ``place.require_replaceable``.
        """
        require_replaceable(self.output, named, overwrite=overwrite)

    def begin(self, identity: dict[str, object], *, overwrite: bool) -> None:
        """Resume the run that is there if it is this one; start one otherwise.

        Raises:
            OutputError: Another run's partial directory is there (and ``overwrite`` is
                false), or the file system refuses something.
        """
        self._require_undivided()
        if not overwrite:
            self.require_own(identity)
        self._filesystem.make_directory(self.model)
        self._filesystem.sync_directory(self.output.parent)
        if self.journal.identity() == identity:
            self.done = self._verified()
        elif self.measured.exists():
            self._filesystem.remove_tree(self.measured)
        for entry in _entries(self.model):
            if entry.name not in self.done:
                self._remove(entry)
        for entry in _entries(self.partial):
            if not _in_use(entry):
                self._remove(entry)
        self.journal.begin(identity, self.done.values())

    def deliver(self, name: str, sha256: str) -> None:
        """Take a shard that is durable in ``model``; here it stays where it is."""

    def attempt(self, token: str) -> Staging:
        """Return where another process may make shards of this output, for ``accept``."""
        return Staging(self._filesystem, self.output, self.partial / ATTEMPTS / token)

    def open(self) -> None:
        """Make the directories of an attempt."""
        try:
            self.model.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise system_error(error, self.model) from None

    def delivered(self, name: str) -> Stamp | None:
        """Return what ``accept`` has to know of a shard that an attempt delivered; here nothing."""
        del name
        return None

    def accept(self, token: str, record: ShardRecord, stamp: Stamp | None) -> None:
        """Take a shard that an attempt made.

        Raises:
            OutputError: It is not where this process can see it, or is of another size.
        """
        del stamp
        attempt = self.partial / ATTEMPTS / token
        path = attempt / "model" / record.name
        if not path.is_file():
            raise OutputError(
                "a worker wrote it where this process does not see it",
                file=path,
                remedy="put the output on a file system that all nodes share under one path",
            )
        if path.stat().st_size != record.size:
            raise OutputError(f"has not the {record.size} bytes that were written", file=path)
        self._filesystem.rename(path, self.model / record.name)
        self._filesystem.sync_directory(self.model)
        self._filesystem.remove_tree(attempt)

    def adopt(self, identity: dict[str, object], records: Mapping[str, ShardRecord]) -> None:
        """Take the shards in ``model``, made in slices, for those of one run, to be published."""
        for entry in _entries(self.model):
            if entry.name not in records:
                self._remove(entry)
        self._filesystem.sync_directory(self.model)
        self.journal.begin(identity, records.values())

    def publish(self, *, overwrite: bool) -> None:
        """Make the finished model appear at the output path, and clean up.

        Args:
            overwrite: Whether a model that is there may be replaced.

        Raises:
            OutputError: Something that may not be replaced appeared at the output path
                meanwhile, or the rename failed; the finished model then stays in the
                partial directory.
        """
        self._filesystem.sync_directory(self.model)
        self.journal.publishing(self.model.stat().st_ino)
        if overwrite and (self.output / MANIFEST_NAME).is_file():
            self._filesystem.exchange(self.model, self.output)
        else:
            self._rename_to_output()
        self.settle()

    def settle(self) -> None:
        """Make the published name durable, and only then forget the run."""
        self._filesystem.sync_directory(self.output.parent)
        self.clean()

    def clean(self) -> None:
        """Remove what the run leaves: the replaced model, if any, and the journal, last.

        As long as the journal is there, a rerun knows what this was.
        """
        left = [
            entry
            for entry in _entries(self.partial)
            if entry in (self.model, self.measured) or not _in_use(entry)
        ]
        for entry in left:
            self._remove(entry)
        if left:
            self._filesystem.sync_directory(self.partial)
        self._filesystem.remove(self.partial / "journal")

    def discard(self) -> None:
        """Remove all that an unpublished run made: it cannot be gone on with."""
        self.clean()

    def _rename_to_output(self) -> None:
        try:
            self._filesystem.rename(self.model, self.output)
        except OutputError as error:
            if not _entries(self.output) and not self.output.is_file():
                raise
            raise OutputError(
                f"appeared while the model was made ({error.message})",
                file=self.output,
                remedy="move it away and run the same command again: the finished work is kept",
            ) from None

    def _verified(self) -> dict[str, ShardRecord]:
        """Return the recorded shards whose files still have the recorded size and hash."""
        return {
            name: record
            for name, record in self.journal.shards().items()
            if hash_file(self.shard(name)) == (record.size, record.sha256)
        }

    def shard(self, name: str) -> Path:
        """Return where a finished shard lies."""
        return self.model / name

    def _require_undivided(self) -> None:
        if (self.partial / SLICES).exists():
            raise OutputError(
                "holds a run in slices that is not finished",
                file=self.partial,
                remedy="run `uipe-merge finish` on the output, or remove it when no slice runs",
            )

    def _remove(self, entry: Path) -> None:
        if entry.is_dir() and not entry.is_symlink():
            self._filesystem.remove_tree(entry)
        else:
            self._filesystem.remove(entry)


def _in_use(entry: Path) -> bool:
    """Tell whether an entry of the partial directory belongs to a run in hand."""
    return entry.name in ("model", "journal", MEASURED) or entry.name.startswith("lock")


def _entries(directory: Path) -> list[Path]:
    """Return what a directory holds, sorted; nothing where it is missing or no directory."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise system_error(error, directory) from None


def hash_file(path: Path) -> tuple[int, str] | None:
    """Return size and SHA-256 of a file; ``None`` where it is missing or no regular file.

    Raises:
        OutputError: It cannot be read.
    """
    digest = hashlib.sha256()
    piece = bytearray(_PIECE)
    view = memoryview(piece)
    size = 0
    try:
        if not path.is_file() or path.is_symlink():
            return None
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                digest.update(view[:count])
                size += count
    except OSError as error:
        raise system_error(error, path) from None
    return size, digest.hexdigest()
