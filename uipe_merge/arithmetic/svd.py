"""The coherent part of a matrix's update: U_k·U_kᵀ·v, U_k its top-k left singular vectors.

Sources: randomised subspace iteration of Halko, Martinsson, Tropp, "Finding structure with
randomness" (2011), algorithm 4.4, with the momentum of Xu, He, De Sa, Mitliagkas, Ré,
"Accelerated stochastic power iteration" (2018). Without momentum the energy creeps where the
spectrum is flat, and a small step does not tell that little is missing.

The update is read, never copied. Beside it are held at most some 4·width·(rows + columns)
float32, width = rank + 8; where that width is no small part of min(rows, columns), an exact
decomposition is cheaper and holds four float64 matrices of min(rows, columns) squared beside
its result. ``workspace`` says how many bytes.

Random numbers come from a generator of the call's own: threads share torch's global one, and
``torch.svd_lowrank`` draws from that. The same update and seed give the same bits in a process
with ``torch.set_num_threads(1)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-4
"""What the energy of the top k may lack, as a share of the most that k directions can hold.

The iterations end when one changes that energy by no more than a fifth of this: where the
spectrum is flat, the steps that are not made add up to a few times the last one.
"""

MOST_ITERATIONS = 32
"""Power iterations at most with one basis, whatever the energy still gains.

Only spectra without any decay take as many. Up to 8e-4 was lacking then, with a basis of a
dozen directions among 2048 whose singular values fall along a straight line.
"""

_OVERSAMPLING = 8
_FIRST_WIDTH = 16

_EXACT_FROM = 8
"""The exact decomposition is taken for a basis of more than 1/8 of the smaller side.

Measured with smaller sides from 300 to 2048 the two take the same time from 1/16 (flat and wide)
to 1/4 (steep and square).
"""

_FLAT = 1e-6
"""Momentum needs a least energy in the basis of this share of the largest.

A steeper spectrum converges without, and is too much for a triangle's inverse in float32.
"""

_MOST_EXPONENT = 100
"""Factors up to 2¹⁰⁰ and their products with any update stay inside float32."""

_CHUNK = 2**20
"""Elements that are widened to float64 at a time."""


class LowRank(NamedTuple):
    """U_k·U_kᵀ·v in factors.

    Attributes:
        left: U_k, of shape ``(rows, k)``, float32, with orthonormal columns.
        right: U_kᵀ·v, of shape ``(k, columns)``, float32.
        energy: ‖U_kᵀ·v‖²/‖v‖² in the Frobenius norm; 0 for v = 0.
        iterations: Power iterations that were made; 0 for the exact decomposition.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: float
    iterations: int


class _Subspace(NamedTuple):
    """What the iterations found: an orthonormal basis Q, and P·R = s·vᵀ·Q.

    The rank is the number of directions wanted from it, 0 if it does not hold enough.
    """

    basis: torch.Tensor
    inner: torch.Tensor
    triangle: torch.Tensor
    rank: int
    iterations: int


def by_rank(update: torch.Tensor, rank: int, seed: int) -> LowRank:
    """Return the part of an update in its ``rank`` largest singular directions.

    Directions without energy are left out: a matrix of a lower rank gives fewer.

    Args:
        update: v, finite float32 of shape ``(rows, columns)``, contiguous.
        rank: k, at least 1.
        seed: 64 bits, for the random start.
    """
    scale = _scale(update)
    if scale == 0.0:
        return _nothing(update)
    width = rank + _OVERSAMPLING
    if _EXACT_FROM * width > min(update.shape):
        return _exact(update, scale, lambda _: rank)
    start = _sample(update, scale, width, _generator(seed))
    found = _iterate(update, scale, _orthonormal(start), lambda _: rank)
    return _inside(update, scale, found)


def by_energy(update: torch.Tensor, share: float, seed: int) -> LowRank:
    """Return the part of an update in the fewest singular directions with a share of ‖v‖².

    Args:
        update: v, finite float32 of shape ``(rows, columns)``, contiguous.
        share: Of the squared Frobenius norm; above 0, below 1.
        seed: 64 bits, for the random start.
    """
    scale = _scale(update)
    if scale == 0.0:
        return _nothing(update)
    goal = share * _squares(update) * scale**2

    def fewest(energies: torch.Tensor) -> int:
        below = int((energies.cumsum(0) < goal).sum())
        return below + 1 if below < len(energies) else 0

    generator = _generator(seed)
    basis = update.new_empty((update.shape[0], 0))
    iterations = 0
    width = _FIRST_WIDTH
    while _EXACT_FROM * width <= min(update.shape):
        fresh = _sample(update, scale, width - basis.shape[1], generator)
        found = _iterate(update, scale, _orthonormal(torch.cat([basis, fresh], dim=1)), fewest)
        iterations += found.iterations
        if found.rank:
            return _inside(update, scale, found._replace(iterations=iterations))
        basis = found.basis
        del found, fresh  # before the wider ones
        width *= 2
    # Rounding may leave all energies together a little below a share that is almost 1.
    return _exact(update, scale, lambda energies: fewest(energies) or len(energies))


def workspace(rows: int, columns: int, rank: int | None) -> int:
    """Return about how many bytes a call allocates at most, its result included.

    What the allocator keeps of freed blocks may come on top: as much again was
    measured.

    Args:
        rows: Of the update.
        columns: Of the update.
        rank: What ``by_rank`` is asked for; None for ``by_energy``.
    """
    smaller = min(rows, columns)
    width = smaller if rank is None else rank + _OVERSAMPLING
    if _EXACT_FROM * width <= smaller:
        return 16 * (width * (rows + columns) + 4 * width**2 + _CHUNK)
    kept = min(width, smaller)
    return max(32 * smaller**2, 12 * kept * (rows + columns)) + 16 * _CHUNK


def _iterate(
    update: torch.Tensor,
    scale: float,
    basis: torch.Tensor,
    pick: Callable[[torch.Tensor], int],
) -> _Subspace:
    """Turn a basis towards the largest singular directions until their energy is stable.

    With A = s²·v·vᵀ a step is Q₊·S₊ = A·Q − β·Q₋·S⁻¹. It spans what X₊ = A·X − β·X₋ does, a
    scaled Chebyshev polynomial of A: directions whose eigenvalue is above 2√β outgrow all
    others. The least eigenvalue seen in the basis is such a bound, and the one of the step
    before is small enough for any S.

    Args:
        update: v.
        scale: s.
        basis: The Q to start from.
        pick: Gives the wanted number of directions for the energies in the basis, largest
            first; 0 ends the iterations after the first of them.
    """
    before: torch.Tensor | None = None  # Q₋ ...
    growth = energies = torch.empty(0, dtype=torch.float64)  # ... and S
    iterations = 0
    while True:
        inner, triangle = _factors(update.T @ (basis * scale))
        last, energies = energies, _energies(triangle)
        rank = pick(energies)
        if iterations:
            now, then = float(energies[:rank].sum()), float(last[:rank].sum())
            stable = abs(now - then) <= TOLERANCE / 5 * now
            if rank == 0 or stable or iterations == MOST_ITERATIONS:
                return _Subspace(basis, inner, triangle, rank, iterations)
            if now < then:
                before = None  # momentum went too far: begin anew
        following = update @ inner.mul_(scale)  # A·Q = this·R, and R is taken out of all terms
        del inner
        if before is not None and float(last[-1]) > _FLAT * float(energies[0]):
            beta = float(last[-1]) ** 2 / 4
            following.addmm_(before, _inverse(triangle @ growth).mul_(beta).float(), alpha=-1)
        before = basis
        basis, stretch = _factors(following)
        growth = stretch @ triangle
        iterations += 1


def _inside(update: torch.Tensor, scale: float, found: _Subspace) -> LowRank:
    """Return the largest directions inside a basis (Rayleigh–Ritz)."""
    values, vectors = torch.linalg.eigh(found.triangle.T @ found.triangle)
    rotation = _largest(values, vectors, found.rank)
    left = found.basis @ rotation.float()
    right = (found.triangle @ rotation).float().T @ found.inner.T
    return _measured(update, left, right.div_(scale), found.iterations)


def _exact(update: torch.Tensor, scale: float, pick: Callable[[torch.Tensor], int]) -> LowRank:
    """Return the largest directions by an eigendecomposition of the smaller Gram matrix."""
    tall = update.shape[0] > update.shape[1]
    values, vectors = torch.linalg.eigh(_gram(update.T if tall else update, scale))
    kept = _largest(values, vectors, pick(values.flip(0))).float()
    del vectors
    left = _orthonormal(update @ kept.mul_(scale)) if tall else kept
    return _measured(update, left, left.T @ update, 0)


def _measured(
    update: torch.Tensor, left: torch.Tensor, right: torch.Tensor, iterations: int
) -> LowRank:
    """Return the factors with their share of the energy, which rounding leaves at most 1."""
    energy = min(_squares(right) / _squares(update), 1.0)
    return LowRank(left, right, energy, iterations)


def _nothing(update: torch.Tensor) -> LowRank:
    """Return the factors of v = 0."""
    rows, columns = update.shape
    return LowRank(update.new_empty((rows, 0)), update.new_empty((0, columns)), 0.0, 0)


def _scale(update: torch.Tensor) -> float:
    """Return a power of two that brings the largest magnitude near 1; 0 for v = 0."""
    least, most = torch.aminmax(update)
    largest = max(-float(least), float(most))
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    return 2.0 ** -max(-_MOST_EXPONENT, min(exponent, _MOST_EXPONENT))


def _generator(seed: int) -> torch.Generator:
    """Return a generator that no other call has a hand in."""
    return torch.Generator().manual_seed(seed % 2**63)


def _sample(
    update: torch.Tensor, scale: float, width: int, generator: torch.Generator
) -> torch.Tensor:
    """Return ``width`` random combinations of the columns of s·v."""
    # Drawn by the processor, whose generator gives the same numbers everywhere.
    test = torch.randn((update.shape[1], width), generator=generator)
    return update @ test.mul_(scale).to(update.device)


def _factors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an orthonormal Q, and the R of M = Q·R in float64."""
    basis, triangle = torch.linalg.qr(matrix)
    return basis, triangle.double()


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of a matrix's columns."""
    return _factors(matrix)[0]


def _energies(triangle: torch.Tensor) -> torch.Tensor:
    """Return the squared singular values of an R, largest first."""
    values: torch.Tensor = torch.linalg.eigvalsh(triangle.T @ triangle)
    return values.flip(0).clamp_min_(0)


def _inverse(triangle: torch.Tensor) -> torch.Tensor:
    """Return the inverse of an upper triangle."""
    one = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(triangle, one, upper=True)
    return inverse


def _largest(values: torch.Tensor, vectors: torch.Tensor, rank: int) -> torch.Tensor:
    """Return at most ``rank`` eigenvectors, largest first, without those of eigenvalue zero.

    Zero is what float32 cannot tell from it: a singular value of an epsilon of the largest.
    """
    epsilon = torch.finfo(torch.float32).eps
    above = int((values > epsilon**2 * values[-1]).sum())
    return vectors[:, len(values) - min(rank, above) :].flip(1)


def _gram(wide: torch.Tensor, scale: float) -> torch.Tensor:
    """Return s²·W·Wᵀ in float64."""
    rows = wide.shape[0]
    gram = torch.zeros((rows, rows), dtype=torch.float64, device=wide.device)
    for piece in torch.split(wide, max(1, _CHUNK // rows), dim=1):
        doubles = piece.double().mul_(scale)
        gram.addmm_(doubles, doubles.T)
    return gram


def _squares(matrix: torch.Tensor) -> float:
    """Return the sum of the squares of all elements, in float64."""
    total = 0.0
    for piece in torch.split(matrix.reshape(-1), _CHUNK):
        doubles = piece.double()
        total += float(doubles @ doubles)
    return total
