"""From byte buffers to the cells of ``arithmetic.blocks``. Importing this imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from uipe_merge.arithmetic.blocks import Cell, Change, Moments, TaskCell, work_dtype
from uipe_merge.arithmetic.mixed import MixedCell, MixedMoments
from uipe_merge.arithmetic.noise import noise
from uipe_merge.bits import same_bytes
from uipe_merge.plan import CELL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uipe_merge.arithmetic.terms import Vector
    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.plan import Step


THREADS_FOUND = torch.get_num_threads()
"""What torch had before the first ``Kernels`` was made."""

DeltaCells = Callable[[int, Sequence[torch.Tensor]], Sequence[Change | None]]
"""Gives what scales and adapters make of the values stored for the operands, from element ``start``
of a block and what is stored for each."""


def no_deltas(_start: int, stored: Sequence[torch.Tensor]) -> list[None]:
    """Say that the stored values are θ₀, θᵤ and so on."""
    return [None] * len(stored)


class Piece(NamedTuple):
    """One cell of a block.

    Attributes:
        original: θ₀, shape ``(n,)`` with n ≤ ``CELL``.
        unlearned: θᵤ, the same shape.
        out: Where the result goes, the same shape in the output type.
        unchanged: Whether θ₀ and θᵤ hold the same bytes and θᵤ is already of the output type.
        deltas: What scales and adapters make of θ₀ and of θᵤ.
    """

    original: torch.Tensor
    unlearned: torch.Tensor
    out: torch.Tensor
    unchanged: bool
    deltas: Sequence[Change | None]


class Kernels:
    """The arithmetic of one thread, with its cells."""

    def __init__(self) -> None:
        """Keep torch to one core: the threads of the engine are the parallelism."""
        torch.set_num_threads(1)
        self._cells: dict[tuple[torch.dtype, bool], Cell] = {}
        self._mixing: dict[tuple[torch.dtype, int], MixedCell] = {}

    def extrapolate(
        self,
        step: Step,
        operands: Sequence[memoryview],
        out: memoryview,
        deltas: DeltaCells = no_deltas,
        first: int = 0,
    ) -> Iterator[tuple[Moments, bool]]:
        """Fill ``out`` with θᵤ + α·v, cell by cell; θ₀, θᵤ and it hold the same elements.

        ``first`` is the element of the tensor that they begin at.

        Yields the moments of each cell and whether they came out finite. Where they did not,
        they were summed again in float64, and the caller must find out whether a value, or
        only a square, is not finite.
        """
        cell = self._cell(step)
        original, unlearned = operands
        for piece in pieces(step, original, unlearned, out, deltas):
            at, count = first, len(piece.out)
            first += count
            if piece.unchanged:
                moments = cell.keep(piece.unlearned, piece.out)
                if moments.finite():
                    yield moments, True
                    continue
            cell.load(piece.original, piece.unlearned, piece.deltas)
            chance = None if step.noise is None else noise(step.noise, at, count)
            moments = cell.apply(step.alpha, piece.out, chance)
            if moments.finite():
                yield moments, True
            else:
                yield cell.exact(step.alpha, piece.out), False

    def measure(
        self,
        step: Step,
        original: memoryview,
        unlearned: memoryview,
        out: memoryview,
        alphas: tuple[float, ...],
        deltas: DeltaCells = no_deltas,
    ) -> Iterator[tuple[tuple[float, ...], bool]]:
        """Try several α on a block, writing to ``out`` only to see what is rounded away.

        Yields, per cell, ‖v‖², ‖θᵤ‖², the count of v ≠ 0 and ⟨θ_out − θᵤ, v⟩ for each α; and
        whether everything came out finite. A sum over α is infinite where the output overflows.
        """
        cell = self._cell(step)
        for piece in pieces(step, original, unlearned, out, deltas):
            if piece.unchanged:
                moments = cell.keep(piece.unlearned, piece.out)
                if moments.finite():
                    yield (0.0, moments.unlearned, 0.0, *(0.0 for _ in alphas)), True
                    continue
            cell.load(piece.original, piece.unlearned, piece.deltas)
            tried = []
            for alpha in alphas:
                moments = cell.apply(alpha, piece.out)
                exact = moments if moments.finite() else cell.exact(alpha, piece.out)
                tried.append((moments.finite(), exact))
            _, first = tried[0]
            row = (first.update, first.unlearned, cell.differing())
            finite = all(passed for passed, _ in tried)
            yield (*row, *(moments.along for _, moments in tried)), finite

    def overflow(
        self, step: Step, operands: Sequence[memoryview], deltas: DeltaCells = no_deltas
    ) -> tuple[int, float]:
        """Count the results that the output type cannot hold; also the largest magnitude.

        For a cast, both operands are its source.
        """
        out = memoryview(bytearray(step.source.elements * step.dtype.bits // 8))
        found = [(0, 0.0)]
        if step.terms:
            for start, mixed in self._mixed(step, operands, deltas):
                part = _view(out, step.dtype)[start : start + CELL]
                found.append(mixed.overflow(step.terms, part))
        else:
            original, unlearned = operands
            cell = self._cell(step)
            for piece in pieces(step, original, unlearned, out, deltas):
                cell.load(piece.original, piece.unlearned, piece.deltas)
                found.append(cell.overflow(step.alpha, piece.out))
        return sum(over for over, _ in found), max(most for _, most in found)

    def mix(
        self,
        step: Step,
        operands: Sequence[memoryview],
        out: memoryview,
        deltas: DeltaCells = no_deltas,
        first: int = 0,
    ) -> Iterator[tuple[MixedMoments, bool]]:
        """Fill ``out`` with θᵤ + s, s being the sum of the step's terms; as ``extrapolate``."""
        for start, cell in self._mixed(step, operands, deltas):
            part = _view(out, step.dtype)[start : start + CELL]
            key, at = step.noise, first + start
            chance = None if key is None else noise(key, at, part.numel())
            moments = cell.apply(step.terms, part, chance)
            finite = moments.finite()
            yield moments if finite else cell.exact(step.terms, part), finite

    def products(
        self,
        step: Step,
        operands: Sequence[memoryview],
        vectors: Sequence[Vector],
        deltas: DeltaCells = no_deltas,
    ) -> Iterator[tuple[float, ...]]:
        """Yield the inner products of each cell; see ``MixedCell.products``."""
        for _, cell in self._mixed(step, operands, deltas):
            yield cell.products(vectors)

    def update(
        self, step: Step, operands: Sequence[memoryview], deltas: DeltaCells = no_deltas
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield v of each cell and the element of the block that it begins at."""
        for start, cell in self._mixed(step, operands, deltas):
            yield start, cell.difference(1, 0)

    def _mixed(
        self, step: Step, operands: Sequence[memoryview], deltas: DeltaCells
    ) -> Iterator[tuple[int, MixedCell]]:
        """Load cell after cell of a block's operands."""
        if not step.elements:
            return
        key = (working(step), len(operands))
        if key not in self._mixing:
            self._mixing[key] = MixedCell(CELL, *key)
        cell = self._mixing[key]
        views = [
            _view(data, operand.spec.dtype)
            for data, operand in zip(operands, step.operands, strict=True)
        ]
        for start in range(0, len(views[0]), CELL):
            stored = [view[start : start + CELL] for view in views]
            cell.load(stored, deltas(start, stored))
            yield start, cell

    def cast(self, step: Step, source: memoryview, out: memoryview) -> None:
        """Convert ``source`` to the output type, rounded to nearest even."""
        if len(out):
            _view(out, step.dtype).copy_(_view(source, step.source.dtype))

    def _cell(self, step: Step) -> Cell:
        key = (working(step), step.arithmetic == "task")
        if key not in self._cells:
            work, task = key
            self._cells[key] = (TaskCell if task else Cell)(CELL, work)
        cell = self._cells[key]
        if isinstance(cell, TaskCell):
            cell.weight = step.weight
        return cell


def pieces(
    step: Step,
    original: memoryview,
    unlearned: memoryview,
    out: memoryview,
    deltas: DeltaCells = no_deltas,
) -> Iterator[Piece]:
    """Cut the bytes of a block into cells on a grid that starts at the tensor's beginning."""
    assert step.original is not None  # noqa: S101 - the plan gives it for this operation
    if not len(out):
        return
    one, two, three = step.original.dtype, step.source.dtype, step.dtype
    first, second, result = _view(original, one), _view(unlearned, two), _view(out, three)
    comparable = one == two == three and step.original.plain and step.source.plain
    width = two.lane_bytes
    for start in range(0, len(result), CELL):
        part = slice(start, start + CELL)
        raw = slice(start * width, (start + CELL) * width)
        unchanged = comparable and same_bytes(original[raw], unlearned[raw])
        old, new = first[part], second[part]
        yield Piece(old, new, result[part], unchanged, deltas(start, (old, new)))


def _view(data: memoryview, dtype: DType) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch_dtype(dtype))


def working(step: Step) -> torch.dtype:
    """Return the type that a step's arithmetic is done in: float64 if an operand asks for it."""
    if step.arithmetic != "wider":
        return torch.float32
    out = torch_dtype(step.dtype)
    stored = [torch_dtype(operand.spec.dtype) for operand in step.operands]
    wide = any(work_dtype(dtype, dtype, out) == torch.float64 for dtype in stored)
    return torch.float64 if wide else torch.float32


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's name for an element type that computes."""
    assert dtype.torch is not None  # noqa: S101 - only types that compute come here
    found = getattr(torch, dtype.torch)
    assert isinstance(found, torch.dtype)  # noqa: S101 - the table names torch's own types
    return found
