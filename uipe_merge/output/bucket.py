"""An output in an object store: built as any other, delivered shard by shard, manifest last.

A store has no rename, so nothing can appear whole: what is published is a prefix that holds
``uipe_merge.json``, and that is stored after everything else was read back and found right.
The local partial directory holds the journal, the lock and the few shards in hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.storage import read_document, system_error
from uipe_merge.checkpoint.urls import RemoteFolder
from uipe_merge.errors import OutputError, RemoteError, UsageError, listed
from uipe_merge.output.filesystem import write_document
from uipe_merge.output.manifest import LARGEST_MANIFEST, MANIFEST_NAME, parse_manifest
from uipe_merge.output.staging import ATTEMPTS, Staging, hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.checkpoint.storage import Stamp
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.journal import ShardRecord

IN_HAND = 3
"""Shards on the local disk at once: two being made, one being uploaded."""

_REPLACED = "replaced"  # in the partial directory: what the model that is replaced consists of
_UPLOADS = 2


def resolve(output: str, inputs: Iterable[RemoteFolder]) -> RemoteFolder:
    """Return the folder of an output URL after holding it against the inputs.

    Raises:
        UsageError: It is, lies in or contains an input.
    """
    folder = RemoteFolder(output)
    kind, path = folder.identity
    for source in inputs:
        other_kind, other = source.identity
        if kind != other_kind:
            continue
        if path == other:
            what = "is an input"
        elif path.startswith(f"{other}/"):
            what = f"lies in the input {source.location}"
        elif other.startswith(f"{path}/"):
            what = f"contains the input {source.location}"
        else:
            continue
        raise UsageError(what, file=folder.location, remedy="choose another output")
    return folder


def workplace(folder: RemoteFolder) -> Path:
    """Return the local directory in which an output is made: the same for every run of it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(json.dumps(folder.identity).encode()).hexdigest()
    return Path(cache).expanduser() / "uipe-merge" / digest[:32]


class BucketStaging(Staging):
    """One output being built here and delivered there. See ``Staging``."""

    most_at_once = IN_HAND

    def __init__(
        self,
        filesystem: FileSystem,
        folder: RemoteFolder,
        planned: frozenset[str],
        directory: Path | None = None,
    ) -> None:
        """Name the paths; ``planned`` are the files that the output will have."""
        directory = directory or workplace(folder)
        super().__init__(filesystem, directory, directory)
        self._folder = folder
        self._planned = planned
        self._delivered: dict[str, Stamp] = {}

    def prepare(self) -> None:
        """Make the directory above the partial one.

        Raises:
            OutputError: It cannot be made.
        """
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise system_error(error, self.partial.parent) from None

    def was_published(self, identity: dict[str, object]) -> bool:
        """Tell whether this run was killed between storing the manifest and cleaning up."""
        number = self.journal.published()
        if number is None or self.journal.identity() != identity:
            return False
        found = self._folder.hash(MANIFEST_NAME)
        return found is not None and _number(found[1]) == number

    def restore(self) -> None:
        """Nothing is ever moved aside."""

    def require_replaceable(self, named: object, *, overwrite: bool) -> None:
        """Refuse a prefix that holds something which may not be replaced.

        Raises:
            OutputError: It is not empty, unless an interrupted run of this output left it so, or
                this tool wrote all of it and ``overwrite`` is true.
        """
        present = set(self._folder.stamps())
        if MANIFEST_NAME not in present:
            begun = self._planned if self.journal.identity() is not None else frozenset()
            if present <= begun | set(self._replaced()):
                return
        elif overwrite:
            strays = sorted(present - set(self._manifest_files()))
            if not strays:
                return
            raise OutputError(
                f"holds what this tool did not write there: {listed(strays)}",
                file=named,
                remedy="remove it yourself or choose another output",
            )
        raise OutputError(
            "exists and is not empty",
            file=named,
            remedy="choose another output, or --overwrite a model written by this tool",
        )

    def begin(self, identity: dict[str, object], *, overwrite: bool) -> None:
        """Resume or start, as any run does; a model that is replaced goes first."""
        if not overwrite:
            self.require_own(identity)
        if MANIFEST_NAME in self._folder.names():
            names = json.dumps(self._manifest_files()).encode()
            write_document(self._filesystem, self.partial / _REPLACED, names)
            self._filesystem.sync_directory(self.partial)
            self._folder.remove([MANIFEST_NAME])
        self._folder.remove(self._replaced())
        super().begin(identity, overwrite=overwrite)

    def deliver(self, name: str, sha256: str) -> None:
        """Upload a file, read it back, and remove it here.

        Raises:
            RemoteError: The store refuses, or twice holds other bytes than were sent.
        """
        self._upload(name, sha256)
        self._filesystem.remove(self.model / name)

    def attempt(self, token: str) -> BucketStaging:
        """Return where another process may make shards: on its own machine."""
        directory = workplace(self._folder) / ATTEMPTS / token
        return BucketStaging(self._filesystem, self._folder, self._planned, directory)

    def delivered(self, name: str) -> Stamp | None:
        """Return the version of the object that was read back."""
        return self._delivered[name]

    def accept(self, token: str, record: ShardRecord, stamp: Stamp | None) -> None:
        """Take a shard that an attempt uploaded and read back."""
        del token
        assert stamp is not None  # noqa: S101 - an attempt says it of every shard
        self._delivered[record.name] = stamp

    def publish(self, *, overwrite: bool) -> None:
        """Upload what is left; hold everything against what was read back; then the manifest.

        Raises:
            RemoteError: The store refuses, or an object is not what was uploaded.
        """
        del overwrite  # what is replaced went when the run began
        rest = sorted(
            path.relative_to(self.model).as_posix()
            for path in self.model.rglob("*")
            if path.is_file()
        )
        for name in rest:
            if name != MANIFEST_NAME:
                self._upload(name, self._digest(name))
        if self._folder.stamps() != self._delivered:
            raise RemoteError(
                "what it holds changed while the model was uploaded",
                file=self._folder.location,
                remedy="run the same command again when nothing else writes there",
            )
        digest = self._digest(MANIFEST_NAME)
        self.journal.publishing(_number(digest))
        self._upload(MANIFEST_NAME, digest)
        self.settle()

    def settle(self) -> None:
        """Forget the run."""
        self.clean()

    def discard(self) -> None:
        """Remove what was delivered too."""
        self._folder.remove(self._planned & set(self._folder.stamps()))
        self.clean()

    def _upload(self, name: str, sha256: str) -> None:
        path = self.model / name
        size = path.stat().st_size
        for _ in range(_UPLOADS):
            self._folder.upload(name, path)
            found = self._folder.hash(name)
            if found is not None and found[:2] == (size, sha256):
                self._delivered[name] = found[2]
                return
        raise RemoteError(
            f"was uploaded {_UPLOADS} times and read back with other bytes",
            file=f"{self._folder.location}/{name}",
            remedy="check the store and what lies between, then run the same command again",
        )

    def _verified(self) -> dict[str, ShardRecord]:
        """Return the recorded shards that the store still has, byte for byte."""
        kept: dict[str, ShardRecord] = {}
        for name, record in self.journal.shards().items():
            found = self._folder.hash(name)
            if found is not None and found[:2] == (record.size, record.sha256):
                kept[name] = record
                self._delivered[name] = found[2]
        return kept

    def _digest(self, name: str) -> str:
        found = hash_file(self.model / name)
        assert found is not None  # noqa: S101 - it was written a moment ago, under our lock
        return found[1]

    def _manifest_files(self) -> list[str]:
        raw = read_document(self._folder, MANIFEST_NAME, LARGEST_MANIFEST)
        _, files = parse_manifest(raw, f"{self._folder.location}/{MANIFEST_NAME}")
        return [*files, MANIFEST_NAME]

    def _replaced(self) -> list[str]:
        """Return the files of the model that a run, begun earlier perhaps, replaces."""
        try:
            names = json.loads((self.partial / _REPLACED).read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValueError):  # torn: then the manifest had not been removed yet
            return []
        return [name for name in names if name != MANIFEST_NAME]


def _number(digest: str) -> int:
    """Return what the journal calls the published manifest, where a directory has an inode."""
    return int(digest[:12], 16)
