"""Types of the compiled ``fused.c`` and ``mixed.c``."""

def extrapolate(
    original: memoryview,
    original_type: bytes,
    unlearned: memoryview,
    unlearned_type: bytes,
    outs: tuple[memoryview, ...],
    out_type: bytes,
    alphas: tuple[float, ...],
    cell: int,
    by_chance: bool,
    key: int,
    first: int,
    arithmetic: int = 0,
    weight: float = 0.0,
    /,
) -> list[list[tuple[float, ...]]]:
    """Fill each of ``outs`` with θᵤ + α·v, v being formed once for all of them.

    A type is ``b"B"`` for bfloat16, ``b"H"`` for float16, ``b"F"`` for float32.

    With ``by_chance`` a bfloat16 output is rounded up or down by the noise of ``key``, the
    buffers beginning at element ``first`` of the tensor; see ``arithmetic.noise``.
    ``arithmetic`` is 0 for one size wider than the output, 1 for float32 whatever the output, and 2
    for θ₀ + w·v in float32 with the ``weight`` w, as in ``blocks.TaskCell``; that is not rounded by chance.

    Returns, for each output and every ``cell`` elements, the five moments of ``blocks.Moments``
    and the count of v ≠ 0. Where one is not finite, neither need the weights be right.

    Raises:
        ValueError: The buffers hold different numbers of elements, a type or the arithmetic is
            another, or there is no output, more than sixteen, or another number of ``alphas``.
    """

def mix(
    operands: tuple[memoryview, ...],
    types: bytes,
    out: memoryview,
    out_type: bytes,
    terms: tuple[tuple[float, int, int], ...],
    cell: int,
    by_chance: bool,
    key: int,
    first: int,
    /,
) -> list[tuple[float, ...]]:
    """Fill ``out`` with θᵤ + s; s is the sum of the ``terms``, as ``terms.Term`` has them.

    Operand 0 is θ₀, operand 1 is θᵤ. ``types`` is a letter for each operand, and the letters,
    ``by_chance``, ``key`` and ``first`` are those of ``extrapolate``.

    Returns, for every ``cell`` elements, the eight moments of ``mixed.MixedMoments``. Where one
    is not finite, neither need the weights be right. An operand past the second that no term
    names has no part in them.

    Raises:
        ValueError: The buffers hold different numbers of elements, a type is another, a term
            names an operand that is not there, there are fewer than two operands, or more
            than twelve operands or terms, or float16 is to be rounded by chance.
    """

def products(
    operands: tuple[memoryview, ...],
    types: bytes,
    wide: bool,
    vectors: tuple[tuple[int, int], ...],
    cell: int,
    /,
) -> list[tuple[float, ...]]:
    """Return ⟨xᵢ, xⱼ⟩ for i ≤ j, row by row, for every ``cell`` elements.

    A vector is ``(new, old)`` as in ``terms.Vector``, formed in float64 if ``wide`` and in float32
    otherwise. The sums have the bits of ``mixed.MixedCell.products``.

    Raises:
        ValueError: The buffers hold different numbers of elements, a type is another, a vector
            names an operand that is not there, or there is no operand, or more than twelve
            operands or vectors.
    """
