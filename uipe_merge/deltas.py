"""What scales, adapters and chance make of the operands of a step. Importing this imports torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from uipe_merge.arithmetic.blocks import Change
from uipe_merge.arithmetic.blockscale import scale_slice
from uipe_merge.arithmetic.dora import add_squares, spread
from uipe_merge.arithmetic.lowrank import product_slice
from uipe_merge.arithmetic.noise import random_direction
from uipe_merge.errors import NumericError
from uipe_merge.kernels import DeltaCells, no_deltas, torch_dtype, working
from uipe_merge.once import Once
from uipe_merge.plan import CELL
from uipe_merge.reader import BlockReader, Pair, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.checkpoint.header import Factor, TensorSpec
    from uipe_merge.plan import Operand, Step

Growths = Once[torch.Tensor]
"""What the threads of a run share: of each DoRA matrix m/‖W + c·B·A‖ − 1, one per output."""


class Loaded(NamedTuple):
    """A factor in the working type.

    Attributes:
        left: Of shape ``(matrices, rows, rank)``; a vector where there is no ``right``.
        right: Of shape ``(matrices, rank, columns)``.
        scale: c.
        growth: For DoRA m/‖W + c·B·A‖ − 1, of shape ``(rows, 1)`` or ``(1, columns)``.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    scale: float
    growth: torch.Tensor | None = None


Beside = tuple[list[Loaded], torch.Tensor | None]
"""Factors and scales of one operand."""


class Deltas:
    """Scales and factors of the tensor in hand, loaded once per thread and tensor."""

    def __init__(self, pair: Pair, growths: Growths) -> None:
        """Open nothing yet."""
        self._pair = pair
        self._growths = growths
        self._reader = BlockReader(pair, 1, 1)
        self._name = ""
        self._loaded: dict[tuple[Operand, torch.dtype], Beside] = {}

    def at(self, step: Step, first: int) -> DeltaCells:
        """Return the changes of a block that begins at element ``first`` of the tensor.

        Raises:
            NumericError: DoRA would divide by the norm of an output that is all zeros.
        """
        operands = step.operands
        random = any(operand.noise is not None for operand in operands)
        if not step.elements or not (step.changed or random):
            return no_deltas
        work = working(step)
        if step.name != self._name:
            self._name, self._loaded = step.name, {}
        # By operand: the plans of a grid share most of theirs.
        loaded = [self._beside(operand, work) for operand in operands]

        def cells(start: int, stored: Sequence[torch.Tensor]) -> list[Change | None]:
            at, count = first + start, stored[0].numel()
            return [
                Change(None, random_direction(key, at, count).to(work))
                if key is not None
                else Change(_spread(spec, scales, at, count), _sum(factors, at, values))
                for (_, spec, key), (factors, scales), values in zip(
                    operands, loaded, stored, strict=True
                )
            ]

        return cells

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _beside(self, operand: Operand, work: torch.dtype) -> Beside:
        key = (operand, work)
        if key not in self._loaded:
            side, spec, _ = operand
            self._loaded[key] = (
                self._load(spec, side, work),
                self._load_scales(spec, side, work),
            )
        return self._loaded[key]

    def _load(self, spec: TensorSpec, side: int, work: torch.dtype) -> list[Loaded]:
        loaded: list[Loaded] = []
        for factor in spec.factors:
            fresh = self._factor(factor, side, work)
            if factor.magnitude is not None:
                key = (spec, side, work, len(loaded))
                compute = partial(self._growth, spec, side, [*loaded, fresh], work)
                fresh = fresh._replace(growth=self._growths.get(key, compute))
            loaded.append(fresh)
        return loaded

    def _load_scales(self, spec: TensorSpec, side: int, work: torch.dtype) -> torch.Tensor | None:
        return None if spec.scales is None else self._tensor(spec.scales.values, side, work)

    def _factor(self, factor: Factor, side: int, work: torch.dtype) -> Loaded:
        left = self._tensor(factor.left, side, work)
        if factor.right is None:
            return Loaded(left.reshape(-1), None, factor.scale)
        right = self._tensor(factor.right, side, work)
        # PEFT lays a stack out with the expert first in A's rows and last in B's columns.
        right = right.reshape(factor.experts, -1, right.shape[1])
        left = left.reshape(left.shape[0], -1, factor.experts).permute(2, 0, 1)
        if factor.transposed:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        return Loaded(left.contiguous(), right.contiguous(), factor.scale)

    def _growth(
        self, spec: TensorSpec, side: int, chain: list[Loaded], work: torch.dtype
    ) -> torch.Tensor:
        """Read a whole matrix for the norms of its outputs, with the last of a chain of factors.

        Holds a cell at a time. The norms are summed in float64, in the order of the elements.
        """
        factor = spec.factors[len(chain) - 1]
        assert factor.magnitude is not None  # noqa: S101 - that is why we are here
        rows, columns = spec.shape
        sums = torch.zeros((1, columns) if factor.transposed else (rows, 1), dtype=torch.float64)
        reader = BlockReader(self._pair, 8, CELL)
        try:
            for start, dtype, data in reader.blocks(spec, side):
                stored = torch.frombuffer(data, dtype=torch_dtype(dtype))
                delta = _sum(chain, start, stored)
                assert delta is not None  # noqa: S101 - the chain is not empty
                add_squares(sums, (stored.to(work) + delta).double(), start, columns)
        finally:
            reader.close()
        zeros = torch.nonzero(sums.reshape(-1) == 0)
        if len(zeros):
            raise NumericError(
                f"with its adapter is zero in {len(zeros)} of {sums.numel()} outputs, the first at "
                f"index {int(zeros[0])}, and DoRA divides by their norm",
                file=shown(self._pair, spec, side),
                tensor=spec.name,
                remedy="this adapter cannot be merged onto this base",
            )
        magnitude = self._tensor(factor.magnitude, side, torch.float64)
        return (magnitude.reshape(sums.shape) / sums.sqrt() - 1).to(work)

    def _tensor(self, spec: TensorSpec, side: int, work: torch.dtype) -> torch.Tensor:
        raw = self._reader.whole(spec, side)
        if not raw:
            return torch.empty(spec.shape, dtype=work)
        stored = torch.frombuffer(raw, dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
        return stored.to(work)


def _spread(
    spec: TensorSpec, scales: torch.Tensor | None, start: int, count: int
) -> torch.Tensor | None:
    """Return the scales of ``count`` elements from ``start`` of one side."""
    if spec.scales is None or scales is None or not spec.scales.block:
        return scales
    grid = scales.reshape(-1, *scales.shape[-2:])
    return scale_slice(grid, spec.scales.block, spec.shape[-2:], start, count)


def _sum(factors: list[Loaded], start: int, stored: torch.Tensor) -> torch.Tensor | None:
    """Add up the updates of one side for the elements from ``start`` that hold ``stored``."""
    total: torch.Tensor | None = None
    count = stored.numel()
    for left, right, scale, growth in factors:
        if right is None:
            part = left[start : start + count] * scale
        else:
            part = product_slice(left, right, scale, start, count)
        total = part if total is None else total + part
        if growth is not None and right is not None:
            # (θ + δ)·s = θ + δ + (θ + δ)·(s − 1): the difference is small, and so its rounding.
            factor = spread(growth, left.shape[1], right.shape[2], start, count)
            total = total + (stored.to(total.dtype) + total) * factor
    return total
