"""θᵤ + α·(θᵤ − θ₀), a cell at a time.

Source of the rule: UIPE, arXiv 2503.04693. The sum is formed one size wider than the output
(float32 for 16-bit and 8-bit outputs, float64 where the output or an input is wider) and
rounded once, to nearest even.

Subtraction and multiplication are separate kernels on purpose: each is exactly rounded by
IEEE 754, so no element depends on whether it fell into a vector lane or into the tail, on
the block size or on the processor. A fused kernel (``torch.lerp``, ``add(alpha=)``) is
faster by a tenth of the run and promises none of that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SATURATES = {torch.float8_e4m3fn: 464.0}
"""Types whose conversion clamps silently, and the magnitude from which it would."""

_BY_CHANCE = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}
"""Digits and least exponent of the types that are rounded by chance where that is asked for."""

_WIDE = frozenset({torch.float32, torch.float64})


class Moments(NamedTuple):
    """Sums over one cell, from which the report is made. All dimensionless.

    Attributes:
        update: ‖v‖², with v = θᵤ − θ₀.
        unlearned: ‖θᵤ‖².
        along: ⟨θ_out − θᵤ, v⟩.
        error: ‖θ_out − θᵤ − α·v‖², what rounding did to the step.
        changed: Elements where θ_out ≠ θᵤ.
    """

    update: float
    unlearned: float
    along: float
    error: float
    changed: int

    def finite(self) -> bool:
        """Tell whether all sums are finite: they are if every value is."""
        return math.isfinite(self.update + self.unlearned + self.along + self.error)


class Change(NamedTuple):
    """What makes θ of stored values x: ``scale`` · x + ``delta``, both in the working type.

    Attributes:
        scale: One number for each element, or a single one; ``None`` for 1.
        delta: One number for each element; ``None`` for 0.
    """

    scale: torch.Tensor | None
    delta: torch.Tensor | None


def work_dtype(original: torch.dtype, unlearned: torch.dtype, out: torch.dtype) -> torch.dtype:
    """Return the type the arithmetic is done in: one size wider than the output.

    A float32 input beside a 16-bit output needs no more than float32; float64 anywhere
    needs float64.
    """
    double = out in _WIDE or torch.float64 in (original, unlearned)
    return torch.float64 if double else torch.float32


def by_chance(values: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to a 16-bit type up or down, so that the mean is the value: E[result] = values.

    A value between two neighbours of the type becomes the farther from zero with the share of
    the way it has gone from the nearer one; one that the type holds stays. What rounding to
    nearest would not make infinite becomes the largest number at most.

    Args:
        values: Shape ``(n,)``.
        noise: Numbers in [0, 1), float64, the same shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        Values of the type, in float64. Allocates.
    """
    digits, lowest = _BY_CHANCE[dtype]
    wide = values.double()
    magnitude = wide.abs()
    _, exponent = torch.frexp(magnitude)
    unit = torch.ldexp(torch.ones_like(wide), (exponent - 1).clamp(min=lowest) - (digits - 1))
    rounded = torch.floor(magnitude / unit + noise).mul_(unit)
    largest = torch.finfo(dtype).max
    rounded[(rounded > largest) & (magnitude < largest + unit / 2)] = largest
    return rounded.copysign_(wide)


def clamps(result: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the conversion of results to ``dtype`` clamps a value silently."""
    limit = SATURATES.get(dtype)
    if limit is None:
        return False
    return result.numel() > 0 and float(result.abs().max()) > limit


class Cell:
    """The buffers of one thread for one working type, reused for every cell."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        """Allocate for at most ``elements`` (below 2²⁴) elements of ``dtype``."""
        self._buffers = torch.empty((4, elements), dtype=dtype)
        self._views = self._buffers.unbind()
        self._update_square = self._unlearned_square = 0.0

    def load(
        self,
        original: torch.Tensor,
        unlearned: torch.Tensor,
        changes: Sequence[Change | None] = (None, None),
    ) -> None:
        """Widen θ₀ and θᵤ, both of shape ``(n,)``, and form the update.

        ``changes`` are what scales and adapters make of the two, after they are widened.

        ``apply`` may then be called for any number of α.
        """
        count = unlearned.numel()
        self._views = tuple(buffer[:count] for buffer in self._buffers)
        wide, back, _, _ = self._views
        wide.copy_(unlearned)
        back.copy_(original)
        for buffer, change in zip((back, wide), changes, strict=True):
            if change is not None and change.scale is not None:
                buffer.mul_(change.scale)
            if change is not None and change.delta is not None:
                buffer.add_(change.delta)
        # The update with its sign turned, θ₀ − θᵤ: see _backward_step.
        torch.sub(back, wide, out=back)
        self._update_square = float(torch.dot(back, back))
        self._unlearned_square = float(torch.dot(wide, wide))

    def keep(self, unlearned: torch.Tensor, out: torch.Tensor) -> Moments:
        """Write θᵤ itself to ``out``, for a cell whose update is known to be zero."""
        wide = self._buffers[0][: unlearned.numel()]
        wide.copy_(unlearned)
        out.copy_(unlearned)
        return Moments(0.0, float(torch.dot(wide, wide)), 0.0, 0.0, 0)

    def apply(self, alpha: float, out: torch.Tensor, noise: torch.Tensor | None = None) -> Moments:
        """Write θᵤ + α·v to ``out``, of shape ``(n,)`` and the output type, rounded once.

        To nearest, or with ``noise`` (numbers in [0, 1), float64) by chance: see ``by_chance``.

        An element with v = 0 keeps θᵤ, the sign of zero included. If an input or a result is
        not finite, neither are the moments; the caller then looks for the place.
        """
        wide, back, step, result = self._views
        self._form(alpha)
        out.copy_(result if noise is None else by_chance(result, noise, out.dtype))
        clamped = clamps(result, out.dtype)
        result.copy_(out)
        torch.sub(result, wide, out=result)
        along = -float(torch.dot(result, back))
        torch.add(result, step, out=step)
        error = math.inf if clamped else float(torch.dot(step, step))
        # Each sign is −1, 0 or 1, and fewer than 2²⁴ of them are summed: the count is exact.
        torch.sign(result, out=result)
        changed = float(torch.dot(result, result))
        return Moments(
            self._update_square,
            self._unlearned_square,
            along,
            error,
            int(changed) if math.isfinite(changed) else 0,
        )

    def differing(self) -> float:
        """Count the elements of the loaded cell with v ≠ 0."""
        _, back, step, _ = self._views
        torch.sign(back, out=step)
        return float(torch.dot(step, step))

    def overflow(self, alpha: float, out: torch.Tensor) -> tuple[int, float]:
        """Count what ``out`` cannot hold of the loaded cell's result, and the largest |θ|.

        For the error message. Allocates; not for the block loop.
        """
        self._form(alpha)
        result = self._views[3].abs()
        out.copy_(result)
        over = ~torch.isfinite(out.double()) | (result > SATURATES.get(out.dtype, math.inf))
        return int(over.sum()), float(result.max()) if result.numel() else 0.0

    def exact(self, alpha: float, out: torch.Tensor) -> Moments:
        """Return the moments of the loaded cell for a written ``out``, summed in float64.

        For the rare cell whose values are finite but whose squares overflow float32. What the
        conversion clamped measures no step: ``along`` and ``error`` are infinite then.
        Allocates; not for the block loop.
        """
        wide, back, _, _ = (view.double() for view in self._views)
        moved = out.double() - wide
        missed = moved + alpha * back
        limit = SATURATES.get(out.dtype, math.inf)
        clamped = bool(((wide - alpha * back).abs() > limit).any())
        return Moments(
            float(torch.dot(back, back)),
            float(torch.dot(wide, wide)),
            math.inf if clamped else -float(torch.dot(moved, back)),
            math.inf if clamped else float(torch.dot(missed, missed)),
            int(torch.count_nonzero(moved)),
        )

    def _form(self, alpha: float) -> None:
        """Fill the step buffer, and the result buffer with what is to be rounded."""
        wide, _, step, result = self._views
        self._backward_step(alpha)
        torch.sub(wide, step, out=result)

    def _backward_step(self, alpha: float) -> None:
        """Fill the step buffer with −α·v, so that +0 stands where v = 0.

        θᵤ − (+0) is θᵤ for either zero, while θᵤ + 0 would turn −0 into +0: with the step
        subtracted, bytes of unchanged elements stay as they are.
        """
        _, back, step, _ = self._views
        torch.mul(back, abs(alpha), out=step)
        if alpha < 0:
            step.neg_().add_(0.0)  # −0 + 0 is +0; all else is unchanged


class TaskCell(Cell):
    """θ₀ + w·v with the weight w = 1 + α, by the operations of task arithmetic in their order.

    The same rule from the other end (task arithmetic: arXiv 2212.04089), for results that have the
    bits of programs that start there. It differs from ``Cell`` by roundings of the working type:
    where v = 0 it keeps θ₀, but for a −0, which becomes +0; and α = 0 need not give θᵤ.

    Attributes:
        weight: w, to be set before ``apply``: near 0 it has digits that 1 + α has not.
    """

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        """As ``Cell``, with one more buffer for θ₀."""
        super().__init__(elements, dtype)
        self.weight = 0.0
        self._start = torch.empty(elements, dtype=dtype)

    def load(
        self,
        original: torch.Tensor,
        unlearned: torch.Tensor,
        changes: Sequence[Change | None] = (None, None),
    ) -> None:
        """As ``Cell.load``, keeping θ₀."""
        super().load(original, unlearned, changes)
        start = self._start[: original.numel()]
        start.copy_(original)
        change = changes[0]
        if change is not None and change.scale is not None:
            start.mul_(change.scale)
        if change is not None and change.delta is not None:
            start.add_(change.delta)

    def keep(self, unlearned: torch.Tensor, out: torch.Tensor) -> Moments:
        """Write θ₀ + 0 to ``out``, for a cell whose update is known to be zero."""
        moments = super().keep(unlearned, out)
        out.copy_(self._buffers[0][: unlearned.numel()].add_(0.0))
        return moments

    def _form(self, alpha: float) -> None:
        _, back, _, result = self._views
        self._backward_step(alpha)
        torch.neg(back, out=result)
        result.mul_(self.weight).add_(0.0)
        torch.add(self._start[: result.numel()], result, out=result)
