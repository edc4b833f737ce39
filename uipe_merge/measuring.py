"""The pass before the writing one: inner products of updates, tensor by tensor.

Products of float64 are summed per cell in one order and exactly over the cells, so neither
threads nor blocks change them.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge import native
from uipe_merge.checkpoint.header import ZERO
from uipe_merge.computing import Computing
from uipe_merge.cutting import Block, blocks
from uipe_merge.errors import NumericError
from uipe_merge.guard import Guard
from uipe_merge.once import Once
from uipe_merge.plan import BLOCK, NUMERICS, Plan, Shard
from uipe_merge.reader import BlockReader, Pair, shown, widest_input
from uipe_merge.report import exact_sum
from uipe_merge.resolving import UPDATE, Products, measured_vectors, narrowed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.arithmetic.terms import Vector
    from uipe_merge.deltas import Growths
    from uipe_merge.executors import Executor
    from uipe_merge.plan import Step
    from uipe_merge.progress import Progress


class Measured(NamedTuple):
    """The tensors to be measured, as a plan of their own.

    Attributes:
        plan: With the steps that are in groups, and of their operands those that are needed.
        vectors: By tensor, of what inner products are taken.
    """

    plan: Plan
    vectors: dict[str, list[Vector]]


def to_measure(plan: Plan, directions: Mapping[str, Vector]) -> Measured:
    """Return what has to be measured of a plan.

    Args:
        plan: A plan with groups.
        directions: The direction of a tensor's step where it is not v.
    """
    shards: list[Shard] = []
    vectors: dict[str, list[Vector]] = {}
    for shard in plan.shards:
        steps: list[Step] = []
        for step in shard.steps:
            if step.group:
                wanted = measured_vectors(plan, directions.get(step.name, UPDATE))
                narrow, vectors[step.name] = narrowed(step, wanted)
                steps.append(narrow)
        if steps:
            shards.append(shard._replace(steps=steps))
    return Measured(plan._replace(shards=shards), vectors)


def key_of(measured: Measured, pair: Pair, factors: str) -> str:
    """Return a digest of all that decides the inner products; no coefficient is among it.

    ``factors`` is the same of the factors that directions of low rank are made of.
    """
    plan = measured.plan
    document: list[object] = [NUMERICS, factors, pair.locations]
    document += [plan.original, plan.unlearned, plan.further]
    for step in plan.steps:
        operands = [[side, spec[1:], noise] for side, spec, noise in step.operands]
        document.append([step.name, step.dtype.name, operands, measured.vectors[step.name]])
    return hashlib.sha256(json.dumps(document, default=str).encode()).hexdigest()


def measure(
    measured: Measured, pair: Pair, executor: Executor, progress: Progress, block: int = BLOCK
) -> Products:
    """Read what has to be measured, once, and return the inner products of every tensor.

    Args:
        measured: From ``to_measure``.
        pair: Where to read.
        executor: On what to run.
        progress: Told of every block.
        block: Elements read at a time. Changes nothing of the result.

    Raises:
        NumericError: A value is not finite, or so large that a product is not.
        CorruptInputError: An input changed or ended early.
    """
    plan = measured.plan
    missing = {step.name: max(step.elements, 1) for step in plan.steps}
    cells: dict[str, list[tuple[float, ...]]] = {name: [] for name in missing}
    products: Products = {}
    if not missing:  # every α is 0
        return products
    progress.start(plan.read_bytes)
    growths: Growths = Once()

    def make_worker() -> ProductsWorker:
        return ProductsWorker(measured, pair, growths, block)

    items = blocks([plan], range(len(plan.shards)), executor.width, block)
    for done, rows in executor.run(make_worker, items):
        step = plan.shards[done.shard].steps[done.step]
        stored = [spec for _, spec, _ in step.operands if spec.home != ZERO]
        read = sum(spec.dtype.bits // 8 for spec in stored)
        progress.advance(done.elements * read, f"measuring {step.source.file}")
        cells[step.name].extend(rows)
        missing[step.name] -= max(done.elements, 1)
        if not missing[step.name]:
            vectors = len(measured.vectors[step.name])
            empty = [(0.0,) * (vectors * (vectors + 1) // 2)]
            columns = zip(*(cells.pop(step.name) or empty), strict=True)
            products[step.name] = tuple(map(exact_sum, columns))
    return products


class ProductsWorker:
    """Measures the blocks of one thread."""

    def __init__(self, measured: Measured, pair: Pair, growths: Growths, block: int) -> None:
        """Allocate the buffers of one thread."""
        self._plan, self._vectors = measured
        self._pair = pair
        self._reader = BlockReader(pair, widest_input(self._plan), block)
        self._guard = Guard(self._plan, pair)
        self._computing = Computing(pair, growths)

    def __call__(self, block: Block) -> tuple[Block, list[tuple[float, ...]]]:
        """Return the block and the inner products of each of its cells."""
        whole = self._plan.shards[block.shard].steps[block.step]
        step = whole.at(block.start, block.elements)
        self._reader.begin()
        operands = self._reader.operands(step, block.elements)
        vectors = self._vectors[whole.name]
        if native.covers(step):
            rows = native.products(step, operands, vectors)
        else:
            kernels, deltas = self._computing.get()
            cells = deltas.at(whole, block.start)
            rows = list(kernels.products(step, operands, vectors, cells))
        if not all(math.isfinite(value) for row in rows for value in row):
            self._guard.check_inputs(whole)
            raise NumericError(
                "is so large that an inner product overflows",
                file=shown(self._pair, whole.source, 1),
                tensor=whole.name,
                remedy="leave it out with --alpha-rule 'NAME=0'",
            )
        return block, rows

    def close(self) -> None:
        """Close the input files."""
        self._reader.close()
        self._computing.close()
