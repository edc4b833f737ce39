"""A plan, cut into blocks: the units of work, in the order in which they are handed out."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.plan import BLOCK, Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from uipe_merge.plan import Step


class Block(NamedTuple):
    """A piece of a tensor: the unit of work.

    Attributes:
        shard: Index of the shard in the plan.
        step: Index of the step in the shard.
        start: First element.
        elements: Number of elements.
        sequence: Position of the block in its shard, from 0.
        last: Whether it is the last of its shard.
    """

    shard: int
    step: int
    start: int
    elements: int
    sequence: int
    last: bool


def ranges(steps: Sequence[Step], size: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor into ``(first element, elements)`` of at most ``size``, each in one piece.

    ``steps`` are what is done with it; all that they read is in one piece of a file.
    """
    seams = {seam for step in steps for spec in step.specs for seam in spec.seams()}
    elements = steps[0].elements
    for begin, end in pairwise([*sorted(seams), elements]):
        for start in range(begin, max(end, begin + 1), size):
            yield start, min(size, end - start)


def shard_blocks(plans: Sequence[Plan], shard: int, size: int = BLOCK) -> Iterator[Block]:
    """Cut one shard into blocks of at most ``size`` elements (a multiple of ``CELL``)."""
    rows = list(zip(*(plan.shards[shard].steps for plan in plans), strict=True))
    sequence = 0
    for index, steps in enumerate(rows):
        # An empty tensor still is a block, so that it is counted and recorded.
        for start, count in ranges(steps, size):
            last = index == len(rows) - 1 and start + count == steps[0].elements
            yield Block(shard, index, start, count, sequence, last)
            sequence += 1


def blocks(
    plans: Sequence[Plan], shards: Iterable[int], width: int, size: int = BLOCK
) -> Iterator[Block]:
    """Interleave the blocks of ``width`` shards at a time.

    Of several plans, the same shards and tensors in all of them, the blocks are those of each.

    The bytes of one file are hashed in their order, by one thread at a time; working on as
    many files as there are threads keeps the threads from waiting for one another.
    """
    waiting = iter(shards)
    active: list[Iterator[Block]] = []
    while True:
        while len(active) < width and (shard := next(waiting, None)) is not None:
            active.append(shard_blocks(plans, shard, size))
        if not active:
            return
        for stream in list(active):
            block = next(stream, None)
            if block is None:
                active.remove(stream)
            else:
                yield block
