"""arithmetic/svd.py against numpy's singular value decomposition in float64."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from uipe_merge.arithmetic.svd import (
    MOST_ITERATIONS,
    TOLERANCE,
    LowRank,
    by_energy,
    by_rank,
    workspace,
)

Array = NDArray[np.float64]

ROUNDING = 1e-5
"""Norm of a float32 rounding error, relative to the matrix's, with room for long sums."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run as the merge does; bits are promised for no other case."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_values(
    rows: int, columns: int, values: NDArray[np.floating[Any]], seed: int = 0
) -> torch.Tensor:
    """A float32 matrix with the given singular values and random directions."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return torch.from_numpy((left * values) @ right.T).float()


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns))).float()


def spectrum(kind: str, rows: int, columns: int) -> torch.Tensor:
    """An update of a kind that the iterations meet: steep, gentle, flat, signal in noise."""
    place = np.arange(1.0, min(rows, columns) + 1)
    if kind == "fast":
        return with_values(rows, columns, 0.7**place)
    if kind == "power":
        return with_values(rows, columns, 1 / place)
    if kind == "slow":
        return with_values(rows, columns, place**-0.5)
    if kind == "flat":
        return gaussian(rows, columns)
    if kind == "line":
        return with_values(rows, columns, 1 - place / (len(place) + 1))
    signal = gaussian(rows, 6, seed=1) @ gaussian(6, columns, seed=2)
    return signal + 0.5 * gaussian(rows, columns, seed=3)


KINDS = ["fast", "power", "slow", "flat", "line", "signal"]
SHAPES = [(320, 320), (300, 700), (700, 300)]


def energies(update: torch.Tensor) -> Array:
    """Shares of ‖v‖² that the singular directions hold, largest first."""
    squares = np.linalg.svd(update.double().numpy(), compute_uv=False) ** 2
    return np.asarray(squares / squares.sum(), np.float64)


def assert_projection(result: LowRank, update: torch.Tensor) -> None:
    """Hold a result to what it says of itself: U orthonormal, and U·Uᵀ·v in factors."""
    rows, columns = update.shape
    rank = result.left.shape[1]
    assert result.left.shape == (rows, rank)
    assert result.right.shape == (rank, columns)
    assert result.left.dtype == result.right.dtype == torch.float32
    left, right, exact = (t.double().numpy() for t in (result.left, result.right, update))
    norm = np.linalg.norm(exact)
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()
    assert np.abs(left.T @ left - np.eye(rank)).max(initial=0.0) < ROUNDING
    assert np.linalg.norm(left @ right - left @ (left.T @ exact)) <= ROUNDING * norm
    held = np.linalg.norm(left.T @ exact) ** 2 / norm**2
    assert result.energy == pytest.approx(held, rel=ROUNDING)
    assert 0.0 <= result.energy <= 1.0
    # Pythagoras: of a projection, what is held and what is missed make up the whole.
    missed = np.linalg.norm(left @ right - exact) ** 2 / norm**2
    assert missed == pytest.approx(1 - held, abs=ROUNDING)


# ---------------------------------------------------------------- the largest directions


@pytest.mark.parametrize("rank", [1, 8, 25, 200])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_energy_of_a_rank_is_the_best_within_the_tolerance(
    kind: str, shape: tuple[int, int], rank: int
) -> None:
    update = spectrum(kind, *shape)
    result = by_rank(update, rank, seed=7)
    assert_projection(result, update)
    best = energies(update)[:rank].sum()
    assert best * (1 - TOLERANCE) <= result.energy <= best * (1 + ROUNDING)
    assert (result.iterations == 0) == (rank == 200)
    assert result.iterations < MOST_ITERATIONS
    if kind != "fast":  # whose last singular values are below an epsilon of the first
        assert result.left.shape[1] == rank


@pytest.mark.parametrize("rank", [3, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_directions_are_numpys_where_every_singular_value_stands_alone(
    shape: tuple[int, int], rank: int
) -> None:
    update = with_values(*shape, 0.9 ** np.arange(min(shape)))
    result = by_rank(update, rank, seed=1)
    left, _, right = np.linalg.svd(update.double().numpy(), full_matrices=False)
    wanted = left[:, :3], right[:3]
    along = np.abs((result.left[:, :3].double().numpy() * wanted[0]).sum(0))
    assert along == pytest.approx(1.0, abs=1e-4)
    rows = result.right[:3].double().numpy()
    across = np.abs((rows * wanted[1]).sum(1)) / np.linalg.norm(rows, axis=1)
    assert across == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_energy_takes_the_fewest_directions(
    kind: str, shape: tuple[int, int], share: float
) -> None:
    update = spectrum(kind, *shape)
    result = by_energy(update, share, seed=7)
    assert_projection(result, update)
    assert result.energy >= share * (1 - TOLERANCE)
    best = energies(update).cumsum()
    rank = result.left.shape[1]
    assert rank == 1 or best[rank - 2] < share * (1 + TOLERANCE)


def test_the_basis_grows_as_far_as_a_share_needs() -> None:
    update = spectrum("power", 700, 1100)
    places = []
    for share in (0.6, 0.97, 0.985, 0.9999):
        result = by_energy(update, share, seed=3)
        assert result.left.shape[1] == 1 + np.count_nonzero(energies(update).cumsum() < share)
        places.append((result.left.shape[1], result.iterations))
    ranks, iterations = zip(*places, strict=True)
    assert ranks[0] < 16 < ranks[1] < 32 < ranks[2] < 64 < ranks[3]
    assert 0 < iterations[0] < iterations[1] < iterations[2]
    assert iterations[3] == 0


def test_a_share_of_almost_all_takes_every_direction() -> None:
    update = gaussian(24, 30)
    result = by_energy(update, 1 - 1e-16, seed=0)
    assert_projection(result, update)
    assert result.left.shape[1] == 24


# ---------------------------------------------------------------- shapes and ranks


@pytest.mark.parametrize("extra", [0, 1, 100])
@pytest.mark.parametrize("shape", [(40, 40), (17, 90), (90, 17), (1, 50), (50, 1), (1, 1)])
def test_every_direction_together_is_the_update(shape: tuple[int, int], extra: int) -> None:
    update = gaussian(*shape)
    result = by_rank(update, min(shape) + extra, seed=0)
    assert_projection(result, update)
    assert result.left.shape[1] == min(shape)
    norm = torch.linalg.vector_norm(update)
    assert torch.linalg.vector_norm(result.left @ result.right - update) <= ROUNDING * norm
    assert result.energy == pytest.approx(1.0, abs=ROUNDING)


@pytest.mark.parametrize("shape", [(3, 5), (200, 300), (1, 1)])
def test_no_update_has_no_directions(shape: tuple[int, int]) -> None:
    zero = torch.zeros(shape)
    for result in (by_rank(zero, 4, seed=0), by_rank(-zero, 9, seed=0), by_energy(zero, 0.9, 0)):
        assert result.left.shape == (shape[0], 0)
        assert result.right.shape == (0, shape[1])
        assert torch.equal(result.left @ result.right, zero)
        assert (result.energy, result.iterations) == (0.0, 0)


@pytest.mark.parametrize("rank", [2, 5, 20, 250])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_a_lower_rank_is_found_whole_and_never_nan(
    shape: tuple[int, int], rank: int
) -> None:
    rng = np.random.default_rng(5)
    # Small integers: products without rounding, so that the rank is exact.
    factors = [rng.integers(-3, 4, size) for size in ((shape[0], 3), (3, shape[1]))]
    update = torch.from_numpy(factors[0] @ factors[1]).float()
    result = by_rank(update, rank, seed=0)
    assert_projection(result, update)
    assert min(rank, 3) <= result.left.shape[1] <= rank
    assert result.energy == pytest.approx(energies(update)[:rank].sum(), rel=ROUNDING)
    share = by_energy(update, 0.999999, seed=0)
    assert_projection(share, update)
    assert share.left.shape[1] == 3


def test_rows_and_columns_of_zeros_do_no_harm() -> None:
    update = torch.zeros((300, 400))
    update[7, 11] = -2.0
    for result in (by_rank(update, 1, 0), by_rank(update, 30, 0), by_energy(update, 0.5, 0)):
        assert_projection(result, update)
        assert torch.allclose(result.left @ result.right, update, atol=1e-6)


def test_the_exact_decomposition_drops_directions_without_energy() -> None:
    update = torch.zeros((10, 14))
    update[:3] = gaussian(3, 14)
    assert by_rank(update, 8, seed=0).left.shape[1] == 3
    assert by_rank(update.T.contiguous(), 8, seed=0).left.shape[1] == 3


@pytest.mark.parametrize("magnitude", [1e-43, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("shape", [(30, 20), (200, 310)])
def test_huge_and_tiny_values_neither_overflow_nor_vanish(
    shape: tuple[int, int], magnitude: float
) -> None:
    plain = with_values(*shape, 0.7 ** np.arange(min(shape)))
    plain /= plain.abs().max()
    update = (plain.double() * magnitude).float()
    # Among subnormal numbers the factors are as coarse as the update itself.
    close = 1e-5 if magnitude > 1e-38 else 0.2
    for result in (by_rank(update, 4, seed=0), by_energy(update, 0.9, seed=0)):
        rank = result.left.shape[1]
        assert rank in (4, 1 + int(np.count_nonzero(energies(update).cumsum() < 0.9)))
        assert torch.isfinite(result.right).all()
        best = energies(update)[:rank].sum()
        assert result.energy == pytest.approx(best, rel=max(TOLERANCE, close))
        product = result.left.double() @ result.right.double()
        values = np.linalg.svd(update.double().numpy(), compute_uv=False)
        missed = float(torch.linalg.vector_norm(product - update.double()))
        optimal = float(np.sqrt(np.square(values[rank:]).sum()))
        assert missed == pytest.approx(optimal, rel=1e-3 + close)


# ---------------------------------------------------------------- the random start


def same(one: LowRank, two: LowRank) -> bool:
    pairs = [(one.left, two.left), (one.right, two.right)]
    return one[2:] == two[2:] and all(np.array_equal(bits(a), bits(b)) for a, b in pairs)


CALLS: dict[str, Callable[[torch.Tensor, int], LowRank]] = {
    "rank": lambda update, seed: by_rank(update, 12, seed),
    "share": lambda update, seed: by_energy(update, 0.3, seed),
    "exact": lambda update, seed: by_rank(update, 150, seed),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_same_seed_gives_the_same_bits_in_calls_and_threads(
    call: Callable[[torch.Tensor, int], LowRank],
) -> None:
    updates = [spectrum("slow", 256, 400), spectrum("signal", 256, 400)]
    wanted = [call(update, 2**64 - 5) for update in updates]
    torch.manual_seed(1)  # the global generator has no part in it ...
    before = torch.get_rng_state()
    assert all(same(call(u, 2**64 - 5), w) for u, w in zip(updates, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # ... and is left as it was
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(call, updates[i % 2], 2**64 - 5) for i in range(8)]
        assert all(same(job.result(), wanted[i % 2]) for i, job in enumerate(jobs))


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 2**64 - 1])
def test_any_64_bits_are_a_seed(seed: int) -> None:
    update = spectrum("power", 200, 240)
    assert_projection(by_rank(update, 3, seed), update)


def test_another_seed_gives_other_bits_of_the_same_projector_at_a_gap() -> None:
    values = np.concatenate([np.linspace(3, 2, 10), np.linspace(0.5, 0.1, 290)])
    update = with_values(300, 420, values)
    one, two = by_rank(update, 10, seed=1), by_rank(update, 10, seed=2)
    assert not same(one, two)
    projectors = [result.left.double() @ result.left.double().T for result in (one, two)]
    assert torch.linalg.matrix_norm(projectors[0] - projectors[1], 2) < 1e-2


# ---------------------------------------------------------------- anything


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    rank=st.integers(1, 30),
    share=st.floats(0.01, 0.999),
    kind=st.sampled_from(["normal", "integers", "steep"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_small_matrix(
    shape: tuple[int, int], rank: int, share: float, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=shape) if kind == "normal" else 1.0 * rng.integers(-1, 2, shape)
    if kind == "steep":
        exact *= 10.0 ** rng.integers(-6, 7, (shape[0], 1))
    update = torch.from_numpy(exact).float()
    results = [by_rank(update, rank, seed), by_energy(update, share, seed)]
    if not update.any():
        assert all(result.left.shape[1] == 0 for result in results)
        return
    best = energies(update).cumsum()
    for result in results:
        assert_projection(result, update)
        kept = result.left.shape[1]
        assert result.energy == pytest.approx(best[kept - 1], rel=TOLERANCE)
    assert results[0].left.shape[1] <= min(rank, *shape)
    assert results[0].energy == pytest.approx(best[min(rank, *shape) - 1], rel=TOLERANCE)
    assert results[1].energy >= share * (1 - TOLERANCE)
    kept = results[1].left.shape[1]
    assert kept == 1 or best[kept - 2] < share * (1 + TOLERANCE)


# ---------------------------------------------------------------- memory


def peak(call: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at a time for a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    results: Any = recorded.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("shape", [(2000, 1000), (600, 3000)])
@pytest.mark.parametrize("rank", [1, 64, 500, None])
def test_the_workspace_is_an_upper_estimate(shape: tuple[int, int], rank: int | None) -> None:
    update = gaussian(*shape)
    estimate = workspace(*shape, rank)

    def call() -> LowRank:
        return by_energy(update, 0.9999, 0) if rank is None else by_rank(update, rank, 0)

    measured = peak(call)
    assert measured <= estimate
    assert estimate <= 2 * measured + 2**24  # what is widened at a time, used or not
