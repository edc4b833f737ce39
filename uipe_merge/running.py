"""A prepared merge, done: shards, what stands beside them, and the publishing."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from uipe_merge.computing import torch_threads_kept
from uipe_merge.errors import CorruptInputError, NumericError, OutputError, listed
from uipe_merge.fetching import fetch
from uipe_merge.finishing import results, write_rest
from uipe_merge.job import Job, identity, require_room
from uipe_merge.output.lock import hold, tidy
from uipe_merge.report import MergeReport
from uipe_merge.settling import Settled, settle_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.executors import Executor
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.journal import ShardRecord
    from uipe_merge.output.staging import Staging
    from uipe_merge.progress import Progress


def run(
    job: Job,
    executor: Executor,
    filesystem: FileSystem,
    progress: Progress,
    cluster: Executor | None = None,
) -> MergeReport:
    """Do a prepared merge, or what an interrupted run left of it, and publish the output.

    Args:
        job: The merge.
        executor: On what the blocks run.
        filesystem: Through what everything is written.
        progress: Told of every block.
        cluster: On what whole shards are made instead, in other processes.

    Raises:
        NumericError: A value is not finite, or would not be.
        CorruptInputError: An input changed or ended early.
        OutputError: The disk refused something, or another command's run is in the way.
        OutputLockedError: Another run is writing this output.
        RemoteError: What has to be downloaded first cannot be had.
    """
    [report] = run_all([job], executor, filesystem, progress, cluster)
    return report


@torch_threads_kept()
def run_all(
    jobs: Sequence[Job],
    executor: Executor,
    filesystem: FileSystem,
    progress: Progress,
    cluster: Executor | None = None,
) -> list[MergeReport]:
    """Do several merges of the same checkpoints, which are read once; as ``run``.

    The jobs differ in α and control alone, so that their shards are laid out alike.
    """
    began = time.monotonic()
    stagings = [job.staging(filesystem) for job in jobs]
    try:
        require_room(*jobs)
    except OutputError:
        for staging in stagings:
            tidy(staging.partial)
        raise
    for job in jobs:
        fetch(job.wanted, job.pair)
    with ExitStack() as locks:
        for staging in stagings:
            staging.prepare()
            locks.enter_context(hold(staging.partial))
        done, slow = _write_all(jobs, stagings, executor, filesystem, progress, cluster)
    return [
        report_of(job, *each, time.monotonic() - began, slow)
        for job, each in zip(jobs, done, strict=True)
    ]


def _write_all(
    jobs: Sequence[Job],
    stagings: Sequence[Staging],
    executor: Executor,
    filesystem: FileSystem,
    progress: Progress,
    cluster: Executor | None,
) -> tuple[list[tuple[Settled, dict[str, ShardRecord], int]], list[str]]:
    """Write and publish what is not published yet.

    Returns the steps, records and old shards of every job, and what to warn of.
    """
    from uipe_merge.engine import require_unchanged, write_shards  # imports numpy

    write = write_shards
    if cluster is not None:
        from uipe_merge.spreading import spread_shards as write
    owns = [identity(job) for job in jobs]
    published = [staging.was_published(own) for staging, own in zip(stagings, owns, strict=True)]
    todo = [number for number, there in enumerate(published) if not there]
    for number in todo:
        job, staging = jobs[number], stagings[number]
        staging.restore()
        staging.require_replaceable(job.named, overwrite=job.overwrite)
        staging.begin(owns[number], overwrite=job.overwrite)
    records = [staging.journal.shards() for staging in stagings]
    resumed = [
        len(kept if there else staging.done)
        for kept, staging, there in zip(records, stagings, published, strict=True)
    ]
    written: list[dict[str, ShardRecord]] = []
    slow: list[str] = []
    try:
        settled = settle_all(jobs, stagings[0].measured, filesystem, executor, progress)
        if todo:
            slow = _slower_device(jobs[0], executor)
            written = write(
                [settled[number].plan for number in todo],
                settled[-1].pair,
                [stagings[number] for number in todo],
                filesystem,
                cluster or executor,
                progress,
                block=jobs[0].block,
            )
            require_unchanged(jobs[0].pair)
    except (NumericError, CorruptInputError) as error:
        for number in todo:
            # It would fail again: there is nothing to go on with. What is done of others stays.
            alone = len(todo) == 1 or isinstance(error, CorruptInputError)
            if alone or not stagings[number].journal.shards():
                stagings[number].discard()
        raise
    finally:
        progress.close()
    for number, found in zip(todo, written, strict=True):
        records[number] = found
        write_rest(jobs[number], settled[number], stagings[number], filesystem, found)
    # Of the first in whose directory all of them were measured the journal goes last.
    for number in reversed(range(len(jobs))):
        if published[number]:
            stagings[number].settle()
        else:
            stagings[number].publish(overwrite=jobs[number].overwrite)
    return list(zip(settled, records, resumed, strict=True)), slow


def _slower_device(job: Job, executor: Executor) -> list[str]:
    """Say so if the device that finds singular vectors is slower than the processor."""
    if job.device == "cpu" or not job.plan.recipe.steering.low_rank:
        return []
    from uipe_merge.matrices import compare  # imports torch

    found = compare(job.plan, job.pair, job.device, executor.width)
    return [] if found is None else [found]


def report_of(
    job: Job,
    settled: Settled,
    records: dict[str, ShardRecord],
    resumed: int,
    seconds: float,
    seen: Sequence[str] = (),
) -> MergeReport:
    """Return the report of a published merge; ``seen`` is what the run itself has to warn of."""
    summary, tensors, groups = results(settled, records)
    return MergeReport(
        output=job.output if job.folder is None else job.folder.location,
        summary=summary,
        tensors=tensors,
        warnings=[*job.plan.warnings, *seen, *_kept_warnings(tensors), *summary.warnings()],
        written=job.plan.write_bytes,
        seconds=seconds,
        resumed=resumed,
        groups=groups,
    )


def _kept_warnings(tensors: dict[str, dict[str, object]]) -> list[str]:
    differing = [name for name, record in tensors.items() if record.get("share_differing")]
    if not differing:
        return []
    return [
        (
            f"integer tensors differ between the checkpoints, the unlearned ones were kept: "
            f"{listed(differing)}"
        )
    ]
