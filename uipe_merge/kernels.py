"""From byte buffers to the cells of ``arithmetic.blocks``. Importing this imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from uipe_merge.arithmetic.blocks import Cell, Change, Moments, work_dtype
from uipe_merge.arithmetic.noise import noise
from uipe_merge.bits import same_bytes
from uipe_merge.plan import CELL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.plan import Step


DeltaCells = Callable[[int, torch.Tensor, torch.Tensor], tuple[Change | None, Change | None]]
"""Gives what scales and adapters make of the values stored for θ₀ and θᵤ, from element ``start``
of a block and what is stored for the two."""


def no_deltas(_start: int, _original: torch.Tensor, _unlearned: torch.Tensor) -> tuple[None, None]:
    """Say that the stored values are θ₀ and θᵤ."""
    return None, None


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
    deltas: tuple[Change | None, Change | None]


class Kernels:
    """The arithmetic of one thread, with its cells."""

    def __init__(self) -> None:
        """Keep torch to one core: the threads of the engine are the parallelism."""
        torch.set_num_threads(1)
        self._cells: dict[torch.dtype, Cell] = {}

    def extrapolate(
        self,
        step: Step,
        original: memoryview,
        unlearned: memoryview,
        out: memoryview,
        deltas: DeltaCells = no_deltas,
        first: int = 0,
    ) -> Iterator[tuple[Moments, bool]]:
        """Fill ``out`` with θᵤ + α·v, cell by cell; the three hold the same elements.

        ``first`` is the element of the tensor that they begin at.

        Yields the moments of each cell and whether they came out finite. Where they did not,
        they were summed again in float64, and the caller must find out whether a value, or
        only a square, is not finite.
        """
        cell = self._cell(step)
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
        self,
        step: Step,
        original: memoryview,
        unlearned: memoryview,
        deltas: DeltaCells = no_deltas,
    ) -> tuple[int, float]:
        """Count the results that the output type cannot hold; also the largest magnitude.

        For a cast, both inputs are its source.
        """
        cell = self._cell(step)
        elements = len(unlearned) * 8 // step.source.dtype.bits
        out = memoryview(bytearray(elements * step.dtype.bits // 8))
        count, largest = 0, 0.0
        for piece in pieces(step, original, unlearned, out, deltas):
            cell.load(piece.original, piece.unlearned, piece.deltas)
            over, most = cell.overflow(step.alpha, piece.out)
            count, largest = count + over, max(largest, most)
        return count, largest

    def cast(self, step: Step, source: memoryview, out: memoryview) -> None:
        """Convert ``source`` to the output type, rounded to nearest even."""
        if len(out):
            _view(out, step.dtype).copy_(_view(source, step.source.dtype))

    def _cell(self, step: Step) -> Cell:
        assert step.original is not None  # noqa: S101 - the plan gives it for this operation
        dtypes = (step.original.dtype, step.source.dtype, step.dtype)
        work = work_dtype(*(torch_dtype(dtype) for dtype in dtypes))
        if work not in self._cells:
            self._cells[work] = Cell(CELL, work)
        return self._cells[work]


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
        yield Piece(old, new, result[part], unchanged, deltas(start, old, new))


def _view(data: memoryview, dtype: DType) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch_dtype(dtype))


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's name for an element type that computes."""
    assert dtype.torch is not None  # noqa: S101 - only types that compute come here
    found = getattr(torch, dtype.torch)
    assert isinstance(found, torch.dtype)  # noqa: S101 - the table names torch's own types
    return found
