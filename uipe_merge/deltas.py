"""What scales and adapters make of the two sides of a step. Importing this imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from uipe_merge.arithmetic.blocks import Change, work_dtype
from uipe_merge.arithmetic.blockscale import scale_slice
from uipe_merge.arithmetic.lowrank import product_slice
from uipe_merge.kernels import DeltaCells, no_deltas, torch_dtype
from uipe_merge.reader import BlockReader, Pair

if TYPE_CHECKING:
    from uipe_merge.checkpoint.header import Factor, TensorSpec
    from uipe_merge.plan import Step

Loaded = tuple[torch.Tensor, torch.Tensor | None, float]


class Deltas:
    """Scales and factors of the tensor in hand, loaded once per thread and tensor."""

    def __init__(self, pair: Pair) -> None:
        """Open nothing yet."""
        self._reader = BlockReader(pair, 1, 1)
        self._name = ""
        self._factors: tuple[list[Loaded], list[Loaded]] = ([], [])
        self._scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def at(self, step: Step, first: int) -> DeltaCells:
        """Return the changes of a block that begins at element ``first`` of the tensor."""
        assert step.original is not None  # noqa: S101 - the plan gives it to what is extrapolated
        if step.original.plain and step.source.plain:
            return no_deltas
        if step.name != self._name:
            types = (step.original.dtype, step.source.dtype, step.dtype)
            work = work_dtype(*(torch_dtype(dtype) for dtype in types))
            side = 0 if step.from_original else 1
            self._factors = (
                self._load(step.original, 0, work),
                self._load(step.source, side, work),
            )
            self._scales = (
                self._load_scales(step.original, 0, work),
                self._load_scales(step.source, side, work),
            )
            self._name = step.name

        specs = (step.original, step.source)

        def cells(start: int, count: int) -> tuple[Change, Change]:
            one, two = (
                Change(
                    _spread(spec, scales, first + start, count), _sum(side, first + start, count)
                )
                for spec, scales, side in zip(specs, self._scales, self._factors, strict=True)
            )
            return one, two

        return cells

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _load(self, spec: TensorSpec, side: int, work: torch.dtype) -> list[Loaded]:
        return [self._factor(factor, side, work) for factor in spec.factors]

    def _load_scales(self, spec: TensorSpec, side: int, work: torch.dtype) -> torch.Tensor | None:
        return None if spec.scales is None else self._tensor(spec.scales.values, side, work)

    def _factor(self, factor: Factor, side: int, work: torch.dtype) -> Loaded:
        left = self._tensor(factor.left, side, work)
        if factor.right is None:
            return left.reshape(-1), None, factor.scale
        right = self._tensor(factor.right, side, work)
        if factor.transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        return left, right, factor.scale

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


def _sum(factors: list[Loaded], start: int, count: int) -> torch.Tensor | None:
    """Add up the updates of one side for ``count`` elements from ``start``."""
    total: torch.Tensor | None = None
    for left, right, scale in factors:
        if right is None:
            part = left[start : start + count] * scale
        else:
            part = product_slice(left, right, scale, start, count)
        total = part if total is None else total + part
    return total
