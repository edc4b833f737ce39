"""What has to be downloaded before a plan can run, and downloading it.

Planning reads headers wherever they are. Only a run needs whole files: those weights that
the plan reads, the sidecars, and the documents that planning read, so that the same command
can be planned again from the cache alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.adapter import CONFIG_NAME
from uipe_merge.checkpoint.header import ZERO, read_header
from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.errors import CorruptInputError, OutputError
from uipe_merge.output import place
from uipe_merge.output.card import CARD_NAME
from uipe_merge.reader import owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.checkpoint.model import ShardInput
    from uipe_merge.checkpoint.storage import Folder
    from uipe_merge.output.sidecars import Sidecar
    from uipe_merge.plan import Plan
    from uipe_merge.reader import Pair

_DOCUMENTS = frozenset(["config.json", CONFIG_NAME, INDEX_NAME, CARD_NAME])


class Wanted(NamedTuple):
    """Files of one folder that a run reads whole.

    Attributes:
        folder: The folder.
        weights: Names of its weight files.
        others: Names of its sidecars and documents.
    """

    folder: Folder
    weights: set[str]
    others: set[str]

    @property
    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted(self.weights | self.others)


def wanted(plan: Plan, pair: Pair, sidecars: Iterable[Sidecar] = ()) -> list[Wanted]:
    """Return what a run of ``plan`` reads, folder by folder; nothing where all is here."""
    folders = [folder for checkpoint in pair.sides for folder in checkpoint.folders.values()]
    if all(isinstance(folder, LocalFolder) for folder in folders):
        return []
    found: dict[str, Wanted] = {}

    def of(folder: Folder) -> Wanted:
        return found.setdefault(folder.location, Wanted(folder, set(), set()))

    for step in plan.steps:
        for side, spec, _ in step.sides:
            for stored in _stored(spec):
                at, home = owner(stored, side)
                of(pair.sides[at].folders[home]).weights.add(stored.file)
    for checkpoint in pair.sides:
        for folder in checkpoint.folders.values():
            of(folder).others.update(_DOCUMENTS.intersection(folder.names()))
    for sidecar in sidecars:
        of(sidecar.folder).others.add(sidecar.source)
    return list(found.values())


def download_bytes(everything: Iterable[Wanted]) -> int:
    """Return how much of it would have to be downloaded."""
    return sum(each.folder.absent(each.names).nbytes for each in everything)


def require_room(everything: Iterable[Wanted], output: Path | None, needed: int) -> None:
    """Refuse downloads that do not fit on their disk.

    Args:
        everything: From ``wanted``.
        output: The directory that the output will be in, if there is one.
        needed: What the output takes, which counts where it is on the same disk.

    Raises:
        OutputError: Too few bytes are free.
    """
    absent = [each.folder.absent(each.names) for each in everything]
    for directory in {each.directory for each in absent if each.names}:
        nbytes = sum(each.nbytes for each in absent if each.directory == directory)
        existing = place.existing(Path(directory))
        if output is not None and output.stat().st_dev == existing.stat().st_dev:
            nbytes += needed
        free = place.measure(existing, nbytes, 0).free
        if free is not None and nbytes > free:
            raise OutputError(
                f"needs {nbytes} bytes for what has to be downloaded, {free} are free",
                file=directory,
                remedy="free some disk space, or set HF_HUB_CACHE to where there is more",
            )


def fetch(everything: Iterable[Wanted], pair: Pair) -> None:
    """Download what is absent, and see that the weights are those that were planned with.

    Raises:
        RemoteError: A file cannot be had.
        CorruptInputError: One did not arrive as it is on the hub.
        OutputError: The disk refuses it.
    """
    shards = {
        (checkpoint.folders[shard.home].location, shard.name): shard
        for checkpoint in pair.sides
        for shard in checkpoint.shards
    }
    for each in everything:
        absent = each.folder.absent(each.names).names
        each.folder.fetch(each.names)
        for name in each.weights.intersection(absent):
            _require_header(each.folder, shards[each.folder.location, name])


def _require_header(folder: Folder, shard: ShardInput) -> None:
    file = folder.open_file(shard.name)
    try:
        if read_header(file, shard.name).sha256 != shard.header_sha256:
            raise CorruptInputError(
                "has another header than the one that was read before the download",
                file=file.path,
                remedy="run the same command again",
            )
    finally:
        file.close()


def _stored(spec: TensorSpec) -> Iterator[TensorSpec]:
    """Yield the tensors of files that one tensor is made of, factors and scales included."""
    if spec.home != ZERO:
        yield from spec.pieces or (spec,)
    for factor in spec.factors:
        yield from factor.tensors
    if spec.scales is not None:
        yield spec.scales.values
