"""``inspect``: what differs between two checkpoints, from one streaming pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from uipe_merge import native
from uipe_merge.bits import count_differing
from uipe_merge.checkpoint.pair import match
from uipe_merge.fetching import fetch, require_room, wanted
from uipe_merge.guard import Guard
from uipe_merge.naming import Place, place
from uipe_merge.once import Once
from uipe_merge.opening import open_folders, open_pair
from uipe_merge.plan import BLOCK, Block, Plan, blocks
from uipe_merge.planning import make_plan
from uipe_merge.reader import BlockReader, Pair, widest_input
from uipe_merge.recipe import Recipe
from uipe_merge.report import TOLERANCE, exact_sum, quotient, root

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from uipe_merge.deltas import Deltas, Growths
    from uipe_merge.executors import Executor
    from uipe_merge.kernels import Kernels
    from uipe_merge.plan import Step
    from uipe_merge.progress import Progress

Key = TypeVar("Key")

DEFAULT_ALPHAS = (0.1, 0.25, 0.5, 1.0, 2.0)


class Group(NamedTuple):
    """The update of some tensors, from additive sums.

    Attributes:
        tensors: How many.
        elements: Their elements; complex ones count twice.
        update: ‖v‖².
        unlearned: ‖θᵤ‖².
        differing: Elements with v ≠ 0.
        along: ⟨θ_out − θᵤ, v⟩ for each α that was tried.
    """

    tensors: int
    elements: int
    update: float
    unlearned: float
    differing: float
    along: tuple[float, ...]

    def as_dict(self, alphas: tuple[float, ...]) -> dict[str, object]:
        """Return the measures as plain values for JSON."""
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "norm": self.norm,
            "ratio": self.ratio,
            "share_changed": self.share_changed,
            "effective_alpha": dict(zip(map(repr, alphas), self.effective_alphas, strict=True)),
        }

    @property
    def norm(self) -> float | None:
        """‖v‖; ``None`` where its square overflows float64."""
        return root(self.update)

    @property
    def ratio(self) -> float | None:
        """‖v‖/‖θᵤ‖; ``None`` where θᵤ is zero."""
        return root(quotient(self.update, self.unlearned))

    @property
    def share_changed(self) -> float:
        """Share of elements with v ≠ 0."""
        return self.differing / self.elements if self.elements else 0.0

    @property
    def effective_alphas(self) -> tuple[float | None, ...]:
        """The α each α tried would come out as; ``None`` where v is zero or it overflows."""
        return tuple(quotient(along, self.update) for along in self.along)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``inspect`` returns.

    Attributes:
        alphas: The α that were tried at the output dtype.
        tensors: Every tensor that can be extrapolated, by name.
        layers: Per layer; ``None`` gathers what belongs to no layer.
        kinds: Per module kind.
        cells: Per layer and kind, for the heat map.
        total: The model.
        zero: Tensors with v = 0.
        differing_integers: Integer or boolean tensors that differ.
        mismatches: What keeps the two from being merged.
        warnings: What is odd but does not.
    """

    alphas: tuple[float, ...]
    tensors: dict[str, Group]
    layers: dict[int | None, Group]
    kinds: dict[str, Group]
    cells: dict[Place, Group]
    total: Group
    zero: list[str]
    differing_integers: list[str]
    mismatches: list[str]
    warnings: list[str]

    def as_dict(self) -> dict[str, object]:
        """Return everything as plain values for JSON."""
        alphas = self.alphas
        return {
            "alphas": list(alphas),
            "total": self.total.as_dict(alphas),
            "layers": [
                {"layer": layer, **group.as_dict(alphas)} for layer, group in self.layers.items()
            ],
            "kinds": [
                {"kind": kind, **group.as_dict(alphas)} for kind, group in self.kinds.items()
            ],
            "tensors": {name: group.as_dict(alphas) for name, group in self.tensors.items()},
            "zero": self.zero,
            "differing_integers": self.differing_integers,
            "mismatches": self.mismatches,
            "warnings": self.warnings,
        }

    def rounding_warnings(self) -> list[str]:
        """Name the α among those tried that the output dtype would not give."""
        pairs = zip(self.alphas, self.total.effective_alphas, strict=True)
        lost = [
            f"{alpha:g} → {got:.3g}"
            for alpha, got in pairs
            if got is not None and abs(got - alpha) > TOLERANCE * abs(alpha)
        ]
        if not lost:
            return []
        return [
            (
                f"at the output dtype rounding would change α: {', '.join(lost)}; merge with "
                "--dtype float32 to keep the whole step"
            )
        ]


def inspect_pair(
    original: str | os.PathLike[str],
    unlearned: str | os.PathLike[str],
    alphas: tuple[float, ...],
    dtype: str,
    executor: Executor,
    progress: Progress,
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Inspection:
    """Stream both checkpoints once and measure every update.

    Args:
        original: Directory of the original checkpoint.
        unlearned: Directory of the unlearned checkpoint.
        alphas: The α whose rounding is to be tried.
        dtype: The output dtype it is tried at, ``auto`` for the unlearned checkpoint's.
        executor: On what to run.
        progress: Told of every block.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file.
        dequantize: Take block-scaled FP8 tensors with their scales.

    Raises:
        UipeMergeError: A checkpoint cannot be read, or has nothing in common with the other.
        NumericError: A value of an input is not finite.
        RemoteError: What has to be downloaded first cannot be had.
    """
    pair = open_pair(
        *open_folders(original, unlearned), allow_pickle=allow_pickle, dequantize=dequantize
    )
    pairing = match(*pair)
    if not pairing.pairs:
        pairing.require_match(*pair)
    matched = {name: spec for name, spec in pair.unlearned.tensors.items() if name in pairing.pairs}
    alphas = tuple(Recipe(alpha, dtype).alpha for alpha in alphas)  # refuses what is no α
    recipe = Recipe(1.0, dtype)  # any α that is neither 0 nor −1 reads both sides
    plan = make_plan(pair.original, pair.unlearned._replace(tensors=matched), pairing, recipe)
    needed = wanted(plan, pair)
    require_room(needed, None, 0)
    fetch(needed, pair)
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
    tensors = _grouped(moved, rows, alphas, lambda name: name)
    layers = _grouped(moved, rows, alphas, lambda name: place(name).layer)
    in_order = sorted(layers, key=lambda layer: (layer is None, layer or 0))
    return Inspection(
        alphas=alphas,
        tensors=tensors,
        layers={layer: layers[layer] for layer in in_order},
        kinds=_grouped(moved, rows, alphas, lambda name: place(name).kind),
        cells=_grouped(moved, rows, alphas, place),
        total=_group(moved, rows, alphas),
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
        self._pair = pair
        self._growths = growths
        self._lazy: tuple[Kernels, Deltas] | None = None
        self._out = memoryview(bytearray(BLOCK * 8))

    def __call__(self, block: Block) -> tuple[Block, list[tuple[float, ...]]]:
        """Return the block and one row per cell."""
        step = self._plan.shards[block.shard].steps[block.step]
        assert step.original is not None  # noqa: S101 - such a plan reads both sides of all
        here = step.at(block.start, block.elements)
        assert here.original is not None  # noqa: S101 - as above
        original = self._reader.read(here.original, 0, 0, block.elements)
        unlearned = self._reader.read(here.source, 1, 0, block.elements)
        if step.operation == "keep":
            differing = count_differing(original, unlearned, step.source.dtype.bits // 8)
            return block, [(0.0, 0.0, float(differing))]
        out = self._out[: block.elements * step.dtype.bits // 8]
        if native.covers(here):
            found = native.measure(here, original, unlearned, out, self._alphas)
            if found is not None:
                return block, found
        rows = []
        kernels, deltas = self._arithmetic()
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
        if self._lazy is not None:
            self._lazy[1].close()

    def _arithmetic(self) -> tuple[Kernels, Deltas]:
        if self._lazy is None:
            from uipe_merge.deltas import Deltas
            from uipe_merge.kernels import Kernels

            self._lazy = Kernels(), Deltas(self._pair, self._growths)
        return self._lazy


def _items(plan: Plan, width: int) -> Iterator[Block]:
    return blocks(plan, range(len(plan.shards)), width)


def _grouped(
    steps: list[Step],
    rows: dict[str, list[tuple[float, ...]]],
    alphas: tuple[float, ...],
    key: Callable[[str], Key],
) -> dict[Key, Group]:
    members: dict[Key, list[Step]] = {}
    for step in steps:
        members.setdefault(key(step.name), []).append(step)
    return {name: _group(group, rows, alphas) for name, group in members.items()}


def _group(
    steps: list[Step], rows: dict[str, list[tuple[float, ...]]], alphas: tuple[float, ...]
) -> Group:
    everything = [row for step in steps for row in rows.get(step.name, [])]
    columns = [exact_sum(column) for column in zip(*everything, strict=True)]
    update, unlearned, differing, *along = columns or [0.0] * (3 + len(alphas))
    elements = sum(step.elements * step.dtype.lanes for step in steps)
    return Group(len(steps), elements, update, unlearned, differing, tuple(along))
