"""A published model computed again from its inputs, in blocks drawn by chance, bit for bit.

What a hash cannot tell: that the bytes are those of the formula. The recipe and the inputs are
the manifest's; plan, products, factors and arithmetic are those of a merge, and a worker hands
its blocks to a comparison instead of a file.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.computing import torch_threads_kept
from uipe_merge.cutting import Block, blocks
from uipe_merge.errors import CorruptInputError
from uipe_merge.once import Once
from uipe_merge.recorded import Record
from uipe_merge.report import Sums, sums_of, tensor_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from uipe_merge.checkpoint.storage import InputFile
    from uipe_merge.deltas import Growths
    from uipe_merge.drawing import Deep
    from uipe_merge.output.published import Published
    from uipe_merge.plan import Plan, Shard, Step
    from uipe_merge.progress import Progress
    from uipe_merge.rehearsing import Rehearsal
    from uipe_merge.settling import Settled
    from uipe_merge.worker import Sink


class Recomputed(NamedTuple):
    """What was computed again.

    Attributes:
        tensors: Tensors that a block was drawn from.
        blocks: Blocks.
        of_blocks: Blocks that the model has.
        bytes: Bytes that were held against the published ones.
        original: From what, as it was opened.
        unlearned: Likewise.
        problems: One line for each tensor, header, or record that came out otherwise.
    """

    tensors: int
    blocks: int
    of_blocks: int
    bytes: int
    original: str
    unlearned: str
    problems: list[str]


@torch_threads_kept()
def recompute(
    manifest: Mapping[str, object], model: Published, deep: Deep, progress: Progress
) -> Recomputed:
    """Compute blocks of a published model again and hold them against what is there.

    Args:
        manifest: What it says of itself.
        model: The model.
        deep: How much of it, and from what.
        progress: Told of every block.

    Raises:
        UsageError: An input is not where the manifest says.
        CorruptInputError: The manifest is of other numeric code or does not say enough; or an
            input is damaged.
        IncompatibleModelsError: The inputs are others than the manifest's.
        UipeMergeError: Whatever would stop the merge.
    """
    from uipe_merge.rehearsing import rehearse

    record = Record(manifest, model.manifest_path)
    recipe = record.recipe(deep.moved)
    original, unlearned = record.arguments(deep, recipe)
    rehearsal = rehearse(
        original,
        unlearned,
        recipe,
        allow_pickle=deep.allow_pickle,
        dequantize=True,  # it made this model, or there is nothing to dequantise
        device=deep.device,
        threads=deep.threads,
    )
    with rehearsal as made:
        record.require_inputs(made.job.pair.sides)
        return _compare(made, made.settled(), model, deep, progress, record)


def _other_groups(record: Record, settled: Settled) -> list[str]:
    """Say which groups' measurements are recorded otherwise than they come out."""
    said = record.mapping("groups")
    found = {group.name: group.as_dict() for group in settled.groups}
    if said.keys() != found.keys():
        return ["the manifest has other groups than the recipe makes"]
    return [
        f"the manifest records other measurements of group '{name}'"
        for name, values in found.items()
        if not _says(said[name], values)
    ]


def _says(record: object, values: Mapping[str, object]) -> bool:
    """Tell whether a record of the manifest has these values."""
    return isinstance(record, dict) and all(record.get(key) == values[key] for key in values)


def _compare(
    made: Rehearsal,
    settled: Settled,
    model: Published,
    deep: Deep,
    progress: Progress,
    record: Record,
) -> Recomputed:
    """Stream the blocks that are drawn into comparisons."""
    from uipe_merge.engine import require_unchanged  # imports numpy, as the worker does
    from uipe_merge.worker import MergeWorker

    plan, job = settled.plan, made.job
    growths: Growths = Once()
    problems = _other_groups(record, settled)
    shelves: dict[int, _Shelf] = {}
    rows: dict[str, list[Sums]] = {}
    missing = {step.name: max(step.elements, 1) for step in plan.steps}

    def writers(shard: int) -> list[tuple[int, Sink]]:
        return [(0, shelves[shard])]

    def make_worker() -> MergeWorker:
        return MergeWorker([plan], settled.pair, writers, growths, job.block)

    everything = list(blocks([plan], range(len(plan.shards)), made.executor.width, job.block))
    drawn = deep.drawn(len(everything))
    try:
        for number, shard in enumerate(plan.shards):
            shelf = _open(model, shard, problems)
            if shelf is not None:
                shelves[number] = shelf
        todo = [
            block for at, block in enumerate(everything) if at in drawn and block.shard in shelves
        ]
        progress.start(sum(_nbytes(plan, block) for block in todo))
        results = made.executor.run(make_worker, todo)
        try:
            for result in results:
                step = _step(plan, result.block)
                found = result.written[0].sums
                rows.setdefault(step.name, []).extend(Sums(*row) for row in found)
                missing[step.name] -= max(result.block.elements, 1)
                progress.advance(_nbytes(plan, result.block), plan.shards[result.block.shard].name)
        finally:
            results.close()
    finally:
        for shelf in shelves.values():
            shelf.close()
    require_unchanged(settled.pair)
    differences = [line for _, shelf in sorted(shelves.items()) for line in shelf.differences()]
    whole = (step for step in plan.steps if not missing[step.name])
    problems += differences
    if not differences:  # else the records are of other numbers too
        problems += _other_records(record, whole, rows)
    problems += _other_index(plan, model)
    return Recomputed(
        len(rows),
        len(todo),
        len(everything),
        sum(_nbytes(plan, block) for block in todo),
        *job.arguments,
        problems,
    )


def _step(plan: Plan, block: Block) -> Step:
    return plan.shards[block.shard].steps[block.step]


def _nbytes(plan: Plan, block: Block) -> int:
    return block.elements * _step(plan, block).dtype.bits // 8


def _open(model: Published, shard: Shard, problems: list[str]) -> _Shelf | None:
    """Open a published shard, if it is one that this plan could have made."""
    try:
        file = model.open_file(shard.name)
    except CorruptInputError:
        problems.append(f"'{shard.name}', which the recipe makes, is missing")
        return None
    header = bytearray(min(len(shard.header), file.stamp.size))
    file.read_into(memoryview(header), 0)
    if file.stamp.size != shard.size or header != shard.header:
        file.close()
        problems.append(f"'{shard.name}' has other tensors than the recipe makes")
        return None
    return _Shelf(file, shard)


class _Shelf:
    """Takes the bytes of a shard as a shard writer does; holds them against the published ones."""

    def __init__(self, file: InputFile, shard: Shard) -> None:
        self._file = file
        self._shard = shard
        self._steps = [step for step in shard.steps if step.nbytes]
        self._offsets = [step.offset for step in self._steps]
        self._first: dict[int, tuple[int, str, str]] = {}
        self._noting = threading.Lock()

    def write(self, _sequence: int, data: memoryview, offset: int) -> None:
        """Compare what would be written at ``offset``; of one tensor, no more."""
        import numpy as np

        if not data:
            return
        there = bytearray(len(data))
        self._file.read_into(memoryview(there), offset)
        differing = np.frombuffer(there, np.uint8) != np.frombuffer(data, np.uint8)
        if not differing.any():
            return
        number = bisect_right(self._offsets, offset) - 1
        step = self._steps[number]
        width = max(step.dtype.bits // 8, 1)
        at = int(differing.argmax()) // width * width
        first = (
            (offset - step.offset + at) // width,
            bytes(reversed(there[at : at + width])).hex(),
            bytes(reversed(bytes(data[at : at + width]))).hex(),
        )
        with self._noting:
            self._first[number] = min(self._first.get(number, first), first)

    def finish(self, _size: int) -> str:
        """Say that it is whole."""
        return ""

    def differences(self) -> Iterator[str]:
        """Yield a line for every tensor that differs, in the order of the bytes."""
        for number, (element, there, made) in sorted(self._first.items()):
            yield (
                f"'{self._shard.name}' differs from what its inputs make, in tensor "
                f"'{self._steps[number].name}' first at element {element}: 0x{there}, computed "
                f"0x{made}"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _other_records(
    record: Record, whole: Iterable[Step], rows: Mapping[str, list[Sums]]
) -> list[str]:
    """Say which tensors, computed from end to end, are recorded otherwise than they come out."""
    said = record.mapping("tensors")
    return [
        f"the manifest records other numbers of tensor '{step.name}'"
        for step in whole
        if not _says(said.get(step.name), tensor_record(step, sums_of(step, rows[step.name])))
    ]


def _other_index(plan: Plan, model: Published) -> list[str]:
    """Say whether the index, by which a reader finds the tensors, is another."""
    index = plan.index_json()
    if index is None:
        return []
    try:
        file = model.open_file(INDEX_NAME)
    except CorruptInputError:
        return []  # which the hashes have reported
    try:
        there = bytearray(min(file.stamp.size, len(index) + 1))
        file.read_into(memoryview(there), 0)
    finally:
        file.close()
    return [] if there == index else [f"'{INDEX_NAME}' is not that of these tensors"]
