"""arithmetic/blocks.py against a float64 reference rounded once (``reference.py``)."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import (
    EIGHT_BITS,
    FLOATS,
    FORMATS,
    assert_merged,
    doubles,
    dtype_id,
    mixed_pair,
    rounded,
    spacing,
    unrounded,
)

from uipe_merge.arithmetic.blocks import Cell, Moments, work_dtype

ALPHAS = [-1.0, 0.0, 0.1, 0.3, 2.0, 10.0, -0.5]
ELEMENTS = 2**16
TRIPLES = [
    *itertools.product(FLOATS, FLOATS, FLOATS),
    *((one, two, two) for one in FORMATS for two in EIGHT_BITS),
    *((one, two, two) for one in EIGHT_BITS for two in FLOATS),
]


def apply(
    original: torch.Tensor, unlearned: torch.Tensor, alpha: float, dtype: torch.dtype
) -> tuple[torch.Tensor, Moments]:
    """One cell, from scratch."""
    cell = Cell(ELEMENTS, work_dtype(original.dtype, unlearned.dtype, dtype))
    cell.load(original, unlearned)
    out = torch.empty(unlearned.shape, dtype=dtype)
    return out, cell.apply(alpha, out)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of an 8-bit or 16-bit type: both zeros, subnormals, extremes."""
    raw = torch.arange(256, dtype=torch.uint8)
    if dtype.itemsize == 2:
        raw = torch.stack([raw.repeat(256), raw.repeat_interleave(256)], dim=1).reshape(-1)
    values = raw.view(dtype)
    return values[torch.isfinite(values.double())]


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("dtype", [d for d in FORMATS if d != torch.float64], ids=dtype_id)
def test_the_references_rounding_agrees_with_torch(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    _, lowest, largest = FORMATS[dtype]
    spread = 2.0 ** rng.uniform(lowest - 12, math.log2(largest), 100_000)
    values = rng.choice([-1.0, 1.0], spread.shape) * spread
    if dtype != torch.float32:
        # torch narrows a double by way of float32; a value that is one is rounded once.
        values = values.astype(np.float32).astype(np.float64)
        every = np.sort(doubles(every_value(dtype)))
        values = np.concatenate([values, every, (every[1:] + every[:-1]) / 2])  # all ties
    assert np.array_equal(rounded(values, dtype), doubles(torch.from_numpy(values).to(dtype)))


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(("original", "unlearned", "out"), TRIPLES, ids=dtype_id)
def test_equals_the_float64_reference_rounded_once(
    original: torch.dtype, unlearned: torch.dtype, out: torch.dtype
) -> None:
    one, two = mixed_pair(original, unlearned, (ELEMENTS,))
    for alpha in ALPHAS:
        result, moments = apply(one, two, alpha, out)
        assert_merged(result, one, two, alpha)
        assert moments.finite()


@pytest.mark.parametrize("alpha", [0.1, 0.25, 1.0, 2.0])
def test_float32_output_is_exactly_the_rounded_reference(alpha: float) -> None:
    one, two = mixed_pair(torch.float32, torch.float32, (ELEMENTS,), seed=3)
    result, _ = apply(one, two, alpha, torch.float32)
    assert np.array_equal(doubles(result), rounded(unrounded(one, two, alpha), torch.float32))


def test_the_arithmetic_is_one_size_wider_than_the_output() -> None:
    narrow = [d for d in FORMATS if d not in (torch.float32, torch.float64)]
    for original, unlearned, out in itertools.product(FORMATS, FORMATS, FORMATS):
        double = out not in narrow or torch.float64 in (original, unlearned)
        wanted = torch.float64 if double else torch.float32
        assert work_dtype(original, unlearned, out) == wanted


finite_bf16 = st.integers(-0x7EFF, 0x7EFF)  # bit patterns below 2**127, sign apart
coefficient = st.floats(-16, 16)


def from_patterns(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    raw = np.array([abs(p) | (0x8000 if p < 0 else 0) for p in patterns], np.uint16)
    return torch.from_numpy(raw.view(np.int16)).view(dtype)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(finite_bf16, finite_bf16), min_size=1, max_size=40), coefficient)
@example([(0, -1), (1, 1), (-1, 1), (0x7EFF, 1)], 0.5)
def test_any_pair_of_bfloat16_values_is_within_an_ulp(
    pairs: list[tuple[int, int]], alpha: float
) -> None:
    # Halved exponents keep every intermediate inside float32, as real weights are.
    one = from_patterns([int(p / 2) for p, _ in pairs], torch.bfloat16)
    two = from_patterns([int(p / 2) for _, p in pairs], torch.bfloat16)
    result, _ = apply(one, two, alpha, torch.bfloat16)
    exact = unrounded(one, two, alpha)
    largest = np.maximum(np.abs(doubles(two)), np.abs(alpha * (doubles(two) - doubles(one))))
    off = np.abs(doubles(result) - rounded(exact, torch.bfloat16))
    assert (off <= spacing(np.maximum(largest, np.abs(exact)), torch.bfloat16)).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.integers(0, 600), coefficient, st.sampled_from(FLOATS))
def test_a_result_does_not_depend_on_the_elements_beside_it(
    elements: int, cut: int, alpha: float, dtype: torch.dtype
) -> None:
    one, two = mixed_pair(dtype, dtype, (elements,), seed=elements)
    whole, _ = apply(one, two, alpha, dtype)
    parts = [slice(0, cut), slice(cut, None)]
    pieces = [apply(one[part], two[part], alpha, dtype)[0] for part in parts]
    assert np.array_equal(bits(whole), bits(torch.cat(pieces)))


def test_one_cell_serves_many_alphas_and_shorter_pieces() -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (5000,))
    cell = Cell(ELEMENTS, torch.float32)
    for count in (5000, 17, 1, 0, 4999):
        cell.load(one[:count], two[:count])
        for alpha in ALPHAS:
            out = torch.empty(count, dtype=torch.bfloat16)
            moments = cell.apply(alpha, out)
            fresh, wanted = apply(one[:count], two[:count], alpha, torch.bfloat16)
            assert np.array_equal(bits(out), bits(fresh))
            assert moments == wanted


# ---------------------------------------------------------------- no update, no change


@pytest.mark.parametrize("alpha", [3.0, 0.1, 0.0, -0.0, -0.5, -2.0])
@pytest.mark.parametrize("dtype", [d for d in FORMATS if d.itemsize < 4], ids=dtype_id)
def test_without_an_update_every_value_keeps_its_bytes(dtype: torch.dtype, alpha: float) -> None:
    values = every_value(dtype)
    out, moments = apply(values, values, alpha, dtype)
    assert np.array_equal(bits(out), bits(values))
    assert moments.changed == 0
    kept = torch.empty_like(values)
    Cell(len(values), torch.float32).keep(values, kept)
    assert np.array_equal(bits(kept), bits(values))


@pytest.mark.parametrize("alpha", [3.0, 0.1, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_without_an_update_zeros_and_subnormals_keep_their_bytes(
    dtype: torch.dtype, alpha: float
) -> None:
    tiny, info = torch.finfo(dtype).smallest_normal, torch.finfo(dtype)
    least = tiny * info.eps
    values = torch.tensor([0.0, -0.0, least, -least, tiny, -tiny / 2, 1.0, -info.max], dtype=dtype)
    assert np.array_equal(bits(apply(values, values, alpha, dtype)[0]), bits(values))


@pytest.mark.parametrize("alpha", [2.0, -0.5])
def test_the_sign_of_an_unlearned_zero_survives_an_original_zero_of_the_other_sign(
    alpha: float,
) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    out, _ = apply(zeros.flip(0), zeros, alpha, torch.bfloat16)
    assert np.array_equal(bits(out), bits(zeros))


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("alpha", [0.1, 2.0, -0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_moments_agree_with_float64(dtype: torch.dtype, alpha: float) -> None:
    one, two = mixed_pair(dtype, dtype, (ELEMENTS,), seed=5)
    out, moments = apply(one, two, alpha, dtype)
    old, new, result = doubles(one), doubles(two), doubles(out)
    update, step = new - old, result - new
    assert moments.update == pytest.approx(float(update @ update), rel=1e-5)
    assert moments.unlearned == pytest.approx(float(new @ new), rel=1e-5)
    assert moments.along == pytest.approx(float(step @ update), rel=1e-4)
    assert moments.changed == np.count_nonzero(step)
    missed = step - alpha * update
    # In float32 and wider the rounding error is itself at the edge of the working precision.
    if dtype.itemsize == 2:
        assert moments.error == pytest.approx(float(missed @ missed), rel=1e-3)
    else:
        assert moments.error <= 1e-13 * moments.update
    cell = Cell(ELEMENTS, work_dtype(dtype, dtype, dtype))
    cell.load(one, two)
    assert cell.differing() == np.count_nonzero(update)


def test_moments_whose_squares_overflow_float32_are_summed_again_in_float64() -> None:
    one = torch.tensor([1e30, 1.0, -2e30], dtype=torch.bfloat16)
    two = torch.tensor([1.5e30, 1.0, -1e30], dtype=torch.bfloat16)
    cell = Cell(3, torch.float32)
    cell.load(one, two)
    out = torch.empty(3, dtype=torch.bfloat16)
    assert not cell.apply(2.0, out).finite()
    assert_merged(out, one, two, 2.0)
    exact = cell.exact(2.0, out)
    old, new, result = doubles(one), doubles(two), doubles(out)
    wanted = Moments(
        update=float(np.sum((new - old) ** 2)),
        unlearned=float(np.sum(new**2)),
        along=float(np.sum((result - new) * (new - old))),
        error=float(np.sum((result - new - 2 * (new - old)) ** 2)),
        changed=2,
    )
    assert exact == pytest.approx(wanted, rel=1e-6)
    assert cell.overflow(2.0, out)[0] == 0


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["original", "unlearned", "both"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_a_value_that_is_not_finite_shows_in_the_moments(
    dtype: torch.dtype, side: str, bad: float
) -> None:
    one, two = mixed_pair(dtype, dtype, (1000,))
    for name, tensor in (("original", one), ("unlearned", two)):
        if side in (name, "both"):
            tensor[777] = bad
    assert not apply(one, two, 0.3, dtype)[1].finite()
    assert not apply(one, two, -2.0, dtype)[1].finite()


@pytest.mark.parametrize(
    ("dtype", "last", "first"),
    [
        (torch.float8_e4m3fn, 464.0, 464.25),  # 464 lies half-way to a 480 that is none
        (torch.float8_e5m2, 61439.0, 61440.0),
        (torch.float8_e4m3fnuz, 247.0, 248.0),
        (torch.float8_e5m2fnuz, 61439.0, 61440.0),
        (torch.float16, 65519.0, 65520.0),
        (torch.bfloat16, 3.39e38, 3.40e38),
    ],
    ids=dtype_id,
)
def test_an_overflow_shows_from_the_first_value_that_rounds_past_the_largest(
    dtype: torch.dtype, last: float, first: float
) -> None:
    largest = FORMATS[dtype].largest
    for sign, (start, result) in itertools.product((1, -1), ((0.0, last), (last, last))):
        one, two = torch.tensor([1.0, sign * start]), torch.tensor([1.0, sign * result])
        out, moments = apply(one, two, 0.5 if start == result else 0.0, dtype)
        assert doubles(out).tolist() == [1.0, sign * largest]
        assert moments.finite() or largest > 1e38  # only the square of the largest overflows
        one, two = torch.tensor([1.0, sign * first]), torch.tensor([1.0, sign * first])
        assert not apply(one, two, 0.5, dtype)[1].finite()
        cell = Cell(2, torch.float32)
        cell.load(one, two)
        count, largest_found = cell.overflow(0.5, torch.empty(2, dtype=dtype))
        assert count == 1
        assert largest_found == pytest.approx(first)


def test_overflow_counts_what_does_not_fit_and_names_the_largest_magnitude() -> None:
    one = torch.tensor([0.0, 100.0, 0.0, 0.0], dtype=torch.float8_e4m3fn)
    two = torch.tensor([-160.0, 100.0, 240.0, 144.0], dtype=torch.float8_e4m3fn)
    cell = Cell(4, torch.float32)
    cell.load(one, two)
    out = torch.empty(4, dtype=torch.float8_e4m3fn)
    assert not cell.apply(2.0, out).finite()
    assert cell.overflow(2.0, out) == (2, 720.0)
    assert cell.exact(2.0, out).along == math.inf  # clamped: no measure of a step
