"""The compiled arithmetic: the bits of ``arithmetic.blocks``, faster and without torch."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bits, contents, read_tensors, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import assert_merged, doubles, dtype_id, mixed_pair

import uipe_merge
from uipe_merge import native
from uipe_merge.arithmetic.blocks import Cell, Moments, work_dtype
from uipe_merge.plan import CELL

fused = pytest.importorskip(
    "uipe_merge.arithmetic.fused", reason="this copy was built without a compiler"
)

LETTERS = {torch.bfloat16: b"B", torch.float16: b"H", torch.float32: b"F"}
TRIPLES = [(one, two, out) for one in LETTERS for two in LETTERS for out in LETTERS]
ALPHAS = [-1.0, -0.5, 0.0, 0.1, 0.3, 2.0, 10.0]
ODD = [0, 1, 7, 1023, 1024, 1025, 5000]  # around the chunk, and no multiple of anything


def run(
    one: torch.Tensor,
    two: torch.Tensor,
    alpha: float,
    dtype: torch.dtype,
    cell: int = CELL,
    chance: tuple[bool, int, int] = (False, 0, 0),
) -> tuple[torch.Tensor, list[tuple[float, ...]]]:
    [found] = run_all(one, two, [alpha], dtype, cell, chance)
    return found


def run_all(
    one: torch.Tensor,
    two: torch.Tensor,
    alphas: list[float],
    dtype: torch.dtype,
    cell: int = CELL,
    chance: tuple[bool, int, int] = (False, 0, 0),
) -> list[tuple[torch.Tensor, list[tuple[float, ...]]]]:
    outs = tuple(bytearray(two.numel() * dtype.itemsize) for _ in alphas)
    sides = [item for side in (one, two) for item in (bits(side).tobytes(), LETTERS[side.dtype])]
    every = fused.extrapolate(*sides, outs, LETTERS[dtype], tuple(alphas), cell, *chance)
    weights = [torch.frombuffer(out or bytearray(8), dtype=dtype)[: two.numel()] for out in outs]
    return list(zip(weights, every, strict=True))


def expected(
    one: torch.Tensor, two: torch.Tensor, alpha: float, dtype: torch.dtype
) -> tuple[torch.Tensor, Moments, float]:
    cell = Cell(max(len(two), 1), work_dtype(one.dtype, two.dtype, dtype))
    cell.load(one, two)
    out = torch.empty(two.shape, dtype=dtype)
    return out, cell.apply(alpha, out), cell.differing()


@pytest.mark.parametrize(("one", "two", "out"), TRIPLES, ids=dtype_id)
def test_the_same_bits_as_torch_and_the_reference(
    one: torch.dtype, two: torch.dtype, out: torch.dtype
) -> None:
    for count in ODD:
        pair = mixed_pair(one, two, (count + 2,), seed=count)
        original, unlearned = (side[:count] for side in pair)
        for alpha in ALPHAS:
            got, _ = run(original, unlearned, alpha, out)
            want, _, _ = expected(original, unlearned, alpha, out)
            assert np.array_equal(bits(got), bits(want)), (count, alpha)
            assert_merged(got, original, unlearned, alpha)


def test_every_float16_and_every_way_to_round_to_one() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.int16)
    stored = torch.from_numpy(halves.copy()).view(torch.float16)
    stored = stored[stored.isfinite()]
    # Of float32 the upper half of the bits, and below it what is on either side of a tie.
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x7FFF, 0xF000], np.uint32)
    words = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | low).reshape(-1)
    values = torch.from_numpy(words.view(np.int32).copy()).view(torch.float32)
    values = values[values.abs() < 65520]
    for one in (stored, values):
        # 0 shows what is stored itself; the other α move it to places that it does not hold.
        for two, alpha in ((one, 0.0), (one.flip(0), 0.3), (one.roll(1), -0.7)):
            got, _ = run(one, two, alpha, torch.float16)
            want, _, _ = expected(one, two, alpha, torch.float16)
            fits = want.isfinite()
            assert np.array_equal(bits(got[fits]), bits(want[fits]))
            assert torch.equal(got[~fits], want[~fits])


def patterns(dtype: torch.dtype) -> st.SearchStrategy[list[int]]:
    top = 2 ** (8 * dtype.itemsize) - 1
    return st.lists(st.integers(0, top), min_size=2, max_size=80)


def from_patterns(raw: list[int], dtype: torch.dtype) -> torch.Tensor:
    wide = np.array(raw, np.uint32)
    narrow = wide.astype(np.uint16).view(np.int16) if dtype.itemsize == 2 else wide.view(np.int32)
    return torch.from_numpy(narrow.copy()).view(dtype)


@pytest.mark.parametrize("dtype", LETTERS, ids=dtype_id)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), alpha=st.one_of(st.sampled_from(ALPHAS), st.floats(-1e3, 1e3)))
def test_any_bits_give_the_bits_of_torch_or_are_refused(
    dtype: torch.dtype, data: st.DataObject, alpha: float
) -> None:
    raw = data.draw(patterns(dtype))
    half = len(raw) // 2
    one, two = from_patterns(raw[:half], dtype), from_patterns(raw[half : 2 * half], dtype)
    got, moments = run(one, two, alpha, dtype)
    want, theirs, differing = expected(one, two, alpha, dtype)
    values = [*doubles(one), *doubles(two), *doubles(want)]
    if not all(map(math.isfinite, values)):
        assert not math.isfinite(sum(moments[0])), "a value that is not finite went unnoticed"
    elif math.isfinite(sum(moments[0])):
        assert np.array_equal(bits(got), bits(want))
        assert moments[0][4:] == (theirs.changed, differing)


SPECIAL = [0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0x8000, 0x0001]
"""Of bfloat16: NaN, ±∞, the largest, −0, the smallest."""


@pytest.mark.parametrize(("one", "two", "out"), TRIPLES, ids=dtype_id)
@settings(max_examples=25, deadline=None)
@given(
    count=st.sampled_from([*ODD, 2048, 3333]),
    alphas=st.lists(
        st.one_of(st.sampled_from([*ALPHAS, -0.0]), st.floats(-1e3, 1e3)), min_size=1, max_size=16
    ),
    placed=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3332), st.sampled_from(SPECIAL))),
    cell=st.sampled_from([CELL, 1500, 1024, 700]),
    noise=st.one_of(st.none(), st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40))),
)
def test_several_alphas_at_once_are_each_what_one_is_alone(
    one: torch.dtype,
    two: torch.dtype,
    out: torch.dtype,
    count: int,
    alphas: list[float],
    placed: list[tuple[int, int, int]],
    cell: int,
    noise: tuple[int, int] | None,
) -> None:
    original, unlearned = (side[:count] for side in mixed_pair(one, two, (count + 2,), seed=count))
    for side, at, raw in placed:
        if at < count:
            stored = unlearned if side else original
            stored[at] = from_patterns([raw], torch.bfloat16)[0].to(stored.dtype)
    chance = (True, *noise) if noise and out == torch.bfloat16 else (False, 0, 0)
    together = run_all(original, unlearned, alphas, out, cell, chance)
    for alpha, (weights, moments) in zip(alphas, together, strict=True):
        alone, single = run(original, unlearned, alpha, out, cell, chance)
        assert np.array_equal(bits(weights), bits(alone))
        assert np.array_equal(np.array(moments), np.array(single), equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 700))
@example(1024, 1)
def test_a_cell_knows_nothing_of_its_neighbours(count: int, cell: int) -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (count,), seed=count)
    whole, _ = run(one, two, 0.3, torch.bfloat16)
    cut, moments = run(one, two, 0.3, torch.bfloat16, cell)
    assert np.array_equal(bits(whole), bits(cut))
    alone = [
        run(one[at : at + cell], two[at : at + cell], 0.3, torch.bfloat16)[1][0]
        for at in range(0, count, cell)
    ]
    assert moments == alone


@pytest.mark.parametrize(("one", "two", "out"), TRIPLES, ids=dtype_id)
def test_the_moments_are_those_of_float64(
    one: torch.dtype, two: torch.dtype, out: torch.dtype
) -> None:
    original, unlearned = mixed_pair(one, two, (70_001,), seed=5)
    original[:1000] = unlearned[:1000].to(one)
    for alpha in (0.1, 2.0, -0.5):
        merged, [found] = run(original, unlearned, alpha, out)
        theta = doubles(unlearned)
        update = theta - doubles(original)
        moved = doubles(merged) - theta
        wanted = [
            np.dot(update, update),
            np.dot(theta, theta),
            np.dot(moved, update),
            np.dot(moved - alpha * update, moved - alpha * update),
        ]
        assert found[:3] == pytest.approx(wanted[:3], rel=2e-6)
        assert found[3] == pytest.approx(wanted[3], rel=2e-3)
        assert found[4:] == (float(np.count_nonzero(moved)), float(np.count_nonzero(update)))


def test_minus_zero_stays_where_nothing_changed() -> None:
    theta = torch.tensor([-0.0, 0.0, -0.0, 0.0], dtype=torch.bfloat16)
    other = torch.tensor([-0.0, 0.0, 0.0, -0.0], dtype=torch.bfloat16)
    for alpha in (*ALPHAS, -0.0, 1e-300, -1e-300):
        got, _ = run(other, theta, alpha, torch.bfloat16)
        assert np.array_equal(bits(got), bits(theta)), alpha


def test_what_does_not_fit_together_is_an_error() -> None:
    two, three = memoryview(bytearray(4)), memoryview(bytearray(6))
    for arguments in [
        (two, b"B", two, b"B", (three,), b"B", (1.0,), 1),
        (two, b"B", two, b"B", (two, three), b"B", (1.0, 2.0), 1),
        (two, b"B", three, b"B", (two,), b"B", (1.0,), 1),
        (two, b"F", two, b"B", (two,), b"B", (1.0,), 1),
        (two, b"D", two, b"B", (two,), b"B", (1.0,), 1),
        (two, b"B", two, b"B", (two,), b"B", (1.0,), 0),
        (two, b"B", two, b"B", (), b"B", (), 1),
        (two, b"B", two, b"B", (two,) * 17, b"B", (1.0,) * 17, 1),
        (two, b"B", two, b"B", (two, two), b"B", (1.0,), 1),
    ]:
        with pytest.raises(ValueError, match=r"elements|type|outputs"):
            fused.extrapolate(*arguments, False, 0, 0)
    for outs, alphas in [((memoryview(bytes(4)),), (1.0,)), ((two, 7), (1.0, 1.0)), ((two,), "1")]:
        with pytest.raises((TypeError, BufferError)):
            fused.extrapolate(two, b"B", two, b"B", outs, b"B", alphas, 1, False, 0, 0)
    with pytest.raises(TypeError):
        fused.extrapolate(two, b"B", two, b"B", (two,), b"B", ("1",), 1, False, 0, 0)
    for letter in (b"H", b"F"):
        with pytest.raises(ValueError, match="chance"):
            fused.extrapolate(two, letter, two, letter, (two,), letter, (1.0,), 1, True, 0, 0)


def test_a_merge_without_it_writes_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = {dtype: mixed_pair(dtype, dtype, (300_001,)) for dtype in LETTERS}
    original, unlearned = (
        write_checkpoint(tmp_path / name, {dtype_id(d): pair[side] for d, pair in pairs.items()})
        for side, name in enumerate(("original", "unlearned"))
    )
    uipe_merge.merge(original, unlearned, tmp_path / "with", alpha=0.7, progress=False)
    monkeypatch.setattr(native, "COMPILED", False)
    uipe_merge.merge(original, unlearned, tmp_path / "without", alpha=0.7, progress=False)
    weights = [
        {name: data for name, data in contents(tmp_path / run).items() if "safetensors" in name}
        for run in ("with", "without")
    ]
    assert weights[0] == weights[1]
    assert len(read_tensors(tmp_path / "with")) == len(LETTERS)


def test_torch_is_not_imported_where_it_is_not_needed(tmp_path: Path) -> None:
    original, unlearned = (
        write_checkpoint(
            tmp_path / name, {dtype_id(each): torch.ones(9, dtype=each) * size for each in LETTERS}
        )
        for size, name in enumerate(("original", "unlearned"), 1)
    )
    program = (
        "import sys, uipe_merge as u; a = sys.argv[1:];"
        "u.inspect(*a[:2]); u.merge(*a, alpha=0.5, progress=False);"
        "sys.exit('torch' in sys.modules)"
    )
    command: list[str | Path] = [
        sys.executable,
        "-c",
        program,
        original,
        unlearned,
        tmp_path / "out",
    ]
    subprocess.run(command, check=True, timeout=60)
