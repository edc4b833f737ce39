"""The merge again, for the tests: numpy in float64, rounded once and by hand.

Nothing here uses torch to compute or to round; torch tensors are only the form in which
values come and go. Every value of the types up to 32 bits is a float64.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from helpers import read_tensors, write_checkpoint
from numpy.typing import NDArray

import uipe_merge

Array = NDArray[np.float64]
Tensors = dict[str, torch.Tensor]


class Format(NamedTuple):
    """A binary format: significand bits with the implicit one, least exponent, largest value."""

    digits: int
    lowest: int
    largest: float


FORMATS = {
    torch.bfloat16: Format(8, -126, (2 - 2.0**-7) * 2.0**127),
    torch.float16: Format(11, -14, 65504.0),
    torch.float32: Format(24, -126, (2 - 2.0**-23) * 2.0**127),
    torch.float64: Format(53, -1022, float(np.finfo(np.float64).max)),
    torch.float8_e4m3fn: Format(4, -6, 448.0),
    torch.float8_e5m2: Format(3, -14, 57344.0),
    torch.float8_e4m3fnuz: Format(4, -7, 240.0),
    torch.float8_e5m2fnuz: Format(3, -15, 57344.0),
}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
EIGHT_BITS = [dtype for dtype in FORMATS if dtype.itemsize == 1]


def dtype_id(value: object) -> str:
    """A short name for a test's id."""
    return str(value).removeprefix("torch.")


def doubles(tensor: torch.Tensor) -> Array:
    """The values of a tensor, flattened; complex numbers as pairs."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return np.asarray(flat.reshape(-1).double().numpy(), np.float64)


def spacing(values: Array, dtype: torch.dtype) -> Array:
    """The distance of neighbours in ``dtype`` at the magnitude of each value (one ulp)."""
    digits, lowest, _ = FORMATS[dtype]
    _, exponents = np.frexp(values)
    exponents = np.where(values == 0, lowest, np.maximum(exponents - 1, lowest))
    return np.asarray(np.ldexp(1.0, exponents - (digits - 1)), np.float64)


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """Round to nearest, ties to even; what is past the largest value becomes infinite."""
    step = spacing(values, dtype)
    # A quotient by a power of two and below 2**53 is exact, and rint breaks ties to even.
    result = np.rint(values / step) * step
    return np.where(np.abs(result) > FORMATS[dtype].largest, np.copysign(np.inf, values), result)


def unrounded(original: torch.Tensor, unlearned: torch.Tensor, alpha: float) -> Array:
    """θᵤ + α·(θᵤ − θ₀) in float64."""
    new = doubles(unlearned)
    return new + alpha * (new - doubles(original))


def assert_merged(
    out: torch.Tensor, original: torch.Tensor, unlearned: torch.Tensor, alpha: float
) -> None:
    """Hold a merged tensor against the reference.

    All but 1e-3 of the elements are equal (one may always differ, for tensors too small for
    a share), and none is off by more than an ulp of the output at the largest of |θᵤ|,
    |α·v| and the result.
    """
    assert out.shape == unlearned.shape
    dtype = torch.float32 if out.is_complex() else out.dtype
    exact = unrounded(original, unlearned, alpha)
    wanted, got = rounded(exact, dtype), doubles(out)
    assert np.isfinite(wanted).all(), "the test's own values overflow"
    off = np.abs(got - wanted)
    new, old = doubles(unlearned), doubles(original)
    largest = np.maximum.reduce([np.abs(new), np.abs(alpha * (new - old)), np.abs(exact)])
    assert (off <= spacing(largest, dtype)).all(), (
        f"{out.dtype}: off by {np.max(off / spacing(largest, dtype)):g} ulp"
    )
    assert np.count_nonzero(off) <= max(1, off.size * 1e-3), (
        f"{out.dtype}: {np.count_nonzero(off)} of {off.size} differ"
    )


def mixed_pair(
    original: torch.dtype, unlearned: torch.dtype, shape: tuple[int, ...], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of unlike magnitudes: Gaussian, updates of every size, zeros, tiny values.

    Small enough for α = 10 in the narrowest type that either has.
    """
    rng = np.random.default_rng(seed)
    narrow = 1.0 if torch.finfo(original).bits > 8 and torch.finfo(unlearned).bits > 8 else 20.0
    count = int(np.prod(shape))
    theta = rng.normal(0, 0.02 * narrow, count) * 2.0 ** rng.integers(-12, 3, count)
    update = rng.normal(0, 1, count) * np.abs(theta) * 10.0 ** rng.uniform(-4, 0.3, count)
    kind = rng.integers(0, 40, count)
    update = np.where(kind == 0, 0.0, update)
    theta = np.where(kind == 1, 0.0, theta)
    theta = np.where(kind == 2, -0.0, theta)
    first, second = torch.from_numpy(theta).to(original), torch.from_numpy(theta + update)
    same = torch.from_numpy(kind <= 2)
    # With the same dtype, "no update" must mean the same stored value.
    second = torch.where(same, first.to(unlearned).double(), second)
    return first.reshape(shape), second.to(unlearned).reshape(shape)


class Models:
    """A pair on disk and in memory."""

    def __init__(self, root: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.original = {name: one for name, (one, _) in pairs.items()}
        self.unlearned = {name: two for name, (_, two) in pairs.items()}
        self.paths = (
            write_checkpoint(root / "original", self.original, shards=min(2, len(pairs))),
            write_checkpoint(root / "unlearned", self.unlearned, shards=min(3, len(pairs))),
        )

    def merge(self, output: Path, alpha: float, dtype: str = "auto") -> Tensors:
        """Merge, and read the output with the safetensors library."""
        uipe_merge.merge(*self.paths, output, alpha=alpha, dtype=dtype, progress=False)
        return read_tensors(output)
