"""One thread's work on one block: read, compute, write. Buffers are made once and reused.

Several plans that differ in their coefficients alone are done together: a block is read once for
all of them, and plain steps of compiled types go through it in one pass. torch is imported when
the first block comes that needs it; a plan of copies runs without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from uipe_merge import native
from uipe_merge.aligned import allocate, placed
from uipe_merge.bits import count_differing
from uipe_merge.computing import Computing
from uipe_merge.guard import Guard
from uipe_merge.plan import BLOCK, Plan, Step
from uipe_merge.reader import BlockReader, Pair, widest_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from uipe_merge.cutting import Block
    from uipe_merge.deltas import Growths

_TOGETHER = 2**24
"""Bytes of the outputs of one pass at most, unless one has more."""

Rows = list[tuple[float, ...]]
"""The moments of every cell of a block; none for copies and casts."""


class Written(NamedTuple):
    """What came of a block in one of the outputs.

    Attributes:
        variant: Which of the plans it is of.
        sums: One entry per cell: the moments. Empty for copies and casts.
        sha256: Digest of the shard, if this block was its last.
    """

    variant: int
    sums: Rows
    sha256: str | None


class BlockResult(NamedTuple):
    """What came of a block.

    Attributes:
        block: The block.
        written: In each of the outputs that still lack its shard.
    """

    block: Block
    written: list[Written]


class Sink(Protocol):
    """Where the blocks of a shard go: a file, tensors, a comparison."""

    def write(self, sequence: int, data: memoryview, offset: int, /) -> None:
        """Take block number ``sequence`` of the shard, which belongs at ``offset``."""

    def finish(self, size: int, /) -> str:
        """Say that all ``size`` bytes were written; return their SHA-256, where it was taken."""


class MergeWorker:
    """Does the blocks of a plan, or of several at once, one at a time."""

    def __init__(
        self,
        plans: Sequence[Plan],
        pair: Pair,
        writers: Callable[[int], Sequence[tuple[int, Sink]]],
        growths: Growths,
        block: int = BLOCK,
    ) -> None:
        """Allocate the buffers of one thread.

        Args:
            plans: The plans; their shards, tensors and offsets are the same.
            pair: Where to read.
            writers: Gives the writers of a shard, by its index, with the plans they are of.
            growths: What the threads share of DoRA adapters.
            block: Elements of a block at most.
        """
        self._plans = plans
        self._writers = writers
        self._reader = BlockReader(pair, max(map(widest_input, plans)), block)
        self._guards = [Guard(plan, pair) for plan in plans]
        width = max((step.dtype.bits // 8 for step in plans[0].steps), default=1)
        self._block = block
        self._out_bytes = block * width
        self._outs: list[memoryview] = []
        self._computing = Computing(pair, growths)

    def __call__(self, block: Block) -> BlockResult:
        """Read, compute and write one block."""
        self._reader.begin()
        written = []
        for lot in self._lots(block):
            computed = self._extrapolate(lot, block) if len(lot) > 1 else [None]
            for (variant, writer, step), found in zip(lot, computed, strict=True):
                place = step.offset + block.start * (step.dtype.bits // 8)
                data, sums = found or self._produce(self._guards[variant], step, block, place)
                writer.write(block.sequence, data, place)
                size = self._plans[variant].shards[block.shard].size
                digest = writer.finish(size) if block.last else None
                written.append(Written(variant, sums, digest))
        return BlockResult(block, written)

    def close(self) -> None:
        """Close the input files."""
        self._reader.close()
        self._computing.close()

    def _lots(self, block: Block) -> Iterator[list[tuple[int, Sink, Step]]]:
        """Yield the outputs of a block, with its step in each: one, or several for one pass."""
        lot: list[tuple[int, Sink, Step]] = []
        for variant, writer in self._writers(block.shard):
            step = self._plans[variant].shards[block.shard].steps[block.step]
            room = _TOGETHER * 8 // (self._block * step.dtype.bits)
            full = len(lot) >= min(room, native.MOST_ALPHAS)
            if lot and (full or not _alike(lot[0][2], step)):
                yield lot
                lot = []
            lot.append((variant, writer, step))
        if lot:
            yield lot

    def _extrapolate(
        self, lot: Sequence[tuple[int, Sink, Step]], block: Block
    ) -> list[tuple[memoryview, Rows] | None]:
        """Do a lot in one pass; ``None`` for what is not compiled, or came out not finite."""
        whole = lot[0][2]
        step = whole.at(block.start, block.elements)
        if not native.covers(step):
            return [None] * len(lot)
        place = whole.offset + block.start * (whole.dtype.bits // 8)
        outs = [self._out_view(step, block, place, number) for number in range(len(lot))]
        operands = self._reader.operands(step, block.elements, place)
        alphas = [step.alpha for _, _, step in lot]
        found = native.extrapolate(step, alphas, operands, outs, block.start)
        return [
            None if rows is None else (out, rows) for out, rows in zip(outs, found, strict=True)
        ]

    def _produce(
        self, guard: Guard, whole: Step, block: Block, place: int
    ) -> tuple[memoryview, Rows]:
        """Return the output bytes of a block, to be written at ``place``, and its sums."""
        step = whole.at(block.start, block.elements)
        if step.operation == "extrapolate":
            out = self._out_view(step, block, place)
            operands = self._reader.operands(step, block.elements, place)
            return out, self._compute(guard, whole, step, operands, block.start, out)
        side = 0 if step.from_original else 1
        # What is only copied goes to the disk from where it is read to.
        source = self._reader.shared(step.source, side, block.elements, place)
        guard.check_bytes(source, step.source.dtype, whole.source, side)
        if step.operation == "cast":
            out = self._out_view(step, block, place)
            kernels, _ = self._computing.get()
            kernels.cast(step, source, out)
            guard.check_cast(out, whole, kernels)
            return out, []
        if step.operation == "keep" and step.original is not None:
            original = self._reader.shared(step.original, 0, block.elements)
            differing = count_differing(original, source, step.dtype.bits // 8)
            return source, [(0.0, 0.0, 0.0, 0.0, float(differing))]
        return source, []

    def _compute(
        self,
        guard: Guard,
        whole: Step,
        step: Step,
        operands: Sequence[memoryview],
        first: int,
        out: memoryview,
    ) -> Rows:
        """Fill ``out`` with θᵤ and its step; return the moments of each cell.

        ``step`` is what ``whole`` does from its element ``first`` on, with the piece of every
        operand that it reads.
        """
        if native.covers(step):
            if step.terms:
                found = native.mix(step, operands, out, first)
            else:
                [found] = native.extrapolate(step, [step.alpha], operands, [out], first)
            if found is not None:
                return found
        sums: Rows = []
        kernels, deltas = self._computing.get()
        cells = deltas.at(whole, first)
        compute = kernels.mix if step.terms else kernels.extrapolate
        for moments, finite in compute(step, operands, out, cells, first):
            if not finite:
                guard.explain(whole, kernels)
            sums.append(tuple(moments))
        return sums

    def _out_view(self, step: Step, block: Block, place: int, number: int = 0) -> memoryview:
        while len(self._outs) <= number:
            self._outs.append(allocate(self._out_bytes))
        return placed(self._outs[number], block.elements * (step.dtype.bits // 8), place)


def _alike(one: Step, other: Step) -> bool:
    """Tell whether two steps add nothing but α·v to the same tensor, and differ in α alone."""
    plain = one.operation == "extrapolate" and not one.terms
    return plain and one._replace(alpha=other.alpha) == other
