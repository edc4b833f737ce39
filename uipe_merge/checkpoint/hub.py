"""A repository of a Hugging Face hub, ``ORG/NAME`` or ``ORG/NAME@REVISION``, as a folder.

The revision is resolved once, to a commit; everything after that names the commit, so that a
branch that moves meanwhile cannot mix two versions. Planning reads headers, index and
configuration by ranges. ``fetch`` brings whole files into the user's Hugging Face cache,
where they are read like any other, and what is there already is never asked for again.

Nothing of a repository is ever imported or run: its code is files that are carried along.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import hub_client
from uipe_merge.checkpoint.hub_client import COMMIT, Entry
from uipe_merge.checkpoint.storage import (
    HIDDEN,
    Absent,
    InputFile,
    LocalFile,
    LocalFolder,
    Stamp,
    system_error,
)
from uipe_merge.errors import CorruptInputError, RemoteError, UnsafeInputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9_][A-Za-z0-9_./-]*))?")
_PIECE = 4 * 2**20
_SHA256_DIGITS = 64


class HubId(NamedTuple):
    """What an argument names on a hub.

    Attributes:
        repo: ``ORG/NAME``.
        revision: A branch, tag or commit; ``None`` for the default branch.
    """

    repo: str
    revision: str | None


def parse_id(text: str) -> HubId | None:
    """Return the hub id that a text has the form of, if it has."""
    match = _ID.fullmatch(text)
    return None if match is None else HubId(match[1], match[2])


def unpinned(location: str) -> str:
    """Return the id of a hub location without its commit, and any other location as it is."""
    named = parse_id(location)
    if named is None or named.revision is None or not COMMIT.fullmatch(named.revision):
        return location
    return named.repo


class HubFolder:
    """One repository at one commit."""

    def __init__(self, named: HubId) -> None:
        """Resolve the revision and list the files.

        Raises:
            UsageError: The hub would not take this id or revision.
            UnsafeInputError: The repository has a file whose name leaves it.
            RemoteError: The hub does not give it, or is switched off and the cache lacks it.
        """
        self._repo, self._revision = named
        shown = f"{self._repo}@{self._revision}" if self._revision else self._repo
        _check_id(named, shown)
        self._offline = hub_client.offline()
        if self._offline:
            listing = self._cached_listing(shown)
        else:
            listing = hub_client.list_files(self._repo, self._revision, shown)
        for name in listing.files:
            _check_name(name, shown)
        self._commit, self._files = listing

    @property
    def location(self) -> str:
        """The id with the commit: ``ORG/NAME@COMMIT``."""
        return f"{self._repo}@{self._commit}"

    def names(self) -> list[str]:
        """Sorted names of all files, hidden trees left out as in a directory."""
        return sorted(name for name in self._files if not set(HIDDEN) & set(name.split("/")[:-1]))

    def open_file(self, name: str) -> InputFile:
        """Open a file where it is: in the cache, or on the hub."""
        shown = f"{self.location}/{name}"
        entry = self._files.get(name)
        if entry is None and self._offline:
            raise RemoteError(
                "is not in the cache, and the hub is switched off (HF_HUB_OFFLINE)",
                file=shown,
                remedy="run once without HF_HUB_OFFLINE",
            )
        if entry is None:
            raise CorruptInputError("no such file", file=shown, remedy="complete the repository")
        path = hub_client.cached(self._repo, self._commit, name)
        if path is not None:
            return self._open_cached(path, shown, entry)
        if name.endswith(".bin"):
            raise UnsafeInputError(
                "is pickled, and such a file is not read over the network",
                file=shown,
                remedy=f"run `hf download {self._repo} --revision {self._commit}` first",
            )
        return HubFile(self._repo, self._commit, name, entry)

    def absent(self, names: Iterable[str]) -> Absent:
        """Return which of these files would have to be downloaded, and into which directory."""
        found = [
            name for name in names if hub_client.cached(self._repo, self._commit, name) is None
        ]
        nbytes = sum(self._files[name].size for name in found)
        return Absent(found, nbytes, str(hub_client.cache_directory()))

    def fetch(self, names: Iterable[str]) -> None:
        """Download what is absent, and hold every byte of it against the hub's digest."""
        for name in self.absent(names).names:
            shown = f"{self.location}/{name}"
            path = hub_client.download(self._repo, self._commit, name)
            try:
                _require_intact(path, self._files[name], shown)
            except (CorruptInputError, RemoteError):
                for stale in {Path(os.path.realpath(path)), path}:
                    stale.unlink(missing_ok=True)
                raise
            except OSError as error:
                raise system_error(error, path) from None
        if not self._offline:
            self._remember_revision()

    def _open_cached(self, path: Path, shown: str, entry: Entry) -> LocalFile:
        try:
            file = LocalFile(Path(os.path.realpath(path)), shown)
        except OSError as error:
            raise system_error(error, path) from None
        if file.stamp.size != entry.size:
            file.close()
            raise CorruptInputError(
                f"has {file.stamp.size} bytes in the cache and {entry.size} on the hub",
                file=shown,
                remedy=f"remove {path} (`hf cache verify` finds what is damaged)",
            )
        # A blob is named by its content; when it was written says nothing.
        file.stamp = Stamp(file.stamp.size, 0, entry.digest)
        return file

    def _cached_listing(self, shown: str) -> hub_client.Listing:
        """List what the cache has of the revision."""
        directory = hub_client.repository_directory(self._repo)
        commit = self._revision or "main"
        with suppress(OSError, UnicodeDecodeError):
            commit = (directory / "refs" / commit).read_text().strip()
        snapshot = directory / "snapshots" / commit
        if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
            raise RemoteError(
                "is not in the cache, and the hub is switched off (HF_HUB_OFFLINE)",
                file=shown,
                remedy="run once without HF_HUB_OFFLINE, or name a commit that is there",
            )
        files = {}
        for name in LocalFolder(snapshot).names():
            blob = Path(os.path.realpath(snapshot / name))
            if blob.is_file():  # a link may point to a blob that is gone
                digest = blob.name if blob.parent.name == "blobs" else ""
                files[name] = Entry(blob.stat().st_size, digest)
        return hub_client.Listing(commit, files)

    def _remember_revision(self) -> None:
        """Note in the cache which commit the revision was, for HF_HUB_OFFLINE to find."""
        revision = self._revision or "main"
        if COMMIT.fullmatch(revision):
            return
        path = hub_client.repository_directory(self._repo) / "refs" / revision
        with suppress(OSError):  # a cache that cannot be written is as good for this run
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._commit)


class HubFile:
    """One file on the hub, read by ranges."""

    def __init__(self, repo: str, commit: str, name: str, entry: Entry) -> None:
        """Ask for nothing yet."""
        self.path = f"{repo}@{commit}/{name}"
        self.stamp = Stamp(entry.size, 0, entry.digest)
        self._named = (repo, commit, name, entry.size)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            RemoteError: The hub does not give the bytes.
        """
        if buffer:
            hub_client.read_range(*self._named, buffer, offset)

    def close(self) -> None:
        """Do nothing: every read is a request of its own."""


def _check_id(named: HubId, shown: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # lazily there

    try:
        validate_repo_id(named.repo)
        valid = not {"", ".", ".."} & set((named.revision or "main").split("/"))
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(
            "is neither a directory nor a hub id",
            file=shown,
            remedy="name a checkpoint directory, or ORG/NAME or ORG/NAME@REVISION on a hub",
        )


def _check_name(name: str, shown: str) -> None:
    if {"", ".", ".."} & set(name.split("/")) or any(odd in name for odd in "\\\0"):
        raise UnsafeInputError(
            f"has a file named '{name}', which leaves the repository",
            file=shown,
            remedy="do not trust this repository",
        )


def _require_intact(path: Path, entry: Entry, shown: str) -> None:
    """Hold a file that was just downloaded against what the hub says of it."""
    size = path.stat().st_size
    if size != entry.size:
        raise RemoteError(
            f"arrived with {size} bytes, the hub's list says {entry.size}",
            file=shown,
            remedy="run the same command again",
        )
    large = len(entry.digest) == _SHA256_DIGITS
    # Git hashes a small file behind a line with its kind and length.
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    if entry.digest not in ("", digest.hexdigest()):
        raise CorruptInputError(
            "arrived with the right size and wrong bytes; it was removed from the cache",
            file=shown,
            remedy="run the same command again",
        )
