"""A published model computed again from its inputs, in blocks drawn by chance, bit for bit.

What a hash cannot tell: that the bytes are those of the formula. The recipe and the inputs are
the manifest's; plan, products, factors and arithmetic are those of a merge, and a worker hands
its blocks to a comparison instead of a file.
"""

from __future__ import annotations

import shlex
import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, cast

from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.computing import torch_threads_kept
from uipe_merge.cutting import Block, blocks
from uipe_merge.errors import (
    CorruptInputError,
    IncompatibleModelsError,
    RecipeError,
    UsageError,
    listed,
)
from uipe_merge.mergekit_file import parse_config
from uipe_merge.once import Once
from uipe_merge.opening import is_there
from uipe_merge.plan import NUMERICS
from uipe_merge.recipe_file import parse_recipe
from uipe_merge.report import Sums, add, tensor_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.checkpoint.storage import InputFile
    from uipe_merge.deltas import Growths
    from uipe_merge.drawing import Deep
    from uipe_merge.output.published import Published
    from uipe_merge.output.shard import ShardWriter
    from uipe_merge.plan import Plan, Shard, Step
    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Recipe
    from uipe_merge.rehearsing import Rehearsal
    from uipe_merge.settling import Settled


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


class Record:
    """A manifest, asked for what a merge needs; anything in it may be wrong."""

    def __init__(self, manifest: Mapping[str, object], path: str) -> None:
        """Take one of our numeric code; ``path`` is for messages.

        Raises:
            CorruptInputError: It is of another.
        """
        self._manifest = manifest
        self._path = path
        tool = self.mapping("tool")
        if tool.get("numerics") != NUMERICS:
            raise CorruptInputError(
                f"was made with numeric code {str(tool.get('numerics'))[:20]}, this version has "
                f"{NUMERICS}: other bytes would come out",
                file=path,
                remedy=f"use uipe-merge {str(tool.get('version'))[:20]} for --deep",
            )

    def mapping(self, name: str) -> Mapping[str, object]:
        """Return one of its parts; nothing where it has none of that name."""
        value = self._manifest.get(name, {})
        if not isinstance(value, dict):
            raise self.damaged(name)
        return value

    def damaged(self, what: str) -> CorruptInputError:
        """Return the error for a part that is not what this tool writes."""
        return CorruptInputError(
            f"its {what} is damaged, so that nothing can be computed from it", file=self._path
        )

    def recipe(self, moved: Mapping[str, str]) -> Recipe:
        """Return the recipe, with further checkpoints where they are now."""
        said = dict(self.mapping("recipe"))
        size = said.pop("max_shard_bytes", None)
        if size is not None:
            said["max_shard_size"] = size
        try:
            said["alpha_rules"] = [
                {"match": match, "alpha": alpha}
                for match, alpha in cast("list[list[object]]", said.get("alpha_rules", []))
            ]
            knots = cast("list[tuple[object, object]]", said.get("alpha_layers", []))
            said["alpha_layers"] = dict(knots)
        except (TypeError, ValueError):
            raise self.damaged("recipe") from None
        for key in ("along", "away_from", "add"):
            if key in said:
                said[key] = _renamed(said[key], moved)
        try:
            return parse_recipe(said)
        except (RecipeError, UsageError) as error:
            raise CorruptInputError(
                f"its recipe is damaged: {error.message}", file=self._path
            ) from None

    def arguments(self, deep: Deep, recipe: Recipe) -> tuple[str, str]:
        """Return the two inputs: those that were given now, or those that the command names.

        Raises:
            UsageError: One that the command names is not there.
        """
        if deep.original is not None and deep.unlearned is not None:
            return deep.original, deep.unlearned
        try:
            _, *words = shlex.split(str(self._manifest.get("command", "")))
        except ValueError:
            words = []
        if len(words) < 2:
            raise self.damaged("command")
        if recipe.mergekit is not None:
            merge = parse_config(recipe.mergekit.text.encode(), recipe.mergekit.config)
            words = [merge.original, merge.unlearned]
        for given, named, option in zip(
            (deep.original, deep.unlearned), words, ("--original", "--unlearned"), strict=False
        ):
            if given is None and not is_there(named):
                raise UsageError(
                    "is where this model was made from, and is not there",
                    file=named,
                    remedy=f"say where it is now with {option}, or run in the directory of then",
                )
        return deep.original or words[0], deep.unlearned or words[1]

    def require_inputs(self, sides: Sequence[Checkpoint]) -> None:
        """Refuse other checkpoints than those that the model was made from.

        Raises:
            IncompatibleModelsError: A weight file has another name, size or header.
        """
        inputs = self.mapping("inputs")
        further = inputs.get("further", [])
        entries = [inputs.get("original"), inputs.get("unlearned")]
        entries += further if isinstance(further, list) else [further]
        if len(entries) != len(sides):
            raise self.damaged("record of the inputs")
        for entry, checkpoint in zip(entries, sides, strict=True):
            shards = entry.get("shards") if isinstance(entry, dict) else None
            if not isinstance(shards, list) or not all(isinstance(each, dict) for each in shards):
                raise self.damaged("record of the inputs")
            then = {
                (str(each.get("name")), each.get("size"), each.get("header_sha256"))
                for each in shards
            }
            now = {
                (shard.name, shard.stamp.size, shard.header_sha256) for shard in checkpoint.shards
            }
            if then != now:
                names = sorted({name for name, *_ in then ^ now})
                raise IncompatibleModelsError(
                    f"is not what the model was made from: {listed(names)} had another size or "
                    "header then, or was not there",
                    file=checkpoint.location,
                    remedy="name the checkpoint of then with --original, --unlearned or --moved",
                )


def _renamed(value: object, moved: Mapping[str, str]) -> object:
    if isinstance(value, list):
        return [_renamed(each, moved) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: moved.get(name, name) if key in ("new", "old") and isinstance(name, str) else name
        for key, name in value.items()
    }


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

    def writers(shard: int) -> list[tuple[int, ShardWriter]]:
        return [(0, cast("ShardWriter", shelves[shard]))]  # all of it that a worker calls

    def make_worker() -> MergeWorker:
        return MergeWorker([plan], settled.pair, writers, growths, job.block, job.device)

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
    problems = []
    for step in whole:
        sums: Sums | None = None
        if rows[step.name] or step.operation in ("extrapolate", "keep"):
            sums = add(rows[step.name]) if rows[step.name] else Sums()
            sums = sums if step.terms else sums.of_plain(step.alpha)
        if not _says(said.get(step.name), tensor_record(step, sums)):
            problems.append(f"the manifest records other numbers of tensor '{step.name}'")
    return problems


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
