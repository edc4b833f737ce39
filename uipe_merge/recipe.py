"""What the user asked for: frozen, checked, and written down the same way every time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from uipe_merge.checkpoint.dtypes import OUTPUT_DTYPES
from uipe_merge.errors import NumericError, RecipeError, UsageError

ALPHA_LIMIT = 2.0**24
"""From here on θᵤ is smaller than the rounding of α·v in float32 and is lost in the sum."""

FORMS = ("model", "adapter")
"""What may be written: a whole model, or the adapter that makes it of the original."""

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The merge θᵤ + α·(θᵤ − θ₀).

    Attributes:
        alpha: The amplification α, dimensionless. 0 is the unlearned model, −1 the original.
        dtype: ``auto`` (each tensor keeps the unlearned checkpoint's) or a key of
            ``OUTPUT_DTYPES``.
        max_shard_bytes: Largest output shard; ``None`` keeps the unlearned shard layout.
        form: One of ``FORMS``.

    Raises:
        RecipeError: α is not a finite number.
        NumericError: α is so large that θᵤ would be lost in the arithmetic.
        UsageError: The dtype, the shard size or the form makes no sense.
    """

    alpha: float
    dtype: str = "auto"
    max_shard_bytes: int | None = None
    form: str = "model"

    def __post_init__(self) -> None:
        """Check every field."""
        if not math.isfinite(self.alpha):
            raise RecipeError(
                f"alpha is {self.alpha}", remedy="give a finite number, for example --alpha 2"
            )
        if abs(self.alpha) >= ALPHA_LIMIT:
            raise NumericError(
                f"alpha {self.alpha:g} is so large that nothing of the model would be left",
                remedy=f"choose |alpha| below {ALPHA_LIMIT:g}; values up to 5 are usual",
            )
        if self.dtype != "auto" and self.dtype not in OUTPUT_DTYPES:
            raise UsageError(
                f"unknown dtype '{self.dtype}'",
                remedy=f"choose auto or one of {', '.join(OUTPUT_DTYPES)}",
            )
        if self.max_shard_bytes is not None and self.max_shard_bytes <= 0:
            raise UsageError(
                f"a shard of {self.max_shard_bytes} bytes holds nothing",
                remedy="give a size such as 5GB",
            )
        if self.form not in FORMS:
            raise UsageError(
                f"cannot write '{self.form}'", remedy=f"choose one of {', '.join(FORMS)}"
            )
        if self.form == "adapter" and self.max_shard_bytes is not None:
            raise UsageError(
                "an adapter is one file, whatever its size", remedy="leave out --max-shard-size"
            )

    def canonical(self) -> dict[str, object]:
        """Return the recipe as plain values, α as an exact hexadecimal float."""
        return {
            "alpha": float(self.alpha).hex(),
            "dtype": self.dtype,
            "max_shard_bytes": self.max_shard_bytes,
            "as": self.form,
        }


def parse_size(text: str) -> int:
    """Return the bytes of ``5GB``, ``500 MB`` or ``2GiB`` (decimal unless there is an ``i``).

    Raises:
        UsageError: It is not a positive size.
    """
    match = _SIZE.fullmatch(text.strip())
    base = 1024 if match and match[3] else 1000
    size = int(float(match[1]) * base ** _POWERS[match[2].upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"'{text}' is not a shard size", remedy="give one such as 5GB or 500MB")
    return size
