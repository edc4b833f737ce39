"""Runs a plan: blocks through workers, shards to the disk, sums back to the report."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from uipe_merge.cutting import Block, blocks
from uipe_merge.errors import OutputError
from uipe_merge.once import Once
from uipe_merge.output.journal import ShardRecord
from uipe_merge.output.shard import ShardAborted, ShardWriter
from uipe_merge.plan import BLOCK, Plan
from uipe_merge.reader import check_stamp
from uipe_merge.report import Sums, sums_of
from uipe_merge.worker import BlockResult, MergeWorker, Written

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uipe_merge.deltas import Growths
    from uipe_merge.executors import Executor
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.staging import Staging
    from uipe_merge.plan import Step
    from uipe_merge.progress import Progress
    from uipe_merge.reader import Pair


def write_shards(
    plans: Sequence[Plan],
    pair: Pair,
    stagings: Sequence[Staging],
    filesystem: FileSystem,
    executor: Executor,
    progress: Progress,
    *,
    block: int = BLOCK,
) -> list[dict[str, ShardRecord]]:
    """Write every shard that an earlier run did not finish; return the record of all, by plan.

    Args:
        plans: What to do. Several have the same shards and tensors and differ in coefficients
            and operations: a block is read once for all of them.
        pair: Where to read.
        stagings: Where to write, begun; one for each plan.
        filesystem: How to write.
        executor: On what to run.
        progress: Told of every block.
        block: Elements read at a time, a multiple of ``plan.CELL``. Changes no byte.

    Raises:
        NumericError: A value is not finite, or would not be.
        CorruptInputError: An input changed or ended early.
        OutputError: The disk refused something.
    """
    records = kept_records(plans, stagings, progress)
    desk = _Desk(plans, pair, stagings, filesystem, block)
    gathered = {
        (variant, index): _Gathered(plan.shards[index].steps)
        for index in desk.todo
        for variant, plan in enumerate(plans)
        if plan.shards[index].name not in stagings[variant].done
    }
    abreast = min(executor.width, *(staging.most_at_once - 1 for staging in stagings))
    results = executor.run(desk.make_worker, blocks(plans, desk.todo, abreast, block))
    try:
        for result in results:
            done = result.block
            for written in result.written:
                shard = plans[written.variant].shards[done.shard]
                progress.advance(done.elements * shard.steps[done.step].dtype.bits // 8, shard.name)
                shelf = gathered[written.variant, done.shard]
                shelf.add(done, written)
                if shelf.complete:
                    record = ShardRecord(shard.name, shard.size, shelf.sha256, shelf.moments())
                    stagings[written.variant].journal.finish_shard(record)
                    records[written.variant][shard.name] = record
                    del gathered[written.variant, done.shard]
    except BaseException as error:
        desk.fail(error)
        raise
    finally:
        results.close()
        desk.close()
    return records


def kept_records(
    plans: Sequence[Plan], stagings: Sequence[Staging], progress: Progress
) -> list[dict[str, ShardRecord]]:
    """Begin the progress with the shards that an earlier run finished; return these, by plan."""
    records = [dict(staging.done) for staging in stagings]
    progress.start(sum(plan.write_bytes for plan in plans))
    for record in (record for done in records for record in done.values()):
        progress.advance(record.size, record.name)
    return records


def require_unchanged(pair: Pair) -> None:
    """Refuse to publish what was made from inputs that changed meanwhile.

    Raises:
        CorruptInputError: A weight file has another size or modification time than when its
            header was read.
    """
    for checkpoint in pair.sides:
        for shard in checkpoint.shards:
            file = checkpoint.folders[shard.home].open_file(shard.name)
            try:
                check_stamp(file, shard.stamp)
            finally:
                file.close()


class _Desk:
    """Hands out workers and shard writers, and stops all of them when one fails."""

    def __init__(
        self,
        plans: Sequence[Plan],
        pair: Pair,
        stagings: Sequence[Staging],
        filesystem: FileSystem,
        block: int,
    ) -> None:
        self._plans = plans
        self._pair = pair
        self._stagings = stagings
        self._filesystem = filesystem
        self._block = block
        self._growths: Growths = Once()
        self._changed = threading.Condition()
        self._writers: dict[int, list[tuple[int, ShardWriter]]] = {}
        self._failure: BaseException | None = None
        self.todo = [index for index in range(len(plans[0].shards)) if self._lacking(index)]

    def make_worker(self) -> _GuardedWorker:
        """Make the worker of one thread."""
        shared = (self._plans, self._pair, self.writers, self._growths)
        return _GuardedWorker(MergeWorker(*shared, self._block), self)

    def writers(self, index: int) -> list[tuple[int, ShardWriter]]:
        """Return the writers of a shard and whose they are, begun by whoever comes first.

        A new shard waits while as many as there is room for are being written or delivered. Of
        those one more than stand abreast may be in hand, so somebody always can go on.
        """
        most = min(staging.most_at_once for staging in self._stagings)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._failure is not None or index in self._writers or len(self._writers) < most
                )
            )
            if self._failure is not None:
                raise ShardAborted
            if index not in self._writers:
                begun: list[tuple[int, ShardWriter]] = []
                self._writers[index] = begun  # what fails on the way is closed with the others
                for variant in self._lacking(index):
                    shard = self._plans[variant].shards[index]
                    path = self._stagings[variant].model / shard.name
                    begun.append((variant, ShardWriter(self._filesystem, path, shard.header)))
            return self._writers[index]

    def finished(self, index: int, written: Sequence[Written]) -> None:
        """Deliver a shard that is durable, and forget its writers."""
        for variant, _, sha256 in written:
            if sha256 is not None:
                name = self._plans[variant].shards[index].name
                self._stagings[variant].deliver(name, sha256)
        with self._changed:
            del self._writers[index]
            self._changed.notify_all()

    def _lacking(self, index: int) -> list[int]:
        """Return the plans whose shard an earlier run did not finish."""
        return [
            variant
            for variant, plan in enumerate(self._plans)
            if plan.shards[index].name not in self._stagings[variant].done
        ]

    def fail(self, error: BaseException) -> BaseException:
        """Stop everybody; return the first failure, which is the one to report."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
            for writer in self._everybody():
                writer.abort()
            return self._failure

    def close(self) -> None:
        """Close the files of shards that were not finished, when all workers have ended."""
        for writer in self._everybody():
            with suppress(OutputError):  # what made the run fail is the error to report
                writer.close()

    def _everybody(self) -> Iterator[ShardWriter]:
        return (writer for shard in self._writers.values() for _, writer in shard)


class _GuardedWorker:
    """A worker that tells the desk when it fails, so that no other waits for it."""

    def __init__(self, worker: MergeWorker, desk: _Desk) -> None:
        self._worker = worker
        self._desk = desk

    def __call__(self, block: Block) -> BlockResult:
        try:
            result = self._worker(block)
            if block.last:
                self._desk.finished(block.shard, result.written)
        except BaseException as error:  # noqa: BLE001 - raised again, the first one
            raise self._desk.fail(error) from None
        return result

    def close(self) -> None:
        self._worker.close()


class _Gathered:
    """The results of one shard as they come, in any order."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._missing = {index: max(step.elements, 1) for index, step in enumerate(steps)}
        self._cells: dict[int, list[Sums]] = {}
        self._sums: list[Sums | None] = [None] * len(steps)
        self.sha256 = ""

    @property
    def complete(self) -> bool:
        """Whether every block came back."""
        return not self._missing

    def add(self, block: Block, written: Written) -> None:
        """Take a block's result; a tensor that is whole is reduced to its sums."""
        index = block.step
        self.sha256 = written.sha256 or self.sha256
        if written.sums:
            self._cells.setdefault(index, []).extend(Sums(*cell) for cell in written.sums)
        self._missing[index] -= max(block.elements, 1)
        if not self._missing[index]:
            del self._missing[index]
            self._sums[index] = sums_of(self._steps[index], self._cells.pop(index, []))

    def moments(self) -> list[list[float] | None]:
        """Return the sums of every tensor, in the order of the plan, for the journal."""
        return [None if sums is None else list(sums) for sums in self._sums]
