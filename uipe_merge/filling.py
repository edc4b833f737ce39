"""What ``load`` fills: tensors that a plan goes into, laid out as the model will have them.

A ``Source`` plans and measures as ``merge`` does and streams the plan; ``lay_out`` says which
tensors it goes into, and ``recognised`` which parameters of the model these became.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import experts
from uipe_merge.computing import torch_threads_kept
from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.job import Job
    from uipe_merge.plan import Plan, Step
    from uipe_merge.reader import Pair
    from uipe_merge.recipe import Recipe
    from uipe_merge.settling import Settled
    from uipe_merge.worker import Sink

_MOVED = {"BOOL": "bool", "C64": "complex64"} | {
    f"{sign}{bits}": f"{name}{bits}"
    for sign, name in (("U", "uint"), ("I", "int"))
    for bits in (8, 16, 32, 64)
}
"""torch's names of the types that ``DType.torch`` has none for, or the name of a part."""


class Place(NamedTuple):
    """Where the elements of a tensor of the checkpoints are in what transformers is given.

    Attributes:
        name: Name of the tensor there.
        start: The first of its elements that is meant.
    """

    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is read from, and how."""

    original: str
    unlearned: str
    allow_pickle: bool
    dequantize: bool
    device: str
    threads: int | None

    @contextmanager
    def settled(self, recipe: Recipe) -> Iterator[tuple[Job, Settled, Path]]:
        """Plan and measure as ``merge`` does; what is kept meanwhile is in the directory given."""
        from uipe_merge.rehearsing import rehearse

        if recipe.form != "model":
            raise UsageError(
                "an adapter cannot be loaded as a model", remedy="leave out `as`, or use merge"
            )
        rehearsal = rehearse(
            self.original,
            self.unlearned,
            recipe,
            allow_pickle=self.allow_pickle,
            dequantize=self.dequantize,
            device=self.device,
            threads=self.threads,
        )
        with rehearsal as made, torch_threads_kept():
            yield made.job, made.settled(), made.root

    def fill(self, job: Job, settled: Settled, targets: Mapping[str, torch.Tensor]) -> list[str]:
        """Stream the plan into flat tensors, by the names of its steps; return what to warn of.

        A step without a target is left out. A target of another dtype is converted to.

        Raises:
            NumericError: A value is not finite, or would not be.
            CorruptInputError: An input changed or ended early.
        """
        import torch

        from uipe_merge.cutting import blocks
        from uipe_merge.engine import require_unchanged
        from uipe_merge.executors import make_executor
        from uipe_merge.once import Once
        from uipe_merge.report import Sums, summarise, sums_of
        from uipe_merge.worker import MergeWorker

        plan, growths = settled.plan, Once[torch.Tensor]()
        shelves = [_Shelf(shard.steps, targets) for shard in plan.shards]

        def writers(shard: int) -> list[tuple[int, Sink]]:
            return [(0, shelves[shard])]

        def make_worker() -> MergeWorker:
            return MergeWorker([plan], settled.pair, writers, growths, job.block)

        executor = make_executor(self.threads, remote=job.remote)
        order = blocks([plan], range(len(plan.shards)), executor.width, job.block)
        todo = (each for each in order if plan.shards[each.shard].steps[each.step].name in targets)
        cells: dict[str, list[Sums]] = {}
        results = executor.run(make_worker, todo)
        try:
            for result in results:
                step = plan.shards[result.block.shard].steps[result.block.step]
                rows = result.written[0].sums
                cells.setdefault(step.name, []).extend(Sums(*row) for row in rows)
        finally:
            results.close()
        require_unchanged(settled.pair)
        done = [step for step in plan.steps if step.name in cells]
        sums = {step.name: sums_of(step, cells[step.name]) or Sums() for step in done}
        steered = plan.directions is not None
        summary = summarise(done, sums, plan.recipe.alpha, steered=steered)
        return [*job.plan.warnings, *summary.warnings()]


class _Shelf:
    """Takes the bytes of a shard as a shard writer does, and puts them into tensors."""

    def __init__(self, steps: Sequence[Step], targets: Mapping[str, torch.Tensor]) -> None:
        self._steps = [step for step in steps if step.nbytes]
        self._offsets = [step.offset for step in self._steps]
        self._targets = targets

    def write(self, _sequence: int, data: memoryview, offset: int) -> None:
        """Convert what would be written at ``offset`` into its tensor; of one tensor, no more."""
        import torch

        if not data:
            return
        step = self._steps[bisect_right(self._offsets, offset) - 1]
        made = torch.frombuffer(data, dtype=_torch_dtype(step.dtype))
        start = (offset - step.offset) * 8 // step.dtype.bits
        self._targets[step.name][start : start + len(made)].copy_(made)

    def finish(self, _size: int) -> str:
        """Say that it is whole."""
        return ""


def outline(plan: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of every tensor of a plan."""
    return {step.name: (step.source.shape, step.dtype.name) for step in plan.steps}


def lay_out(plan: Plan, pair: Pair) -> tuple[dict[str, Place], dict[str, torch.Tensor]]:
    """Return a place for every step of a plan, and the tensors that it is in, yet to be filled.

    They are the tensors of the checkpoint, but for experts that are stored one by one where the
    model has them stacked: these are made stacked, or they would be held twice.
    """
    import torch

    steps = {step.name: step for step in plan.steps}
    places = {name: Place(name, 0) for name in steps}
    shapes = {name: step.source.shape for name, step in steps.items()}
    for fused, spec in (experts.together(pair.unlearned) or {}).items():
        names = [piece.name for piece in spec.pieces]
        kinds = {steps[name].dtype for name in names if name in steps}
        if not names or len(kinds) != 1 or not set(names) <= steps.keys() or fused in steps:
            continue
        start = 0
        for name in names:
            places[name] = Place(fused, start)
            start += steps[name].elements
            del shapes[name]
        shapes[fused] = spec.shape
    dtypes = {place.name: _torch_dtype(steps[name].dtype) for name, place in places.items()}
    return places, {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}


def recognised(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], missing: set[str]
) -> tuple[dict[str, str], list[str]]:
    """Tell which parameter each tensor became, by its memory; and which parameters are none."""
    kept: dict[str, torch.Tensor] = model.state_dict()
    at: dict[tuple[object, ...], str] = {}
    for name, tensor in kept.items():
        at.setdefault(_memory(tensor), name)
    found = {
        name: at[_memory(tensor)]
        for name, tensor in state.items()
        if tensor.numel() and _memory(tensor) in at
    }
    memories = {_memory(state[name]) for name in found}
    converted = [
        name
        for name, tensor in kept.items()
        if tensor.numel() and _memory(tensor) not in memories and name not in missing
    ]
    return found, converted


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _torch_dtype(dtype: DType) -> torch.dtype:
    import torch

    found = getattr(torch, _MOVED.get(dtype.name) or dtype.torch or "")
    assert isinstance(found, torch.dtype)  # noqa: S101 - the tables name torch's own types
    return found
