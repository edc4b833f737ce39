"""Whole shards, made by workers in processes of their own, perhaps on other machines.

The one who spreads them plans, holds the lock, keeps the journal and publishes. A worker makes a
shard under a name that no other attempt has, so that one that was given up for dead and comes
back can overwrite nothing; only what a worker reports as done is taken.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.engine import kept_records, write_shards
from uipe_merge.errors import OutputError
from uipe_merge.executors import make_executor
from uipe_merge.output.staging import ATTEMPTS
from uipe_merge.plan import BLOCK, Plan
from uipe_merge.progress import Silent
from uipe_merge.reader import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.checkpoint.storage import Stamp
    from uipe_merge.executors import Executor
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.journal import ShardRecord
    from uipe_merge.output.staging import Staging
    from uipe_merge.progress import Progress

THREADS = 2
"""Threads of a worker: one computes while the other waits for the disk."""


class Parcel(NamedTuple):
    """One shard to be made.

    Attributes:
        variants: Of which plans; one that an earlier run finished is left out.
        plans: These plans, with this shard alone.
    """

    variants: list[int]
    plans: list[Plan]


class Made(NamedTuple):
    """One shard of one plan, durable.

    Attributes:
        variant: Of which plan.
        token: The name of the attempt.
        record: The shard.
        stamp: Its version in an object store.
    """

    variant: int
    token: str
    record: ShardRecord
    stamp: Stamp | None


class ShardWorker:
    """Makes shards, one after the other."""

    def __init__(
        self,
        pair: Pair,
        stagings: Sequence[Staging],
        filesystem: FileSystem,
        block: int = BLOCK,
    ) -> None:
        """Open nothing yet; see ``spread_shards``."""
        self._pair = pair
        self._stagings = stagings
        self._filesystem = filesystem
        self._block = block

    def __call__(self, parcel: Parcel) -> list[Made]:
        """Make one shard of every plan that lacks it.

        Raises:
            UipeMergeError: As ``engine.write_shards``.
        """
        token = secrets.token_hex(8)
        attempts = [self._stagings[variant].attempt(token) for variant in parcel.variants]
        try:
            for attempt in attempts:
                attempt.open()
            written = write_shards(
                parcel.plans,
                self._pair,
                attempts,
                self._filesystem,
                make_executor(THREADS),
                Silent(),
                block=self._block,
            )
        except BaseException:
            for attempt in attempts:
                with suppress(OutputError):  # what made it fail is the error to report
                    self._filesystem.remove_tree(attempt.partial)
            raise
        made = []
        for variant, attempt, records in zip(parcel.variants, attempts, written, strict=True):
            [record] = records.values()
            stamp = attempt.delivered(record.name)
            if stamp is not None:  # nothing is left here that anybody could want
                self._filesystem.remove_tree(attempt.partial)
            made.append(Made(variant, token, record, stamp))
        return made

    def close(self) -> None:
        """Nothing is held open."""


def spread_shards(
    plans: Sequence[Plan],
    pair: Pair,
    stagings: Sequence[Staging],
    filesystem: FileSystem,
    executor: Executor,
    progress: Progress,
    *,
    block: int = BLOCK,
) -> list[dict[str, ShardRecord]]:
    """Write every shard that an earlier run did not finish; as ``engine.write_shards``.

    ``executor`` runs a worker a shard, and may run it in another process: what it is given can
    be pickled. Where it does so on another machine, inputs and output must be seen there by the
    same names.
    """
    records = kept_records(plans, stagings, progress)
    make_worker = partial(ShardWorker, _slim(pair), stagings, filesystem, block)
    results = executor.run(make_worker, _parcels(plans, stagings))
    try:
        for result in results:
            for variant, token, record, stamp in result:
                staging = stagings[variant]
                staging.accept(token, record, stamp)
                staging.journal.finish_shard(record)
                records[variant][record.name] = record
                progress.advance(record.size, record.name)
    finally:
        results.close()
        for staging in stagings:
            with suppress(OutputError):  # a worker that is about to be stopped may still write
                filesystem.remove_tree(staging.partial / ATTEMPTS)
    return records


def _parcels(plans: Sequence[Plan], stagings: Sequence[Staging]) -> Iterator[Parcel]:
    for index, shard in enumerate(plans[0].shards):
        lacking = [
            variant for variant, staging in enumerate(stagings) if shard.name not in staging.done
        ]
        if lacking:
            cut = [plans[each]._replace(shards=[plans[each].shards[index]]) for each in lacking]
            yield Parcel(lacking, cut)


def _slim(pair: Pair) -> Pair:
    """Return a pair without what only planning needs."""
    original, unlearned, *further = map(_slim_checkpoint, pair.sides)
    return Pair(original, unlearned, tuple(further))


def _slim_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint._replace(names=[], tensors={}, config={}, warnings=[], adapter=None)
