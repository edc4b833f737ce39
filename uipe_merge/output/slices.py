"""The slices of one output in its partial directory, made by processes that share nothing else.

::

    .NAME.uipe-partial/
        lock              held while the run is begun, and while it is published
        model/            the shards of all slices
        slices/run        what the run is: no slice of another one is let in
        slices/recipe.yaml
        slices/3-of-16/   of one slice: its lock, its journal, the shards that it has in hand

A slice makes each shard in a directory of this attempt's own and moves it to the others when it
is durable, so that an attempt that was given up for dead can overwrite nothing.
"""

from __future__ import annotations

import re
import secrets
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import OutputError, OutputLockedError, UsageError
from uipe_merge.output.filesystem import write_document
from uipe_merge.output.journal import Journal, ShardRecord, differing
from uipe_merge.output.lock import hold
from uipe_merge.output.staging import SLICES, Staging

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from uipe_merge.output.filesystem import FileSystem

MOST_SLICES = 100_000

_BEGINNING = 10.0  # seconds that another slice may take to say what the run is
_WAIT = 0.1
_REQUEST = "request"


class Slice(NamedTuple):
    """One of the slices of a run.

    Attributes:
        number: Which, from 1.
        total: Of how many.
    """

    number: int
    total: int

    @property
    def text(self) -> str:
        """The slice as the command line takes it."""
        return f"{self.number}/{self.total}"


def parse_slice(text: str) -> Slice:
    """Return what ``i/N`` says.

    Raises:
        UsageError: It is no slice.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, total = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= total <= MOST_SLICES:
        raise UsageError(
            f"'{text}' is no slice", remedy="name one of N slices as i/N, from 1/N to N/N"
        )
    return Slice(number, total)


class SliceStaging(Staging):
    """What one slice makes of an output. It is never published by itself; see ``Staging``."""

    def __init__(self, filesystem: FileSystem, whole: Staging, part: Slice) -> None:
        """Name the paths; nothing is touched yet."""
        directory = whole.partial / SLICES / f"{part.number}-of-{part.total}"
        super().__init__(filesystem, whole.output, directory)
        self.model = directory / f"model.{secrets.token_hex(4)}"
        self.measured = whole.measured
        self._whole = whole

    def shard(self, name: str) -> Path:
        """Return where a finished shard lies: with those of all slices."""
        return self._whole.model / name

    def begin(self, identity: dict[str, object], *, overwrite: bool = False) -> None:
        """Resume the slice: shards that an earlier attempt finished are hashed again.

        Raises:
            OutputError: The file system refuses something.
        """
        del overwrite  # what is at the output matters when it is published
        self.clear()
        for directory in (self._whole.model, self.model):
            self._filesystem.make_directory(directory)
        for directory in (self._whole.partial, self.partial.parent, self.partial):
            self._filesystem.sync_directory(directory)
        self.done = self._verified() if self.journal.identity() == identity else {}
        self.journal.begin(identity, self.done.values())

    def deliver(self, name: str, sha256: str) -> None:
        """Move a shard that is durable to those of the other slices."""
        del sha256
        self._filesystem.rename(self.model / name, self.shard(name))
        self._filesystem.sync_directory(self._whole.model)

    def clear(self) -> None:
        """Remove what attempts have left in hand."""
        if self.partial.is_dir():
            for entry in sorted(self.partial.glob("model.*")):
                self._filesystem.remove_tree(entry)


class Slices:
    """All slices of one output."""

    def __init__(self, filesystem: FileSystem, whole: Staging) -> None:
        """Name the paths; nothing is touched yet."""
        self._filesystem = filesystem
        self._whole = whole
        self.directory = whole.partial / SLICES
        self.recipe = self.directory / "recipe.yaml"
        self._run = Journal(filesystem, self.directory / "run")

    def begun(self) -> dict[str, object] | None:
        """Return what the run is that was begun; ``None`` where there is none."""
        return self._run.identity()

    def request(self) -> dict[str, object] | None:
        """Return with what arguments it was begun."""
        request = (self.begun() or {}).get(_REQUEST)
        return request if isinstance(request, dict) else None

    def enter(self, identity: dict[str, object], request: dict[str, object], recipe: str) -> None:
        """Join the run, or begin it.

        Args:
            identity: What all of its slices must have in common.
            request: The arguments, for ``finish``.
            recipe: The recipe as YAML, for ``finish``.

        Raises:
            OutputError: Another run is there, in slices or whole.
            OutputLockedError: A run that is not in slices is writing this output.
        """
        end = time.monotonic() + _BEGINNING
        while self.begun() is None:
            try:
                with hold(self._whole.partial):
                    if self.begun() is None:
                        self._begin({**identity, _REQUEST: request}, recipe)
            except OutputLockedError:  # by a slice that begins it, or by another run
                if time.monotonic() > end:
                    raise
                time.sleep(_WAIT)
        self.require_own(identity)

    def require_own(self, identity: dict[str, object]) -> None:
        """Refuse a run of which this is no slice.

        Raises:
            OutputError: Another run is there, in slices or whole; names what differs.
        """
        begun = self.begun()
        if begun is None:
            if self._whole.journal.identity() is not None:
                raise OutputError(
                    "holds an unfinished run that is not in slices",
                    file=self._whole.partial,
                    remedy="run the command that began it, or remove it when that does not run",
                )
            return
        begun = {name: value for name, value in begun.items() if name != _REQUEST}
        if fields := differing(begun, identity):
            raise OutputError(
                f"holds the slices of another run, which differs in {', '.join(fields)}",
                file=self._whole.partial,
                remedy="run the slices of that one, or remove it when none of them runs",
            )

    def records(self) -> dict[str, ShardRecord]:
        """Return the record of every shard that a slice finished and that is there, in its size."""
        found: dict[str, ShardRecord] = {}
        for path in sorted(self.directory.glob("*-of-*/journal")):
            for name, record in Journal(self._filesystem, path).shards().items():
                file = self._whole.model / name
                if file.is_file() and file.stat().st_size == record.size:
                    found[name] = record
        return found

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Keep every slice from running while the body does.

        Raises:
            OutputLockedError: One is running.
        """
        with ExitStack() as locks:
            for directory in sorted(self.directory.glob("*-of-*")):
                locks.enter_context(hold(directory))
            yield

    def _begin(self, document: dict[str, object], recipe: str) -> None:
        self.require_own({})
        self._filesystem.make_directory(self.directory)
        write_document(self._filesystem, self.recipe, recipe.encode())
        self._run.begin(document, [])
        self._filesystem.sync_directory(self._whole.partial)
