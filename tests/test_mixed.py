"""Steps made of several checkpoints: ``arithmetic.mixed`` and the compiled ``mixed.c``."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import FORMATS, Array, doubles, dtype_id, mixed_pair, rounded

from uipe_merge import native
from uipe_merge.arithmetic.blocks import Cell, Change, work_dtype
from uipe_merge.arithmetic.mixed import MixedCell, MixedMoments
from uipe_merge.arithmetic.noise import noise
from uipe_merge.arithmetic.terms import Term
from uipe_merge.plan import CELL

compiled = pytest.mark.skipif(not native.COMPILED, reason="this copy was built without a compiler")
if native.COMPILED:
    from uipe_merge.arithmetic import fused

LETTERS = {torch.bfloat16: b"B", torch.float16: b"H", torch.float32: b"F"}
TRIPLES = [(one, two, out) for one in LETTERS for two in LETTERS for out in LETTERS]
NARROW = [torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e4m3fnuz]
ALPHAS = [-1.0, -0.5, 0.0, -0.0, 0.1, 0.3, 2.0, 10.0]
ODD = [0, 1, 7, 15, 16, 17, 1023, 1024, 1025, 5000]  # around lanes and chunk
KEY = 0x0123456789ABCDEF

Terms = tuple[Term, ...]
Vectors = tuple[tuple[int, int], ...]

STEPS: list[Terms] = [
    (),
    (Term(0.7, 1, 0),),
    (Term(-0.3, 2, 0), Term(1.5, 1, 0)),
    (Term(0.5, 1, 0), Term(0.0, 2, 3), Term(-0.25, 3, 0), Term(1e-3, 0, 2)),
    (Term(0.1, 3, -1), Term(-0.2, 2, -1)),
    (Term(0.3, 1, 1), Term(-0.0, 3, -1)),
    tuple(Term(0.1 * (i - 5), i % 4, (i + 1) % 4) for i in range(12)),
]
VECTORS: list[Vectors] = [
    (),
    ((1, 0),),
    ((1, 0), (2, 0)),
    ((3, -1), (2, 0), (1, 1), (0, 3)),
    tuple((i % 4, (i // 4) - 1) for i in range(12)),
]


class Expected(NamedTuple):
    """What the reference makes of a step."""

    out: Array
    moments: tuple[float, ...]
    scales: tuple[float, ...]  # of each moment: what its rounding is measured by


def operands_of(dtypes: Sequence[torch.dtype], count: int, seed: int = 0) -> list[torch.Tensor]:
    """Tensors of unlike magnitudes; of each two, some elements are equal and some are ±0."""
    found: list[torch.Tensor] = []
    for at in range(0, len(dtypes), 2):
        one, two = dtypes[at], dtypes[min(at + 1, len(dtypes) - 1)]
        # Two more than are kept, for a pair is not made of nothing.
        found += (side[:count] for side in mixed_pair(one, two, (count + 2,), seed + at))
    return found[: len(dtypes)]


def working(operands: Sequence[torch.Tensor], wide: bool) -> list[NDArray[np.floating]]:
    real = np.float64 if wide else np.float32
    return [doubles(operand).astype(real) for operand in operands]


def backward_step(values: list[NDArray[np.floating]], terms: Terms) -> NDArray[np.floating]:
    """−s, each operation in the type of ``values``."""
    real = values[0].dtype.type
    step = np.zeros_like(values[0])
    for coefficient, new, old in terms:
        step = step + ((values[old] if old >= 0 else real(0)) - values[new]) * real(coefficient)
    return step


def expected(
    operands: Sequence[torch.Tensor], terms: Terms, dtype: torch.dtype, wide: bool
) -> Expected:
    values = working(operands, wide)
    merged = rounded((values[1] - backward_step(values, terms)).astype(np.float64), dtype)
    return Expected(merged, *moments_of([doubles(each) for each in operands], terms, merged))


def moments_of(
    values: list[Array], terms: Terms, merged: Array
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The sums in float64, and for each the norms that its rounding is measured by."""
    update, moved = values[1] - values[0], merged - values[1]
    step = np.zeros_like(update)
    for coefficient, new, old in terms:
        step += coefficient * (values[new] - (values[old] if old >= 0 else 0.0))
    pairs = [(update, update), (values[1], values[1]), (moved, update)]
    pairs += [(moved - step, moved - step), (step, step), (step, update), (moved, step)]
    found = [float(np.dot(one, two)) for one, two in pairs]
    scales = [float(np.linalg.norm(one) * np.linalg.norm(two)) for one, two in pairs]
    found.insert(4, float(np.count_nonzero(moved)))
    scales.insert(4, 0.0)
    # What rounding did is a difference of nearly equal numbers.
    scales[3] += (
        0.1 * math.sqrt(found[3]) * float(np.linalg.norm(values[1]) + np.linalg.norm(moved))
    )
    return tuple(found), tuple(scales)


def assert_moments(found: Sequence[float], wanted: Expected) -> None:
    off = np.abs(np.subtract(found, wanted.moments))
    assert (off <= np.multiply(1e-5, wanted.scales) + 1e-30).all(), off


def loaded(operands: Sequence[torch.Tensor], wide: bool) -> MixedCell:
    dtype = torch.float64 if wide else torch.float32
    cell = MixedCell(len(operands[0]), dtype, len(operands))
    cell.load(operands, [None] * len(operands))
    return cell


def through_torch(
    operands: Sequence[torch.Tensor],
    terms: Terms,
    dtype: torch.dtype,
    chance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, MixedMoments]:
    out = torch.empty(operands[0].shape, dtype=dtype)
    cell = loaded(operands, dtype in {torch.float32, torch.float64})
    return out, cell.apply(terms, out, chance)


def stored(operands: Sequence[torch.Tensor]) -> tuple[tuple[memoryview, ...], bytes]:
    buffers = tuple(memoryview(bits(operand).tobytes()) for operand in operands)
    return buffers, b"".join(LETTERS[operand.dtype] for operand in operands)


def through_c(
    operands: Sequence[torch.Tensor],
    terms: Terms,
    dtype: torch.dtype,
    cell: int = CELL,
    chance: tuple[bool, int, int] = (False, 0, 0),
) -> tuple[torch.Tensor, list[tuple[float, ...]]]:
    count = operands[0].numel()
    out = bytearray(count * dtype.itemsize)
    buffers, types = stored(operands)
    moments = fused.mix(buffers, types, memoryview(out), LETTERS[dtype], terms, cell, *chance)
    return torch.frombuffer(out or bytearray(8), dtype=dtype)[:count], moments


def reference_products(
    operands: Sequence[torch.Tensor], vectors: Vectors, wide: bool
) -> list[float]:
    """The inner products again, one addition after the other."""
    values = working(operands, wide)
    xs = [
        (values[new] - values[old] if old >= 0 else values[new]).astype(np.float64)
        for new, old in vectors
    ]
    found = []
    for i, one in enumerate(xs):
        for two in xs[i:]:
            lanes = [0.0] * 16
            for number, product in enumerate((one * two).tolist()):
                lanes[number % 16] += product
            for half in (8, 4, 2, 1):
                lanes = [lanes[j] + lanes[j + half] for j in range(half)]
            found.append(lanes[0])
    return found


@pytest.mark.parametrize(("one", "two", "out"), TRIPLES, ids=dtype_id)
def test_the_weights_are_those_of_the_reference(
    one: torch.dtype, two: torch.dtype, out: torch.dtype
) -> None:
    for count in ODD:
        operands = operands_of((one, two, two, one), count, seed=count)
        for terms in STEPS:
            wanted = expected(operands, terms, out, out == torch.float32)
            got, moments = through_torch(operands, terms, out)
            found = doubles(got)
            assert np.array_equal(found, wanted.out), (count, terms)
            assert np.array_equal(np.signbit(found), np.signbit(wanted.out)), (count, terms)
            assert_moments(moments, wanted)


@compiled
@pytest.mark.parametrize(("one", "two", "out"), TRIPLES, ids=dtype_id)
def test_the_same_bits_compiled(one: torch.dtype, two: torch.dtype, out: torch.dtype) -> None:
    for count in ODD:
        operands = operands_of((one, two, two, one), count, seed=count)
        for terms in STEPS:
            got, moments = through_c(operands, terms, out)
            want, theirs = through_torch(operands, terms, out)
            assert np.array_equal(bits(got), bits(want)), (count, terms)
            assert len(moments) == min(count, 1)
            for row in moments:
                assert row[4] == theirs.changed
                assert_moments(row, expected(operands, terms, out, out == torch.float32))


@compiled
@pytest.mark.parametrize("third", LETTERS, ids=dtype_id)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.integers(0, 2**50), st.integers(0, 2**64 - 1), st.floats(-3, 3))
def test_by_chance_the_same_bits_compiled(
    third: torch.dtype, count: int, first: int, key: int, coefficient: float
) -> None:
    operands = operands_of((torch.bfloat16, torch.bfloat16, third), count, seed=count)
    terms = (Term(coefficient, 1, 0), Term(-0.3, 2, -1))
    got, [moments] = through_c(operands, terms, torch.bfloat16, 2**17, (True, key, first))
    chance = noise(key, first, count)
    want, theirs = through_torch(operands, terms, torch.bfloat16, chance)
    assert np.array_equal(bits(got), bits(want))
    assert moments[4] == theirs.changed
    values = working(operands, wide=False)
    exact = (values[1] - backward_step(values, terms)).astype(np.float64)
    assert (np.abs(doubles(want) - exact) <= np.abs(exact) * 2.0**-7).all()


def patterns(dtype: torch.dtype) -> st.SearchStrategy[list[int]]:
    top = 2 ** (8 * dtype.itemsize) - 1
    return st.lists(st.integers(0, top), min_size=3, max_size=120)


def from_patterns(raw: list[int], dtype: torch.dtype) -> torch.Tensor:
    wide = np.array(raw, np.uint32)
    narrow = wide.astype(np.uint16).view(np.int16) if dtype.itemsize == 2 else wide.view(np.int32)
    return torch.from_numpy(narrow.copy()).view(dtype)


def step_of(operands: int) -> st.SearchStrategy[list[Term]]:
    coefficient = st.one_of(st.sampled_from(ALPHAS), st.floats(-1e3, 1e3))
    new, old = st.integers(0, operands - 1), st.integers(-1, operands - 1)
    return st.lists(st.builds(Term, coefficient, new, old), max_size=12)


@compiled
@pytest.mark.parametrize("dtype", LETTERS, ids=dtype_id)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bits_give_the_bits_of_torch_or_are_refused(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    raw = data.draw(patterns(dtype))
    terms = tuple(data.draw(step_of(3)))
    third = len(raw) // 3
    operands = [from_patterns(raw[at * third : (at + 1) * third], dtype) for at in range(3)]
    got, [moments] = through_c(operands, terms, dtype)
    want, theirs = through_torch(operands, terms, dtype)
    named = {0, 1} | {side for term in terms for side in term[1:] if side >= 0}
    values = [value for side in named for value in doubles(operands[side])]
    if not all(map(math.isfinite, [*values, *doubles(want)])):
        assert not math.isfinite(sum(moments)), "a value that is not finite went unnoticed"
        assert not theirs.finite()
    elif math.isfinite(sum(moments)):
        assert np.array_equal(bits(got), bits(want))
        assert moments[4] == theirs.changed


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("one", "two"), sorted({each[:2] for each in TRIPLES}, key=str))
def test_the_inner_products_are_summed_in_one_order(
    one: torch.dtype, two: torch.dtype, wide: bool
) -> None:
    for count in ODD:
        operands = operands_of((one, two, two, one), count, seed=count)
        cell = loaded(operands, wide)
        values = working(operands, wide)
        assert np.array_equal(cell.difference(2, 0).numpy(), values[2] - values[0])
        assert np.array_equal(cell.difference(3, -1).numpy(), values[3])
        for vectors in VECTORS:
            wanted = reference_products(operands, vectors, wide)
            assert list(cell.products(vectors)) == wanted, (count, vectors)


@compiled
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("one", "two"), sorted({each[:2] for each in TRIPLES}, key=str))
def test_the_same_inner_products_compiled(one: torch.dtype, two: torch.dtype, wide: bool) -> None:
    for count in ODD:
        operands = operands_of((one, two, two, one), count, seed=count)
        for vectors in VECTORS:
            found = fused.products(*stored(operands), wide, vectors, CELL)
            assert found == [loaded(operands, wide).products(vectors)] * min(count, 1)


def test_the_inner_products_are_close_to_the_exact_ones() -> None:
    operands = operands_of((torch.bfloat16,) * 3, 100_001, seed=3)
    values = [doubles(operand) for operand in operands]
    v, r = values[1] - values[0], values[2] - values[0]
    wanted = [math.fsum(pair) for pair in (v * v, v * r, r * r)]
    assert loaded(operands, wide=True).products(((1, 0), (2, 0))) == pytest.approx(wanted, 1e-13)


@compiled
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 700))
@example(1024, 1)
@example(3000, 1030)
def test_a_cell_knows_nothing_of_its_neighbours(count: int, cell: int) -> None:
    operands = operands_of((torch.bfloat16, torch.float32, torch.bfloat16), count, seed=count)
    terms, vectors = (Term(0.3, 1, 0), Term(-0.1, 2, 0)), ((1, 0), (2, -1))
    whole, _ = through_c(operands, terms, torch.bfloat16)
    cut, moments = through_c(operands, terms, torch.bfloat16, cell)
    assert np.array_equal(bits(whole), bits(cut))
    parts = [[each[at : at + cell] for each in operands] for at in range(0, count, cell)]
    assert moments == [through_c(part, terms, torch.bfloat16)[1][0] for part in parts]
    found = fused.products(*stored(operands), False, vectors, cell)
    assert found == [loaded(part, wide=False).products(vectors) for part in parts]


@pytest.mark.parametrize("dtype", [*LETTERS, *NARROW], ids=dtype_id)
def test_one_term_is_what_cell_does(dtype: torch.dtype) -> None:
    operands = operands_of((dtype, dtype), 5000, seed=2)
    for alpha in filter(None, ALPHAS):  # at 0 ``Cell`` may turn a −0 into +0
        cell = Cell(5000, work_dtype(dtype, dtype, dtype))
        cell.load(operands[0], operands[1])
        want = torch.empty(5000, dtype=dtype)
        theirs = cell.apply(alpha, want)
        got, moments = through_torch(operands, (Term(alpha, 1, 0),), dtype)
        assert np.array_equal(bits(got), bits(want)), alpha
        assert moments[:5] == pytest.approx(theirs, rel=1e-4)
        if native.COMPILED and dtype in LETTERS:
            got, [row] = through_c(operands, (Term(alpha, 1, 0),), dtype)
            assert np.array_equal(bits(got), bits(want)), alpha
            assert row[4] == theirs.changed


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_other_outputs_are_rounded_once(dtype: torch.dtype) -> None:
    operands = operands_of((dtype, dtype, torch.float16), 5000, seed=4)
    terms = (Term(0.4, 1, 0), Term(-0.2, 2, -1))
    got, moments = through_torch(operands, terms, dtype)
    wanted = expected(operands, terms, dtype, wide=False)
    assert np.array_equal(doubles(got), wanted.out)
    assert_moments(moments, wanted)


def test_a_float64_operand_is_worked_on_in_float64() -> None:
    operands = operands_of((torch.bfloat16, torch.bfloat16, torch.float64), 3000, seed=6)
    terms = (Term(0.4, 1, 0), Term(0.2, 2, 0))
    out = torch.empty(3000, dtype=torch.bfloat16)
    moments = loaded(operands, wide=True).apply(terms, out)
    wanted = expected(operands, terms, torch.bfloat16, wide=True)
    assert np.array_equal(doubles(out), wanted.out)
    assert_moments(moments, wanted)


def test_scales_and_adapters_change_the_operands() -> None:
    operands = operands_of((torch.bfloat16,) * 3, 999, seed=8)
    scale, delta = torch.full((999,), 1.5), torch.linspace(-1, 1, 999)
    changed = [operands[0].float() * scale, operands[1], operands[2].float() * 0.5 + delta]
    cell = MixedCell(1000, torch.float32, 4)
    cell.load(operands, [Change(scale, None), None, Change(torch.tensor(0.5), delta)])
    terms = (Term(0.4, 1, 0), Term(0.2, 2, -1))
    out = torch.empty(999, dtype=torch.bfloat16)
    moments = cell.apply(terms, out)
    want, theirs = through_torch(changed, terms, torch.bfloat16)
    assert np.array_equal(bits(out), bits(want))
    assert moments == pytest.approx(theirs, rel=1e-4)
    # Buffers that a longer cell has left full: the padding of a shorter one is zero again.
    cell.products(((1, 0), (2, 0)))
    cell.load([operand[:5] for operand in operands], [None] * 3)
    assert list(cell.products(((1, 0),))) == reference_products(
        [operand[:5] for operand in operands], ((1, 0),), wide=False
    )


ZEROS = [
    (-0.0, 0.0, -0.0, 0.0, 1.5),
    (-0.0, 0.0, 0.0, -0.0, 1.5),
    (0.0, -0.0, 0.0, -0.0, 1.5),
]


@pytest.mark.parametrize("dtype", [*LETTERS, torch.float8_e5m2], ids=dtype_id)
def test_minus_zero_stays_where_nothing_changed(dtype: torch.dtype) -> None:
    original, unlearned, other = (torch.tensor(values).to(dtype) for values in ZEROS)
    operands = [original, unlearned, other, torch.zeros(5).to(dtype)]
    for alpha in (*ALPHAS, 1e-300, -1e-300):
        for terms in [
            (Term(alpha, 1, 0),),
            (Term(alpha, 1, 0), Term(-1.0, 2, 0)),
            (Term(alpha, 2, 1), Term(0.5, 3, -1)),
            (Term(alpha, 1, -1), Term(-alpha, 1, -1)),
        ]:
            got, moments = through_torch(operands, terms, dtype)
            assert np.array_equal(bits(got), bits(unlearned)), terms
            assert moments.changed == moments.step == moments.error == 0
            if native.COMPILED and dtype in LETTERS:
                got, _ = through_c(operands, terms, dtype)
                assert np.array_equal(bits(got), bits(unlearned)), terms


@pytest.mark.parametrize("dtype", LETTERS, ids=dtype_id)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_what_is_not_finite_shows_in_the_sums(dtype: torch.dtype, value: float, side: int) -> None:
    for coefficient, old, at in [(0.5, 0, 0), (0.0, -1, 1500), (-2.0, 2, 1999)]:
        operands = operands_of((dtype, dtype, dtype), 2000, seed=9)
        operands[side][at] = value
        terms = (Term(0.5, 1, 0), Term(coefficient, 2, old))
        _, moments = through_torch(operands, terms, dtype)
        assert not moments.finite()
        wide = dtype == torch.float32
        vectors = ((1, 0), (2, -1))
        assert not math.isfinite(sum(loaded(operands, wide).products(vectors)))
        if native.COMPILED:
            _, [row] = through_c(operands, terms, dtype)
            assert not math.isfinite(sum(row))
            [found] = fused.products(*stored(operands), wide, vectors, CELL)
            assert not math.isfinite(sum(found))


@pytest.mark.parametrize("coefficient", [1e300, math.inf, math.nan])
def test_a_coefficient_out_of_range_shows_in_the_sums(coefficient: float) -> None:
    operands = operands_of((torch.bfloat16, torch.bfloat16), 50, seed=9)
    terms = (Term(coefficient, 1, 0),)
    assert not through_torch(operands, terms, torch.bfloat16)[1].finite()
    if native.COMPILED:
        assert not math.isfinite(sum(through_c(operands, terms, torch.bfloat16)[1][0]))


def test_what_the_output_cannot_hold_is_counted() -> None:
    theta = torch.tensor([1.0, -40000.0, 30000.0, 0.0])
    operands = [torch.zeros(4), theta, torch.tensor([0.0, -40000.0, 10000.0, 0.0])]
    terms = (Term(0.5, 1, 0), Term(0.5, 2, -1))
    out = torch.empty(4, dtype=torch.float16)
    cell = loaded(operands, wide=False)
    assert not cell.apply(terms, out).finite()
    assert cell.overflow(terms, out) == (1, 80000.0)
    assert loaded([each[:0] for each in operands], wide=False).overflow(terms, out[:0]) == (0, 0.0)


def test_silent_clamping_shows_in_the_sums() -> None:
    operands = [torch.zeros(3), torch.tensor([1.0, 300.0, -2.0])]
    out = torch.empty(3, dtype=torch.float8_e4m3fn)
    cell = loaded(operands, wide=False)
    for alpha, clamped in ((0.25, 0), (1.0, 1)):
        terms = (Term(alpha, 1, 0),)
        assert math.isinf(cell.apply(terms, out).error) == bool(clamped)
        assert cell.overflow(terms, out)[0] == clamped
        cell.apply(terms, out)
        assert cell.exact(terms, out).finite() == (not clamped)


def test_squares_that_overflow_are_summed_in_float64() -> None:
    operands = [operand * 1e25 for operand in operands_of((torch.bfloat16,) * 3, 500, seed=1)]
    terms = (Term(0.5, 1, 0), Term(-0.25, 2, -1))
    cell = loaded(operands, wide=False)
    out = torch.empty(500, dtype=torch.bfloat16)
    assert not cell.apply(terms, out).finite()
    wanted = expected(operands, terms, torch.bfloat16, wide=False)
    assert np.array_equal(doubles(out), wanted.out)
    assert np.abs(wanted.out).max() < FORMATS[torch.bfloat16].largest
    assert cell.exact(terms, out) == pytest.approx(wanted.moments, rel=1e-9)


@compiled
def test_what_does_not_fit_together_is_an_error() -> None:
    two, three = memoryview(bytearray(4)), memoryview(bytearray(6))
    good = ((two, two), b"BB", two, b"B", ((1.0, 1, 0),), 1)
    huge = 2**80
    for at, value in [
        (0, (two, three)),
        (0, (three, two)),
        (0, (two, memoryview(bytearray(5)))),
        (0, (two,)),
        (0, (two,) * 3),
        (0, ()),
        (1, b"BF"),
        (1, b"BD"),
        (1, b"B"),
        (1, b""),
        (2, three),
        (3, b"F"),
        (3, b"D"),
        (4, ((1.0, 2, 0),)),
        (4, ((1.0, -1, 0),)),
        (4, ((1.0, 1, 2),)),
        (4, ((1.0, 1, -2),)),
        (4, ((1.0, huge, 0),)),
        (4, ((1.0, 1, -huge),)),
        (4, ((1.0, 1, 0),) * 13),
        (5, 0),
        (5, -1),
    ]:
        with pytest.raises(ValueError, match=r"element|type|operand|term"):
            fused.mix(*good[:at], value, *good[at + 1 :], False, 0, 0)  # type: ignore[arg-type,call-arg]
    for operands, types in [((two,), b"B"), ((two,) * 13, b"B" * 13)]:
        with pytest.raises(ValueError, match="operands"):
            fused.mix(operands, types, two, b"B", (), 1, False, 0, 0)
    with pytest.raises(ValueError, match="by chance"):
        fused.mix((two, two), b"HH", two, b"H", (), 1, True, 0, 0)
    with pytest.raises(TypeError, match="read-write"):
        fused.mix((two, two), b"BB", memoryview(bytes(4)), b"B", (), 1, False, 0, 0)
    for terms in (((1.0, 1),), (1.0,), (("1", 1, 0),), ((1.0, 1.5, 0),), ((1.0, 1, None),)):
        with pytest.raises(TypeError):
            fused.mix((two, two), b"BB", two, b"B", terms, 1, False, 0, 0)  # type: ignore[arg-type]
    assert len(fused.mix((two,) * 12, b"B" * 12, two, b"B", ((1.0, 11, 0),) * 12, 2, False, 0, 0))


@compiled
def test_products_of_what_does_not_fit_together_are_an_error() -> None:
    two, three = memoryview(bytearray(4)), memoryview(bytearray(6))
    good = ((two, two), b"BB", False, ((1, 0),), 1)
    for at, value in [
        (0, (two, three)),
        (0, (two,) * 3),
        (0, ()),
        (1, b"BD"),
        (1, b"B"),
        (3, ((2, 0),)),
        (3, ((-1, 0),)),
        (3, ((1, 2),)),
        (3, ((1, -2),)),
        (3, ((2**80, 0),)),
        (3, ((1, 0),) * 13),
        (4, 0),
    ]:
        with pytest.raises(ValueError, match=r"element|type|operand|vector"):
            fused.products(*good[:at], value, *good[at + 1 :])  # type: ignore[arg-type,call-arg]
    with pytest.raises(ValueError, match="operands"):
        fused.products((two,) * 13, b"B" * 13, False, (), 1)
    for vectors in (((1,),), (1,), ((1.0, 0),), ((1, None),)):
        with pytest.raises(TypeError):
            fused.products((two, two), b"BB", False, vectors, 1)  # type: ignore[arg-type]
    found = fused.products((two,) * 12, b"B" * 12, True, ((11, -1),) * 12, 2)
    assert found == [(0.0,) * 78]
