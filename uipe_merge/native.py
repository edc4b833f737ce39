"""The compiled arithmetic, where it was built and knows the types of a step; needs no torch.

It is a faster way to the same bytes and nothing else: whatever it does not cover, and every
block in which it meets a value that is not finite, is left to ``kernels``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from uipe_merge.arithmetic.terms import Arithmetic
from uipe_merge.plan import CELL

try:
    from uipe_merge.arithmetic import fused
except ImportError:  # built where there was no compiler
    COMPILED = False
else:
    COMPILED = True

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.arithmetic.terms import Vector
    from uipe_merge.plan import Plan, Step

_TYPES = {"BF16": b"B", "F16": b"H", "F32": b"F"}
_ARITHMETICS = get_args(Arithmetic)
_MOST = 12
"""Operands, terms and vectors that the compiled functions take."""

MOST_ALPHAS = 16
"""α that they take at once."""


def covers(step: Step) -> bool:
    """Tell whether a step can be done here."""
    if step.operation != "extrapolate" or not COMPILED:
        return False
    assert step.original is not None  # noqa: S101 - the plan gives it for this operation
    if step.changed or step.dtype.name not in _TYPES:
        return False
    # What is compiled rounds by chance by cutting 16 bits off: right for bfloat16 alone.
    if step.noise is not None and (step.arithmetic != "wider" or step.dtype.name == "F16"):
        return False
    if step.source.dtype.name not in _TYPES or step.original.dtype.name not in _TYPES:
        return False
    if not step.further:
        return len(step.terms) <= _MOST
    known = all(spec.dtype.name in _TYPES and noise is None for _, spec, noise in step.further)
    return known and max(len(step.terms), 2 + len(step.further)) <= _MOST


def suffices(plan: Plan) -> bool:
    """Tell whether a plan needs no torch, unless it meets a value that is not finite."""
    copied = ("copy", "keep")
    return all(step.operation in copied or covers(step) for step in plan.steps)


def extrapolate(
    step: Step,
    alphas: Sequence[float],
    operands: Sequence[memoryview],
    outs: Sequence[memoryview],
    first: int = 0,
) -> list[list[tuple[float, ...]] | None]:
    """Fill every output with θᵤ + α·v; return its moments of each cell, as ``arithmetic.blocks``.

    ``operands`` are θ₀ and θᵤ, ``first`` is the element of the tensor that they begin at. There
    is one α, in place of the step's own, and one buffer of ``outs`` for each output, and at most
    ``MOST_ALPHAS``. ``None`` if one of an output's moments is not finite; what was written for it
    means nothing then.
    """
    every = _run(step, alphas, operands, outs, first)
    return [found and [moments[:5] for moments in found] for found in every]


def measure(
    step: Step,
    original: memoryview,
    unlearned: memoryview,
    out: memoryview,
    alphas: tuple[float, ...],
) -> list[tuple[float, ...]] | None:
    """Try several α on a block; return what ``Kernels.measure`` does, cell by cell.

    ``None`` if a sum is not finite.
    """
    tried = []
    for at in range(0, len(alphas), MOST_ALPHAS):
        some = alphas[at : at + MOST_ALPHAS]
        plain = step._replace(noise=None)
        for found in _run(plain, some, (original, unlearned), [out] * len(some), 0):
            if found is None:
                return None
            tried.append(found)
    rows = []
    for cells in zip(*tried, strict=True):
        update, square, *_, differing = cells[0]
        rows.append((update, square, differing, *(along for _, _, along, *_ in cells)))
    return rows


def mix(
    step: Step, operands: Sequence[memoryview], out: memoryview, first: int = 0
) -> list[tuple[float, ...]] | None:
    """Fill ``out`` with θᵤ + s; return the moments of each cell as in ``arithmetic.mixed``.

    ``None`` if one of them is not finite; as ``extrapolate``.
    """
    chance = (step.noise is not None, step.noise or 0, first)
    types, result = _types(step), _TYPES[step.dtype.name]
    found = fused.mix(tuple(operands), types, out, result, step.terms, CELL, *chance)
    return found if all(math.isfinite(sum(moments)) for moments in found) else None


def products(
    step: Step, operands: Sequence[memoryview], vectors: Sequence[Vector]
) -> list[tuple[float, ...]]:
    """Return the inner products of each cell; see ``MixedCell.products``."""
    wide = step.dtype.name == "F32"
    return fused.products(tuple(operands), _types(step), wide, tuple(vectors), CELL)


def _types(step: Step) -> bytes:
    return b"".join(_TYPES[operand.spec.dtype.name] for operand in step.operands)


def _run(
    step: Step,
    alphas: Sequence[float],
    operands: Sequence[memoryview],
    outs: Sequence[memoryview],
    first: int,
) -> list[list[tuple[float, ...]] | None]:
    original, unlearned = operands
    one, two = (_TYPES[operand.spec.dtype.name] for operand in step.operands)
    written = (tuple(outs), _TYPES[step.dtype.name], tuple(alphas))
    chance = (step.noise is not None, step.noise or 0, first)
    how = (_ARITHMETICS.index(step.arithmetic), step.weight)
    every = fused.extrapolate(original, one, unlearned, two, *written, CELL, *chance, *how)
    return [
        found if all(math.isfinite(sum(moments)) for moments in found) else None for found in every
    ]
