"""A prepared merge, done: shards, what stands beside them, and the publishing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from uipe_merge.errors import CorruptInputError, NumericError, OutputError, listed
from uipe_merge.fetching import fetch
from uipe_merge.finishing import results, write_rest
from uipe_merge.job import Job, identity, require_room
from uipe_merge.output.lock import hold, tidy
from uipe_merge.report import MergeReport
from uipe_merge.settling import settle

if TYPE_CHECKING:
    from uipe_merge.executors import Executor
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.progress import Progress


def run(job: Job, executor: Executor, filesystem: FileSystem, progress: Progress) -> MergeReport:
    """Do a prepared merge, or what an interrupted run left of it, and publish the output.

    Args:
        job: The merge.
        executor: On what the blocks run.
        filesystem: Through what everything is written.
        progress: Told of every block.

    Raises:
        NumericError: A value is not finite, or would not be.
        CorruptInputError: An input changed or ended early.
        OutputError: The disk refused something, or another command's run is in the way.
        OutputLockedError: Another run is writing this output.
        RemoteError: What has to be downloaded first cannot be had.
    """
    from uipe_merge.engine import require_unchanged, write_shards  # imports numpy

    began = time.monotonic()
    staging = job.staging(filesystem)
    try:
        require_room(job)
    except OutputError:
        tidy(staging.partial)
        raise
    fetch(job.wanted, job.pair)
    own = identity(job)
    staging.prepare()
    with hold(staging.partial):
        if staging.was_published(own):
            records = staging.journal.shards()
            resumed = len(records)
            settled = settle(job, staging.measured, filesystem, executor, progress)
            staging.settle()
        else:
            staging.restore()
            staging.require_replaceable(job.named, overwrite=job.overwrite)
            staging.begin(own, overwrite=job.overwrite)
            resumed = len(staging.done)
            try:
                settled = settle(job, staging.measured, filesystem, executor, progress)
                [records] = write_shards(
                    [settled.plan],
                    settled.pair,
                    [staging],
                    filesystem,
                    executor,
                    progress,
                    block=job.block,
                    device=job.device,
                )
                require_unchanged(job.pair)
            except (NumericError, CorruptInputError):
                staging.discard()  # it would fail again: there is nothing to go on with
                raise
            finally:
                progress.close()
            write_rest(job, settled, staging, filesystem, records)
            staging.publish(overwrite=job.overwrite)
    summary, tensors, groups = results(settled, records)
    return MergeReport(
        output=job.output if job.folder is None else job.folder.location,
        summary=summary,
        tensors=tensors,
        warnings=[*job.plan.warnings, *_kept_warnings(tensors), *summary.warnings()],
        written=job.plan.write_bytes,
        seconds=time.monotonic() - began,
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
