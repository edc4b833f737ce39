"""The element types of the safetensors format, without torch.

Source: the ``Dtype`` list of the safetensors format. Each type carries what the rest of
the tool needs to know before any arithmetic library is loaded: its width, whether it is
moved or computed with, and the bit pattern of its non-finite values.
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One element type.

    Attributes:
        name: The name in a safetensors header, for example ``BF16``.
        bits: Width of an element in bits.
        torch: The attribute of ``torch`` that computes with it; ``None`` where elements
            are only ever moved (integers, booleans, packed formats).
        lanes: Real numbers per element: 2 for complex types, else 1.
        mask: Bits to look at, in one lane, to tell non-finite values.
        pattern: What those bits hold where the value is NaN or infinite.
    """

    name: str
    bits: int
    torch: str | None = None
    lanes: int = 1
    mask: int = 0
    pattern: int = 1

    @property
    def computes(self) -> bool:
        """Whether the update of such a tensor can be formed and extrapolated."""
        return self.torch is not None

    @property
    def lane_bytes(self) -> int:
        """Bytes of one real number."""
        return self.bits // 8 // self.lanes


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("BF16", 16, "bfloat16", 1, 0x7F80, 0x7F80),
        DType("F16", 16, "float16", 1, 0x7C00, 0x7C00),
        DType("F32", 32, "float32", 1, 0x7F80_0000, 0x7F80_0000),
        DType("F64", 64, "float64", 1, 0x7FF0 << 48, 0x7FF0 << 48),
        DType("C64", 64, "float32", 2, 0x7F80_0000, 0x7F80_0000),
        DType("F8_E4M3", 8, "float8_e4m3fn", 1, 0x7F, 0x7F),
        DType("F8_E5M2", 8, "float8_e5m2", 1, 0x7C, 0x7C),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", 1, 0xFF, 0x80),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", 1, 0xFF, 0x80),
        DType("BOOL", 8),
        DType("U8", 8),
        DType("I8", 8),
        DType("U16", 16),
        DType("I16", 16),
        DType("U32", 32),
        DType("I32", 32),
        DType("U64", 64),
        DType("I64", 64),
        DType("F8_E8M0", 8),
        DType("F4", 4),
        DType("F6_E2M3", 6),
        DType("F6_E3M2", 6),
    )
}

PACKED = frozenset({"F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"})
"""Types that occur only in block-scaled (quantised) checkpoints."""

OUTPUT_DTYPES: dict[str, DType] = {
    "float32": DTYPES["F32"],
    "bfloat16": DTYPES["BF16"],
    "float16": DTYPES["F16"],
}
"""What ``--dtype`` may ask for, besides ``auto``."""

CONVERTIBLE = frozenset({"BF16", "F16", "F32", "F64"})
"""Types that ``--dtype`` converts; all others keep their own."""
