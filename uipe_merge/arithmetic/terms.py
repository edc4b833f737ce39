"""What a step is made of. No torch: the plan holds it."""

from __future__ import annotations

from typing import NamedTuple


class Vector(NamedTuple):
    """A difference of two operands, or one operand itself.

    Operand 0 is θ₀, operand 1 θᵤ; further ones follow.

    Attributes:
        new: The operand.
        old: The operand that is subtracted; −1 for none.
    """

    new: int
    old: int


class Term(NamedTuple):
    """One summand of a step s = Σ c·x.

    Attributes:
        coefficient: c.
        new: As in ``Vector``.
        old: As in ``Vector``.
    """

    coefficient: float
    new: int
    old: int
