"""``inspect``: what differs between two checkpoints, from one streaming pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from uipe_merge import native
from uipe_merge.bits import count_differing
from uipe_merge.checkpoint.pair import match
from uipe_merge.computing import Computing, torch_threads_kept
from uipe_merge.cutting import Block, blocks
from uipe_merge.fetching import fetch, require_room, wanted
from uipe_merge.guard import Guard
from uipe_merge.inspected import Gathered, Inspection
from uipe_merge.measuring import measure, to_measure
from uipe_merge.naming import place
from uipe_merge.once import Once
from uipe_merge.opening import hold_further, open_folders, open_further, open_pair
from uipe_merge.plan import BLOCK, Plan
from uipe_merge.planning import make_plan
from uipe_merge.reader import BlockReader, Pair, widest_input
from uipe_merge.steering import PLAIN

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from uipe_merge.deltas import Growths
    from uipe_merge.executors import Executor
    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Recipe
    from uipe_merge.resolving import Products

DEFAULT_ALPHAS = (0.1, 0.25, 0.5, 1.0, 2.0)


@torch_threads_kept()
def inspect_pair(
    original: str | os.PathLike[str],
    unlearned: str | os.PathLike[str],
    alphas: tuple[float, ...],
    recipe: Recipe,
    executor: Executor,
    progress: Progress,
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Inspection:
    """Stream both checkpoints once and measure every update.

    With further updates all are streamed once more, for the cosines of v with them.

    Args:
        original: Directory of the original checkpoint.
        unlearned: Directory of the unlearned checkpoint.
        alphas: The α whose rounding is to be tried.
        recipe: The output dtype it is tried at, and the updates that v is held against; with an α
            that is neither 0 nor −1, so that both sides are read.
        executor: On what to run.
        progress: Told of every block.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file.
        dequantize: Take block-scaled FP8 tensors with their scales.

    Raises:
        UipeMergeError: A checkpoint cannot be read, or has nothing in common with the other.
        NumericError: A value of an input is not finite.
        RemoteError: What has to be downloaded first cannot be had.
    """
    allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
    steering = recipe.steering
    names = steering.checkpoints
    first, second, *others = open_folders(original, unlearned, *names)
    pair = open_pair(first, second, **allowed)
    pairing = match(pair.original, pair.unlearned)
    if not pairing.pairs:
        pairing.require_match(pair.original, pair.unlearned)
    folders = dict(zip(names, others, strict=True))
    pair, directions = open_further(steering, folders, pair, (first, second), **allowed)
    further = hold_further(pair, pairing, directions)
    matched = {name: spec for name, spec in pair.unlearned.tensors.items() if name in pairing.pairs}
    alphas = tuple(replace(recipe, alpha=alpha).alpha for alpha in alphas)  # refuses what is no α
    both = (pair.original, pair.unlearned._replace(tensors=matched), pairing)
    plan = make_plan(*both, replace(recipe, steering=PLAIN))
    steered = make_plan(*both, recipe, further)
    needed = wanted(steered, pair)
    require_room(needed, None, 0)
    fetch(needed, pair)
    products: Products = {}
    if steering.measured:
        products = measure(to_measure(steered, {}), pair, executor, progress)
    progress.start(sum(step.source.nbytes for step in plan.steps))
    rows: dict[str, list[tuple[float, ...]]] = {}

    growths: Growths = Once()

    def make_worker() -> InspectWorker:
        return InspectWorker(plan, pair, alphas, growths)

    for block, found in executor.run(make_worker, _items(plan, executor.width)):
        step = plan.shards[block.shard].steps[block.step]
        rows.setdefault(step.name, []).extend(found)
        progress.advance(block.elements * step.source.dtype.bits // 8, step.source.file)
    moved = [step for step in plan.steps if step.operation == "extrapolate"]
    kept = [step for step in plan.steps if step.operation == "keep"]
    sums = Gathered(moved, rows, products, alphas)
    tensors = sums.by(lambda name: name)
    layers = sums.by(lambda name: place(name).layer)
    in_order = sorted(layers, key=lambda layer: (layer is None, layer or 0))
    return Inspection(
        alphas=alphas,
        updates=tuple(update.text for update in steering.held),
        tensors=tensors,
        layers={layer: layers[layer] for layer in in_order},
        kinds=sums.by(lambda name: place(name).kind),
        cells=sums.by(place),
        total=sums.of(moved),
        zero=[name for name, group in tensors.items() if not group.differing],
        differing_integers=[step.name for step in kept if any(row[2] for row in rows[step.name])],
        mismatches=pairing.mismatches,
        warnings=plan.warnings,
    )


class InspectWorker:
    """Measures the blocks of one thread. A row is ‖v‖², ‖θᵤ‖², v ≠ 0 and one sum per α."""

    def __init__(self, plan: Plan, pair: Pair, alphas: tuple[float, ...], growths: Growths) -> None:
        """Allocate the buffers of one thread."""
        self._plan = plan
        self._alphas = alphas
        self._reader = BlockReader(pair, widest_input(plan), BLOCK)
        self._guard = Guard(plan, pair)
        self._computing = Computing(pair, growths)
        self._out = memoryview(bytearray(BLOCK * 8))

    def __call__(self, block: Block) -> tuple[Block, list[tuple[float, ...]]]:
        """Return the block and one row per cell."""
        step = self._plan.shards[block.shard].steps[block.step]
        assert step.original is not None  # noqa: S101 - such a plan reads both sides of all
        here = step.at(block.start, block.elements)
        assert here.original is not None  # noqa: S101 - as above
        self._reader.begin()
        original, unlearned = self._reader.operands(here, block.elements)
        if step.operation == "keep":
            differing = count_differing(original, unlearned, step.source.dtype.bits // 8)
            return block, [(0.0, 0.0, float(differing))]
        out = self._out[: block.elements * step.dtype.bits // 8]
        if native.covers(here):
            found = native.measure(here, original, unlearned, out, self._alphas)
            if found is not None:
                return block, found
        rows = []
        kernels, deltas = self._computing.get()
        for row, finite in kernels.measure(
            here, original, unlearned, out, self._alphas, deltas.at(step, block.start)
        ):
            if not finite:
                self._guard.check_inputs(step)
            rows.append(row)
        return block, rows

    def close(self) -> None:
        """Close the input files."""
        self._reader.close()
        self._computing.close()


def _items(plan: Plan, width: int) -> Iterator[Block]:
    return blocks([plan], range(len(plan.shards)), width)
