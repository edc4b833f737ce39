"""θᵤ + Σₜ cₜ·xₜ, a cell at a time: steps made of more checkpoints than two.

Every x is a difference of two *operands* or one operand itself; see ``terms``. Operands are
tensors of several checkpoints with the same number of elements. The working type and the one
rounding are those of ``blocks``, and so are the reasons for separate subtractions,
multiplications and additions.

The inner products are summed in one order, which ``mixed.c`` keeps too: coefficients made from
them must not depend on which of the two has run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from uipe_merge.arithmetic.blocks import SATURATES, by_chance, clamps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.arithmetic.blocks import Change
    from uipe_merge.arithmetic.terms import Term

_LANES = 16
"""Running sums of an inner product: one for each remainder of an element's number in its cell."""


class MixedMoments(NamedTuple):
    """Sums over one cell, from which the report is made. All dimensionless.

    Attributes:
        update: ‖v‖², with v = θᵤ − θ₀.
        unlearned: ‖θᵤ‖².
        along: ⟨θ_out − θᵤ, v⟩.
        error: ‖θ_out − θᵤ − s‖², what rounding did to the step s.
        changed: Elements where θ_out ≠ θᵤ.
        step: ‖s‖².
        asked: ⟨s, v⟩.
        realised: ⟨θ_out − θᵤ, s⟩.
    """

    update: float
    unlearned: float
    along: float
    error: float
    changed: int
    step: float
    asked: float
    realised: float

    def finite(self) -> bool:
        """Tell whether all sums are finite: they are if every value is."""
        return math.isfinite(sum(self))


class MixedCell:
    """The buffers of one thread for one working type, reused for every cell."""

    def __init__(self, elements: int, dtype: torch.dtype, operands: int) -> None:
        """Allocate for at most ``elements`` (below 2²⁴) elements of ``operands`` operands."""
        self._rows = torch.empty((operands, elements), dtype=dtype)
        self._buffers = torch.empty((3, elements), dtype=dtype)
        self._operands = self._rows.unbind()
        self._views = self._buffers.unbind()
        padded = max(1, -(-elements // _LANES)) * _LANES
        # Grows to one row a vector and one for their products: merging needs none.
        self._vectors = torch.empty((0, padded), dtype=torch.float64)

    def load(self, operands: Sequence[torch.Tensor], changes: Sequence[Change | None]) -> None:
        """Widen the operands, all of shape ``(n,)``.

        ``changes`` are what scales and adapters make of each, after it is widened.

        ``apply`` and ``products`` may then be called any number of times.
        """
        count = operands[0].numel()
        self._operands = tuple(row[:count] for row in self._rows[: len(operands)])
        self._views = tuple(buffer[:count] for buffer in self._buffers)
        for row, operand, change in zip(self._operands, operands, changes, strict=True):
            row.copy_(operand)
            if change is not None and change.scale is not None:
                row.mul_(change.scale)
            if change is not None and change.delta is not None:
                row.add_(change.delta)

    def apply(
        self, terms: Sequence[Term], out: torch.Tensor, noise: torch.Tensor | None = None
    ) -> MixedMoments:
        """Write θᵤ + s to ``out``, of shape ``(n,)`` and the output type, rounded once.

        To nearest, or with ``noise`` (numbers in [0, 1), float64) by chance: see ``by_chance``.

        An element where every x is 0 keeps θᵤ, the sign of zero included. If θ₀, θᵤ, an operand
        of a term or a result is not finite, neither are the moments; the caller then looks for
        the place.
        """
        original, wide = self._operands[:2]
        back, step, result = self._views
        self._backward_step(terms)
        torch.sub(original, wide, out=back)
        torch.sub(wide, step, out=result)
        out.copy_(result if noise is None else by_chance(result, noise, out.dtype))
        clamped = clamps(result, out.dtype)
        result.copy_(out)
        torch.sub(result, wide, out=result)
        update = float(torch.dot(back, back))
        along = -float(torch.dot(result, back))
        length = float(torch.dot(step, step))
        asked = float(torch.dot(step, back))
        realised = -float(torch.dot(result, step))
        torch.add(result, step, out=step)
        error = math.inf if clamped else float(torch.dot(step, step))
        # Each sign is −1, 0 or 1, and fewer than 2²⁴ of them are summed: the count is exact.
        torch.sign(result, out=result)
        changed = float(torch.dot(result, result))
        return MixedMoments(
            update,
            float(torch.dot(wide, wide)),
            along,
            error,
            int(changed) if math.isfinite(changed) else 0,
            length,
            asked,
            realised,
        )

    def overflow(self, terms: Sequence[Term], out: torch.Tensor) -> tuple[int, float]:
        """Count what ``out`` cannot hold of the loaded cell's result, and the largest |θ|.

        For the error message. Allocates; not for the block loop.
        """
        self._backward_step(terms)
        result = (self._operands[1] - self._views[1]).abs()
        out.copy_(result)
        over = ~torch.isfinite(out.double()) | (result > SATURATES.get(out.dtype, math.inf))
        return int(over.sum()), float(result.max()) if result.numel() else 0.0

    def exact(self, terms: Sequence[Term], out: torch.Tensor) -> MixedMoments:
        """Return the moments of the loaded cell for a written ``out``, summed in float64.

        For the rare cell whose values are finite but whose squares overflow float32. What the
        conversion clamped measures no step: the moments of θ_out − θᵤ are infinite then.
        Allocates; not for the block loop.
        """
        operands = [operand.double() for operand in self._operands]
        original, wide = operands[:2]
        update = wide - original
        step = torch.zeros_like(wide)
        for term in terms:
            new = operands[term.new]
            step += (new if term.old < 0 else new - operands[term.old]) * term.coefficient
        moved = out.double() - wide
        missed = moved - step
        limit = SATURATES.get(out.dtype, math.inf)
        clamped = bool(((wide + step).abs() > limit).any())
        return MixedMoments(
            float(torch.dot(update, update)),
            float(torch.dot(wide, wide)),
            math.inf if clamped else float(torch.dot(moved, update)),
            math.inf if clamped else float(torch.dot(missed, missed)),
            int(torch.count_nonzero(moved)),
            float(torch.dot(step, step)),
            float(torch.dot(step, update)),
            math.inf if clamped else float(torch.dot(moved, step)),
        )

    def difference(self, new: int, old: int) -> torch.Tensor:
        """Return x of the loaded cell in the working type; see ``terms.Vector``.

        Read it before the next call: it is a buffer, or the operand itself.
        """
        if old < 0:
            return self._operands[new]
        return torch.sub(self._operands[new], self._operands[old], out=self._views[2])

    def products(self, vectors: Sequence[tuple[int, int]]) -> tuple[float, ...]:
        """Return ⟨xᵢ, xⱼ⟩ of the loaded cell for i ≤ j, row by row.

        Each x is formed in the working type, multiplied in float64, and summed in an order that
        is part of the result: element e into lane e mod 16, the lanes by halves.

        Args:
            vectors: ``(new, old)`` of each x, as in ``terms.Vector``.
        """
        count = self._operands[0].numel()
        padded = max(1, -(-count // _LANES)) * _LANES
        if len(self._vectors) <= len(vectors):
            self._vectors = self._vectors.new_empty((len(vectors) + 1, self._vectors.shape[1]))
        product, *filled = self._vectors[: len(vectors) + 1, :padded].unbind()
        for x, (new, old) in zip(filled, vectors, strict=True):
            x[count:] = 0.0
            x[:count].copy_(self.difference(new, old))
        found = []
        for i, one in enumerate(filled):
            for two in filled[i:]:
                torch.mul(one, two, out=product)
                found.append(_summed(product))
        return tuple(found)

    def _backward_step(self, terms: Sequence[Term]) -> None:
        """Fill the step buffer with −s, so that +0 stands where every x = 0.

        θᵤ − (+0) is θᵤ for either zero, while θᵤ + 0 would turn −0 into +0. The step begins at
        +0, and what is added to +0 is never −0.
        """
        _, step, turned = self._views
        step.zero_()
        for coefficient, new, old in terms:
            if old < 0:
                torch.neg(self._operands[new], out=turned)
            else:
                torch.sub(self._operands[old], self._operands[new], out=turned)
            step.add_(turned.mul_(coefficient))


def _summed(values: torch.Tensor) -> float:
    """Sum a multiple of 16 values in lanes; overwrites them.

    A running sum down a column adds row by row on a processor, where ``sum`` picks an order.
    """
    lanes = values.view(-1, _LANES).cumsum_(0)[-1]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes)
