"""One thread's work on one block: read, compute, write. Buffers are made once and reused.

torch is imported when the first block that needs arithmetic comes; a plan of copies runs
without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uipe_merge import native
from uipe_merge.aligned import allocate, placed
from uipe_merge.bits import count_differing
from uipe_merge.guard import Guard
from uipe_merge.plan import BLOCK, Block, Plan, Step
from uipe_merge.reader import BlockReader, Pair, widest_input

if TYPE_CHECKING:
    from collections.abc import Callable

    from uipe_merge.deltas import Deltas, Growths
    from uipe_merge.kernels import Kernels
    from uipe_merge.output.shard import ShardWriter


class BlockResult(NamedTuple):
    """What came of a block.

    Attributes:
        block: The block.
        sums: One entry per cell: the five moments. Empty for copies and casts.
        sha256: Digest of the shard, if this block was its last.
    """

    block: Block
    sums: list[tuple[float, ...]]
    sha256: str | None


class MergeWorker:
    """Does the blocks of a plan, one at a time."""

    def __init__(
        self,
        plan: Plan,
        pair: Pair,
        writer: Callable[[int], ShardWriter],
        growths: Growths,
        block: int = BLOCK,
        device: str = "cpu",
    ) -> None:
        """Allocate the buffers of one thread.

        Args:
            plan: The plan.
            pair: Where to read.
            writer: Gives the writer of a shard, by its index in the plan.
            growths: What the threads share of DoRA adapters.
            block: Elements of a block at most.
            device: Where torch computes what is not compiled.
        """
        self._plan = plan
        self._writer = writer
        operands = 2 + max((len(step.further) for step in plan.steps), default=0)
        self._reader = BlockReader(pair, widest_input(plan), block, operands)
        self._guard = Guard(plan, pair)
        width = max((step.dtype.bits // 8 for step in plan.steps), default=1)
        self._out = allocate(block * width)
        self._pair = pair
        self._growths = growths
        self._device = device
        self._lazy: tuple[Kernels, Deltas] | None = None

    def __call__(self, block: Block) -> BlockResult:
        """Read, compute and write one block."""
        shard = self._plan.shards[block.shard]
        step = shard.steps[block.step]
        data, sums = self._produce(step, step.at(block.start, block.elements), block)
        writer = self._writer(block.shard)
        writer.write(block.sequence, data, step.offset + block.start * (step.dtype.bits // 8))
        return BlockResult(block, sums, writer.finish(shard.size) if block.last else None)

    def close(self) -> None:
        """Close the input files."""
        self._reader.close()
        if self._lazy is not None:
            self._lazy[1].close()

    def _produce(
        self, whole: Step, step: Step, block: Block
    ) -> tuple[memoryview, list[tuple[float, ...]]]:
        """Return the output bytes of a block and the sums of its cells.

        ``step`` is what ``whole`` does in this block, with the piece of either side it reads.
        """
        side = 0 if step.from_original else 1
        # What is only copied goes to the disk from where it is read to.
        place = step.offset + block.start * (step.dtype.bits // 8)
        if step.terms:
            return self._mix(whole, step, block)
        source = self._reader.read(step.source, side, 0, block.elements, place)
        if step.operation == "extrapolate":
            return self._extrapolate(whole, step, block, source)
        self._guard.check_bytes(source, step.source.dtype, whole.source, side)
        if step.operation == "cast":
            out = self._out_view(step, block)
            self._kernels().cast(step, source, out)
            self._guard.check_cast(out, whole, self._kernels())
            return out, []
        if step.operation == "keep" and step.original is not None:
            original = self._reader.read(step.original, 0, 0, block.elements)
            differing = count_differing(original, source, step.dtype.bits // 8)
            return source, [(0.0, 0.0, 0.0, 0.0, float(differing))]
        return source, []

    def _extrapolate(
        self, whole: Step, step: Step, block: Block, unlearned: memoryview
    ) -> tuple[memoryview, list[tuple[float, ...]]]:
        assert step.original is not None  # noqa: S101 - the plan gives it for this operation
        original = self._reader.read(step.original, 0, 0, block.elements)
        out = self._out_view(step, block)
        if native.covers(step):
            found = native.extrapolate(step, original, unlearned, out, block.start)
            if found is not None:
                return out, found
        sums: list[tuple[float, ...]] = []
        kernels, deltas = self._arithmetic()
        cells = deltas.at(whole, block.start)
        for moments, finite in kernels.extrapolate(
            step, original, unlearned, out, cells, block.start
        ):
            if not finite:
                self._guard.explain(whole, kernels)
            sums.append(tuple(moments))
        return out, sums

    def _mix(
        self, whole: Step, step: Step, block: Block
    ) -> tuple[memoryview, list[tuple[float, ...]]]:
        operands = self._reader.operands(step, block.elements)
        out = self._out_view(step, block)
        if native.covers(step):
            found = native.mix(step, operands, out, block.start)
            if found is not None:
                return out, found
        sums: list[tuple[float, ...]] = []
        kernels, deltas = self._arithmetic()
        cells = deltas.at(whole, block.start)
        for moments, finite in kernels.mix(step, operands, out, cells, block.start):
            if not finite:
                self._guard.explain(whole, kernels)
            sums.append(tuple(moments))
        return out, sums

    def _out_view(self, step: Step, block: Block) -> memoryview:
        size = step.dtype.bits // 8
        return placed(self._out, block.elements * size, step.offset + block.start * size)

    def _kernels(self) -> Kernels:
        return self._arithmetic()[0]

    def _arithmetic(self) -> tuple[Kernels, Deltas]:
        if self._lazy is None:
            from uipe_merge.deltas import Deltas
            from uipe_merge.kernels import Kernels

            self._lazy = Kernels(self._device), Deltas(self._pair, self._growths)
        return self._lazy
