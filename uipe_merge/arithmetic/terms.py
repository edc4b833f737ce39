"""What a step is made of. No torch: the plan holds it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Arithmetic = Literal["wider", "single", "task"]
"""How θᵤ + α·v is formed; see ``blocks``.

``wider``: as it stands, one size wider than the output. ``single``: in float32, whatever the output.
``task``: as θ₀ + w·v in float32, with the weight w = 1 + α.
"""


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
