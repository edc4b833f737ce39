"""Types of the compiled ``fused.c``."""

def extrapolate(
    original: memoryview,
    original_type: bytes,
    unlearned: memoryview,
    unlearned_type: bytes,
    out: memoryview,
    out_type: bytes,
    alpha: float,
    cell: int,
    by_chance: bool,
    key: int,
    first: int,
    /,
) -> list[tuple[float, ...]]:
    """Fill ``out`` with θᵤ + α·v. A type is ``b"B"`` for bfloat16, ``b"F"`` for float32.

    With ``by_chance`` a bfloat16 output is rounded up or down by the noise of ``key``, the
    buffers beginning at element ``first`` of the tensor; see ``arithmetic.noise``.

    Returns, for every ``cell`` elements, the five moments of ``blocks.Moments`` and the count
    of v ≠ 0. Where one is not finite, neither need the weights be right.

    Raises:
        ValueError: The buffers hold different numbers of elements, or a type is another.
    """
