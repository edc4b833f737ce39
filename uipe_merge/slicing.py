"""A merge in slices: every process makes its share of the shards, the last one publishes.

The processes share the directory of the output and nothing else: they may run on other machines,
one after the other, or at once. What is published is byte for byte what one process would write.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import (
    CorruptInputError,
    NumericError,
    OutputError,
    OutputLockedError,
    UsageError,
    listed,
)
from uipe_merge.fetching import fetch
from uipe_merge.fetching import require_room as require_download_room
from uipe_merge.finishing import write_rest
from uipe_merge.job import Job, identity, prepare, run_digest
from uipe_merge.output import place
from uipe_merge.output.lock import hold
from uipe_merge.output.manifest import MANIFEST_NAME, is_whole, read_manifest
from uipe_merge.output.slices import Slice, Slices, SliceStaging
from uipe_merge.output.staging import SECTOR, Staging
from uipe_merge.recipe_file import read_recipe, write_recipe
from uipe_merge.running import report_of
from uipe_merge.settling import Settled, settle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.executors import Executor
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.journal import ShardRecord
    from uipe_merge.plan import Plan, Shard
    from uipe_merge.progress import Progress
    from uipe_merge.report import MergeReport

_MEASURING = 24 * 3600.0  # seconds that another slice may take to measure what all of them need
_PUBLISHING = 600.0  # seconds that another slice may take to publish


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What came of a slice, or of ``finish``.

    Attributes:
        output: The output.
        shards: Shards that it made.
        kept: Shards of it that an earlier attempt had made.
        written: Bytes of those that it made.
        seconds: Wall time.
        missing: How many shards are missing, by slice; those that run are among them.
        published: The report of the merge, if this process published it.
        elsewhere: Whether it is published, or will be, by another process.
    """

    output: Path
    shards: int = 0
    kept: int = 0
    written: int = 0
    seconds: float = 0.0
    missing: dict[str, int] = field(default_factory=dict)
    published: MergeReport | None = None
    elsewhere: bool = False


def divide(plan: Plan, count: int) -> list[list[int]]:
    """Divide the shards of a plan among ``count`` slices, by the bytes they read and write.

    The largest first, each to the slice that has least: the same division wherever it is made.
    With more slices than shards some have none.
    """
    sizes = [_cost(shard) for shard in plan.shards]
    slices: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        least = loads.index(min(loads))
        slices[least].append(index)
        loads[least] += sizes[index]
    return [sorted(indices) for indices in slices]


def require_sliceable(job: Job) -> None:
    """Refuse what cannot be made in slices.

    Raises:
        UsageError: The output is a URL: what its slices have done could not be seen from another
            machine.
    """
    if job.folder is not None:
        raise UsageError(
            "is a URL, and slices are made in a directory that all of them share",
            file=job.named,
            remedy="name a directory, or use --executor ray",
        )


def require_startable(job: Job, part: Slice, filesystem: FileSystem) -> None:
    """Refuse all that ``run_slice`` would refuse before it writes anything.

    Raises:
        UsageError: The output is a URL.
        OutputError: Something is at the output, another run is in the way, or there is no room.
    """
    require_sliceable(job)
    whole = job.staging(filesystem)
    Slices(filesystem, whole).require_own(_shared_identity(job, part.total))
    _require_room(job, whole)


def run_slice(
    job: Job, part: Slice, executor: Executor, filesystem: FileSystem, progress: Progress
) -> SliceReport:
    """Make the shards of one slice, or what an earlier attempt left of them; the last publishes.

    Raises:
        UsageError: The output is a URL.
        OutputLockedError: This very slice runs already, or another run is writing this output.
        UipeMergeError: As for ``running.run``.
    """
    from uipe_merge.engine import require_unchanged, write_shards  # imports numpy

    began = time.monotonic()
    require_sliceable(job)
    whole = job.staging(filesystem)
    if _is_published(job):
        return finish(job, part.total, executor, filesystem, progress)
    slices = Slices(filesystem, whole)
    _require_room(job, whole)
    fetch(job.wanted, job.pair)
    slices.enter(_shared_identity(job, part.total), _request(job), write_recipe(job.plan.recipe))
    staging = SliceStaging(filesystem, whole, part)
    indices = divide(job.plan, part.total)[part.number - 1]
    with hold(staging.partial):
        staging.begin({**_shared_identity(job, part.total), "slice": part.number})
        try:
            settled = _settle(job, whole, executor, filesystem, progress)
            plan = settled.plan._replace(shards=[settled.plan.shards[index] for index in indices])
            if indices:
                write_shards(
                    [plan],
                    settled.pair,
                    [staging],
                    filesystem,
                    executor,
                    progress,
                    block=job.block,
                )
                require_unchanged(job.pair)
        except (NumericError, CorruptInputError):
            staging.discard()  # it would fail again: there is nothing to go on with
            raise
        finally:
            progress.close()
            staging.clear()
    made = [shard.size for shard in plan.shards if shard.name not in staging.done]
    # The lock of this slice is free again: whoever publishes must know that nothing runs.
    report = finish(job, part.total, executor, filesystem, progress)
    return replace(
        report,
        shards=len(made),
        kept=len(staging.done),
        written=sum(made),
        seconds=time.monotonic() - began,
    )


def finish(
    job: Job, count: int, executor: Executor, filesystem: FileSystem, progress: Progress
) -> SliceReport:
    """Publish what the slices made, if they are all there.

    Args:
        job: The merge.
        count: How many slices there are.
        executor: On what is measured again what a steered recipe needs, where that was lost.
        filesystem: Through what everything is written.
        progress: Told of that measurement.

    Raises:
        UipeMergeError: As for ``running.run``.
    """
    began = time.monotonic()
    whole = job.staging(filesystem)
    slices = Slices(filesystem, whole)
    nothing = SliceReport(job.output)
    with hold(whole.partial, _PUBLISHING):
        own = identity(job)
        if whole.was_published(own):  # by a process that was killed before it had cleaned up
            whole.settle()
            return replace(nothing, elsewhere=True)
        if slices.begun() is None:
            if not _is_published(job):
                raise OutputError("what its slices had made was removed", file=job.named)
            return replace(nothing, elsewhere=True)
        slices.require_own(_shared_identity(job, count))
        if missing := _missing(job.plan, slices.records(), count):
            return replace(nothing, missing=missing)
        try:
            with slices.stopped():
                records = slices.records()
                if missing := _missing(job.plan, records, count):
                    return replace(nothing, missing=missing)
                settled = _publish(job, whole, records, executor, filesystem, progress)
        except OutputLockedError:  # a slice runs once more; it comes here when it has ended
            return replace(nothing, elsewhere=True)
    seconds = time.monotonic() - began
    return replace(nothing, published=report_of(job, settled, records, 0, seconds))


class Begun(NamedTuple):
    """A run in slices that was begun.

    Attributes:
        job: The merge.
        total: How many slices there are.
    """

    job: Job
    total: int


def find(output: str, filesystem: FileSystem) -> Begun | None:
    """Return the run in slices that makes ``output``; ``None`` where it is published already.

    Raises:
        UsageError: There is none, or it was begun in another directory with relative paths.
        UipeMergeError: As for ``job.prepare``: its inputs may have changed meanwhile.
    """
    path = Path(os.path.realpath(output))
    slices = Slices(filesystem, Staging(filesystem, path))
    begun, request = slices.begun(), slices.request()
    if begun is None or request is None:
        if (path / MANIFEST_NAME).is_file():
            return None
        raise UsageError(
            "is not being made in slices", file=output, remedy="name the output of a --slice run"
        )
    if request["directory"] not in ("", os.getcwd()):  # noqa: PTH109 - to be compared as text
        raise UsageError(
            "its slices were named by paths relative to another directory",
            file=output,
            remedy=f"run it in {request['directory']}",
        )
    job = prepare(
        str(request["original"]),
        str(request["unlearned"]),
        str(request["output"]),
        read_recipe(slices.recipe),
        overwrite=bool(request["overwrite"]),
        allow_pickle=bool(request["allow_pickle"]),
        dequantize=bool(request["dequantize"]),
        device=str(request["device"]),
    )
    return Begun(job, int(str(begun["slices"])))


def missing_error(report: SliceReport) -> OutputError:
    """Return the error for slices that are to be published and are not all there."""
    number = sum(report.missing.values())
    parts = [f"{count} of slice {name}" for name, count in report.missing.items()]
    return OutputError(
        f"{number} shards are missing: {listed(parts)}",
        file=report.output,
        remedy="run these slices again",
    )


def _settle(
    job: Job, whole: Staging, executor: Executor, filesystem: FileSystem, progress: Progress
) -> Settled:
    """Settle the plan; what has to be measured is measured once, by the slice that comes first."""
    if job.plan.directions is None:
        return settle(job, whole.measured, filesystem, executor, progress)
    filesystem.make_directory(whole.measured)
    with hold(whole.measured, _MEASURING):
        return settle(job, whole.measured, filesystem, executor, progress)


def _publish(
    job: Job,
    whole: Staging,
    records: dict[str, ShardRecord],
    executor: Executor,
    filesystem: FileSystem,
    progress: Progress,
) -> Settled:
    from uipe_merge.engine import require_unchanged  # imports numpy

    whole.restore()
    whole.require_replaceable(job.named, overwrite=job.overwrite)
    whole.adopt(identity(job), records)
    settled = _settle(job, whole, executor, filesystem, progress)
    progress.close()
    require_unchanged(job.pair)
    write_rest(job, settled, whole, filesystem, records)
    whole.publish(overwrite=job.overwrite)
    return settled


def _missing(plan: Plan, records: dict[str, ShardRecord], count: int) -> dict[str, int]:
    """Return how many shards each slice lacks, of those that lack any."""
    missing: dict[str, int] = {}
    for number, indices in enumerate(divide(plan, count), 1):
        if lacking := sum(plan.shards[index].name not in records for index in indices):
            missing[Slice(number, count).text] = lacking
    return missing


def _shared_identity(job: Job, count: int) -> dict[str, object]:
    """Return what a slice must have in common with the others."""
    return {**identity(job), "slices": count, "overwrite": job.overwrite}


def _request(job: Job) -> dict[str, object]:
    """Return the arguments of a job, for ``finish``."""
    inputs = [
        path for name in (*job.arguments, *job.names.values()) if (path := Path(name)).exists()
    ]
    local = not all(path.is_absolute() for path in (Path(job.named), *inputs))
    return {
        "original": job.arguments[0],
        "unlearned": job.arguments[1],
        "output": job.named,
        "overwrite": job.overwrite,
        "allow_pickle": job.pickled,
        "dequantize": job.quantised,
        "device": job.device,
        # Relative names mean something only where they were written.
        "directory": os.getcwd() if local else "",  # noqa: PTH109 - to be compared as text
    }


def _is_published(job: Job) -> bool:
    """Tell whether this very merge is at the output, whole."""
    if not (job.output / MANIFEST_NAME).is_file():
        return False
    try:
        manifest, files = read_manifest(job.output)
    except CorruptInputError:
        return False
    return manifest.get("run") == run_digest(job) and is_whole(job.output, files)


def _require_room(job: Job, whole: Staging) -> None:
    """Refuse what could not be published, or does not fit: what all slices have is there already.

    Raises:
        OutputError: As for ``job.require_room``.
    """
    whole.require_replaceable(job.named, overwrite=job.overwrite)
    held = _bytes_below(whole.partial.rglob("*"))
    needed = max(job.space.needed + job.beside - held, 0)
    parent = place.existing(job.output.parent)
    largest = max(shard.size for shard in job.plan.shards)
    place.require(job.space._replace(needed=needed), parent, largest)
    require_download_room(job.wanted, parent, needed)


def _bytes_below(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.lstat().st_blocks * SECTOR
        except FileNotFoundError:  # another slice has just moved it
            continue
    return total


def _cost(shard: Shard) -> int:
    return shard.size + sum(spec.nbytes for step in shard.steps for spec in step.specs)
