"""``--rounding stochastic``: unbiased, a pure function of seed, name and index."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import refuse_merge
from helpers import bits, contents, read_tensors, run_cli, write_checkpoint, write_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import doubles, dtype_id, mixed_pair, spacing, unrounded

import uipe_merge
from uipe_merge import native
from uipe_merge.arithmetic.blocks import Cell, by_chance, work_dtype
from uipe_merge.arithmetic.noise import noise
from uipe_merge.recipe import Rounding
from uipe_merge.report import Sums

HALVES = [torch.bfloat16, torch.float16]
KEY = 0x0123456789ABCDEF


def reference_noise(key: int, index: int) -> int:
    """The generator again, in Python's integers."""
    mask = 2**64 - 1
    word = (key + (index // 4 + 1) * 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    word ^= word >> 31
    return (word >> (16 * (index % 4))) & 0xFFFF


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 50))
def test_the_noise_is_a_function_of_key_and_index(key: int, first: int, count: int) -> None:
    wanted = [reference_noise(key, first + index) / 2**16 for index in range(count)]
    assert noise(key, first, count).tolist() == wanted


def test_the_noise_is_uniform_and_its_neighbours_know_nothing_of_one_another() -> None:
    values = noise(KEY, 0, 2**20).numpy()
    counts, _ = np.histogram(values, 256, (0, 1))
    expected = len(values) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # χ² with 255 degrees, p ≈ 1e-8
    for lag in (1, 2, 3, 4, 8):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 6e-3
    other = noise(KEY + 1, 0, 2**20).numpy()
    assert abs(np.corrcoef(values, other)[0, 1]) < 6e-3


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_each_value_goes_to_a_neighbour_by_its_share_of_the_way(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    top = 120 if dtype == torch.bfloat16 else 15
    values = rng.normal(size=40_000) * 2.0 ** rng.integers(-140 if top > 15 else -28, top, 40_000)
    values = np.concatenate([values, [0.0, -0.0, 1.0, -1.0]]).astype(np.float32)
    unit = spacing(values.astype(np.float64), dtype)
    for share in (0.0, 0.25, 0.5, 1 - 2.0**-16):
        chance = torch.full((len(values),), share, dtype=torch.float64)
        found = doubles(by_chance(torch.from_numpy(values), chance, dtype).to(dtype))
        wanted = np.copysign(np.floor(np.abs(values / unit) + share) * unit, values)
        assert np.array_equal(found, wanted)
        assert np.array_equal(np.signbit(found), np.signbit(values))
        assert (np.abs(found - values) < unit).all()


@pytest.mark.skipif(not native.COMPILED, reason="this copy was built without a compiler")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.integers(0, 2**50), st.integers(0, 2**64 - 1), st.floats(-3, 3))
def test_the_compiled_arithmetic_rounds_to_the_same_bits(
    count: int, first: int, key: int, alpha: float
) -> None:
    from uipe_merge.arithmetic import fused

    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (count + 1,), seed=count)
    one, two = one[:count], two[:count]
    out = bytearray(2 * count)
    sides = [memoryview(bits(side).tobytes()) for side in (one, two)]
    written = ((memoryview(out),), b"B", (alpha,))
    [[moments]] = fused.extrapolate(
        sides[0], b"B", sides[1], b"B", *written, 2**17, True, key, first
    )
    cell = Cell(count, work_dtype(torch.bfloat16, torch.bfloat16, torch.bfloat16))
    cell.load(one, two)
    wanted = torch.empty(count, dtype=torch.bfloat16)
    theirs = cell.apply(alpha, wanted, noise(key, first, count))
    assert bytes(out) == bits(wanted).tobytes()
    assert moments[4] == theirs.changed


def models(root: Path, dtype: torch.dtype, ratio: float, elements: int) -> tuple[Path, Path]:
    """A pair as unlearning makes it: W ~ N(0, 0.02²) as stored, plus a Gaussian update, stored."""
    rng = np.random.default_rng(7)
    one = torch.from_numpy(rng.normal(0, 0.02, elements).astype(np.float32)).to(dtype)
    update = torch.from_numpy(rng.normal(0, 0.02 * ratio, elements).astype(np.float32))
    one, two = (each.reshape(-1, 1000) for each in (one, (one.float() + update).to(dtype)))
    return (
        write_checkpoint(root / "original", {"a": one[: len(one) // 3], "b": one[len(one) // 3 :]}),
        write_checkpoint(
            root / "unlearned", {"a": two[: len(two) // 3], "b": two[len(two) // 3 :]}
        ),
    )


def scatter(original: Path, unlearned: Path, alpha: float) -> float:
    """The standard deviation of the effective α, relative to α, of independent draws."""
    one, two = (read_tensors(path) for path in (original, unlearned))
    variance = square = 0.0
    for name in one:
        new, update = doubles(two[name]), doubles(two[name]) - doubles(one[name])
        unit = spacing(new + alpha * update, torch.bfloat16)
        up = np.abs((new + alpha * update) / unit) % 1
        variance += float((up * (1 - up) * (unit * update) ** 2).sum())
        square += float((update**2).sum())
    return float(variance**0.5 / square / alpha)


NEAREST: dict[float, dict[float, tuple[float, float]]] = {
    1e-2: {0.1: (0.50, 0.53), 0.25: (0.88, 0.92), 0.5: (0.98, 1.02), 1.0: (0.98, 1.02)},
    1e-3: {0.1: (0.07, 0.09), 0.25: (0.23, 0.265), 0.5: (0.98, 1.02), 1.0: (0.99, 1.0)},
    1e-4: {0.1: (0.07, 0.09), 0.25: (0.22, 0.26), 0.5: (0.98, 1.02), 1.0: (0.99, 1.0)},
}
"""Share of α that rounding to nearest leaves, by ratio and α: the table of the method."""


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_the_effective_alpha_is_the_one_asked_for(tmp_path: Path, ratio: float) -> None:
    original, unlearned = models(tmp_path, torch.bfloat16, ratio, 10_000_000)

    def run(alpha: float, dtype: str, rounding: Rounding) -> Sums:
        report = uipe_merge.merge(
            original,
            unlearned,
            tmp_path / "out",
            alpha=alpha,
            dtype=dtype,
            rounding=rounding,
            overwrite=True,
            progress=False,
        )
        total = report.summary.total
        assert total is not None
        assert total.effective_alpha is not None
        assert bool(report.warnings) == (abs(total.effective_alpha / alpha - 1) > 0.05)
        return total

    for alpha in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0):
        nearest = run(alpha, "auto", "nearest")
        least, most = NEAREST[ratio].get(alpha, (0.0, 1.01))
        assert least <= (nearest.effective_alpha or 0) / alpha <= most, (alpha, nearest)
        if ratio < 1e-2 and alpha == 0.5:  # right on average, by a step that is a third too long
            length = nearest.error + 2 * nearest.realised - nearest.step
            assert (length / nearest.step) ** 0.5 == pytest.approx(1.33, abs=0.015)
        chance = run(alpha, "auto", "stochastic")
        # At 1e-4 only 2 % of the elements have an update: so few draws scatter by up to 1.4 %.
        sparse = ratio < 1e-3
        luck = max(0.01, 3.5 * scatter(original, unlearned, alpha)) if sparse else 0.01
        assert chance.effective_alpha == pytest.approx(alpha, rel=luck)
        wide = run(alpha, "float32", "nearest")
        assert wide.effective_alpha == pytest.approx(alpha, rel=1e-4)


def test_the_output_is_unbiased_element_by_element(tmp_path: Path) -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (4000,), seed=1)
    original = write_checkpoint(tmp_path / "original", {"a": one})
    unlearned = write_checkpoint(tmp_path / "unlearned", {"a": two})
    exact = unrounded(one, two, 0.3)
    total = np.zeros(4000)
    runs = 60
    for seed in range(runs):
        out = tmp_path / f"out-{seed}"
        uipe_merge.merge(
            original, unlearned, out, alpha=0.3, rounding="stochastic", seed=seed, progress=False
        )
        total += doubles(read_tensors(out)["a"])
    unit = spacing(exact, torch.bfloat16)
    # The mean of 60 draws between two neighbours: a standard error of at most 0.5/√60 units.
    assert (np.abs(total / runs - exact) / unit).max() < 0.5 / np.sqrt(runs) * 5.5
    assert abs(((total / runs - exact) / unit).mean()) < 5e-3


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_threads_interruptions_and_the_other_tensors_change_no_byte(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    one, two = mixed_pair(dtype, dtype, (2, 700_001), seed=2)
    names = ("model.a", "model.b")
    for side, tensor in (("original", one), ("unlearned", two)):
        write_checkpoint(tmp_path / side, dict(zip(names, tensor, strict=True)), shards=2)
        write_checkpoint(tmp_path / "alone" / side, {"model.b": tensor[1]})
    options = ("--alpha", 0.2, "--rounding", "stochastic", "--seed", 5)
    found = []
    for threads in (1, 3):
        out = tmp_path / "out"
        command = (tmp_path / "original", tmp_path / "unlearned", "-o", out, "--overwrite")
        assert run_cli(*command, *options, "--threads", threads).code == 0
        found.append(contents(out))
    assert found[0] == found[1]
    alone = tmp_path / "alone"
    assert run_cli(alone / "original", alone / "unlearned", "-o", alone / "out", *options).code == 0
    merged = read_tensors(tmp_path / "out")
    assert np.array_equal(bits(read_tensors(alone / "out")["model.b"]), bits(merged["model.b"]))
    assert not np.array_equal(bits(merged["model.a"]), bits(merged["model.b"]))


def test_without_the_compiled_arithmetic_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, unlearned = write_pair(tmp_path)
    found: list[dict[str, bytes]] = []
    for compiled in (native.COMPILED, False):
        monkeypatch.setattr(native, "COMPILED", compiled)
        out = tmp_path / f"out-{len(found)}"
        uipe_merge.merge(original, unlearned, out, alpha=0.2, rounding="stochastic", progress=False)
        found.append({name: bits(tensor).tobytes() for name, tensor in read_tensors(out).items()})
    assert found[0] == found[1]


def test_seeds_differ_and_other_outputs_are_rounded_to_nearest(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)

    def run(*options: object) -> dict[str, bytes]:
        command = (original, unlearned, "--alpha", 0.2, "-o", tmp_path / "out", "--overwrite")
        assert run_cli(*command, *options).code == 0
        return {name: bits(each).tobytes() for name, each in read_tensors(tmp_path / "out").items()}

    chance = ("--rounding", "stochastic", "--seed")
    results = [run(*chance, seed) for seed in (0, 1, -3)] + [run()]
    assert all(one != two for one, two in itertools.combinations(results, 2))
    wide = ("--dtype", "float32")
    assert run(*wide, *chance, 1) == run(*wide)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    refuse_merge(tmp_path, 2, "'up'", "stochastic", extra=("--rounding", "up"))
    refuse_merge(tmp_path, 2, "--seed", "integer", extra=("--seed", "x"))


def test_the_largest_number_is_not_rounded_out_of_its_type(tmp_path: Path) -> None:
    one, two = torch.full((9,), 65000.0).half(), torch.full((9,), 65400.0).half()
    write_checkpoint(tmp_path / "original", {"a": one})
    write_checkpoint(tmp_path / "unlearned", {"a": two})
    options = ("--alpha", 0.25, "--rounding", "stochastic", "-o", tmp_path / "out")
    result = run_cli(tmp_path / "original", tmp_path / "unlearned", *options)
    # 65500 lies between 65472 and 65504, the largest: it is never rounded out of the type.
    assert result.code == 0, result
    merged = read_tensors(tmp_path / "out")["a"]
    assert set(merged.tolist()) <= {65472.0, 65504.0}
