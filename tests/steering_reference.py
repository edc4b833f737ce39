"""Steered steps again, for the tests: numpy in float64, straight from the method's formulas.

Nothing here knows the package: models are arrays by name, updates are written ``NEW`` or
``NEW@@OLD`` with the names of models.
"""

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = dict[str, Array]
Family = Mapping[str, Model]
"""Models by name: ``original``, ``unlearned`` and further ones."""

EDGE = 1e-4
"""How near a decision of the tests' own data may come to its threshold."""


class Asked(NamedTuple):
    """What a merge is asked for."""

    along: tuple[str, ...] = ()
    min_cos: float = 0.05
    max_alpha: float = 5.0
    away_from: str = ""
    always: bool = False
    rank: int | None = None
    energy: float | None = None
    rank_all: bool = False
    granularity: Literal["tensor", "layer", "model"] = "layer"
    add: tuple[tuple[str, float], ...] = ()
    alpha: float = 1.0
    rules: tuple[tuple[str, float], ...] = ()


class Figures(NamedTuple):
    """What a group's step is made from, and the vectors it is made of."""

    names: list[str]
    norm: float
    cosines: list[float | None]
    kappas: list[float]
    kappa: float | None
    protected: float | None
    conflict: bool | None
    removed: float
    alphas: dict[str, float]


class Made(NamedTuple):
    """The steps of all tensors, and how they came about."""

    steps: Model
    groups: dict[str, Figures]
    ranks: dict[str, tuple[int, float]]


def make(family: Family, asked: Asked) -> Made:
    """Make the step of every tensor of floating point."""
    old, new = family["original"], family["unlearned"]
    v = {name: new[name] - old[name] for name in old}
    alphas = {name: _alpha(name, asked) for name in v}
    w, ranks = dict(v), dict[str, tuple[int, float]]()
    for name in v if asked.rank or asked.energy else ():
        if v[name].ndim >= 2 and v[name].size and alphas[name] and (_layer(name) or asked.rank_all):
            w[name], k, held = coherent(v[name], asked.rank, asked.energy)
            ranks[name] = k, held
    steps, groups = {name: np.zeros_like(each) for name, each in v.items()}, dict[str, Figures]()
    for group, names in _groups(alphas, asked.granularity).items():
        made, groups[group] = _group(family, asked, names, w, alphas)
        steps |= made
    for update, beta in asked.add:
        r = difference(family, update)
        steps = {name: step + beta * r[name] for name, step in steps.items()}
    return Made(steps, groups, ranks)


def difference(family: Family, update: str) -> Model:
    """θ_new − θ_old of ``NEW@@OLD``; OLD is the original where it is not said."""
    new, _, old = update.partition("@@")
    return {name: value - family[old or "original"][name] for name, value in family[new].items()}


def coherent(v: Array, rank: int | None, energy: float | None) -> tuple[Array, int, float]:
    """U_k·U_kᵀ·v of a matrix or of each of a stack; the largest k, the least share of ‖v‖²."""
    if v.ndim == 3:
        parts = [coherent(matrix, rank, energy) for matrix in v]
        w = np.stack([part for part, _, _ in parts])
        return w, max(k for _, k, _ in parts), min(held for _, _, held in parts)
    if not v.any():
        return v, 0, 0.0
    left, values, _ = np.linalg.svd(v, full_matrices=False)
    held = np.cumsum(values**2) / np.sum(values**2)
    if energy is not None:
        assert np.abs(held - energy).min() > EDGE, "too near to decide"
        rank = 1 + int(np.count_nonzero(held < energy))
    assert rank is not None
    k = min(rank, int(np.count_nonzero(values > 1e-6 * values[0])))
    return left[:, :k] @ (left[:, :k].T @ v), k, float(held[k - 1])


def _group(
    family: Family, asked: Asked, names: list[str], w: Model, alphas: dict[str, float]
) -> tuple[Model, Figures]:
    def dot(one: Model, two: Model) -> float:
        return math.fsum(float(np.sum(one[name] * two[name])) for name in names)

    related = [difference(family, update) for update in asked.along]
    cosines = [cosine(dot, r, w) for r in related]
    edge = [c for c in cosines if c is not None and abs(c - asked.min_cos) < EDGE]
    assert not edge or asked.min_cos == -1, "too near to decide"
    kappas = [
        0.0 if c is None or c < asked.min_cos else dot(r, w) / dot(w, w)
        for c, r in zip(cosines, related, strict=True)
    ]
    kappa = min(max(sum(kappas), 0.0), asked.max_alpha) if related else None
    own = {name: alphas[name] * (1.0 if kappa is None else kappa) for name in names}
    s = {name: own[name] * w[name] for name in names}
    protected, conflict, removed = None, None, 0.0
    if asked.away_from:
        itself = asked.away_from == "original"
        r = family["original"] if itself else difference(family, asked.away_from)
        protected, conflict = cosine(dot, s, r), dot(s, r) < 0
        assert protected is None or abs(protected) > EDGE, "too near to decide"
        if (conflict or asked.always or itself) and dot(r, r):
            removed = -dot(s, r) / dot(r, r)
            s = {name: s[name] + removed * r[name] for name in names}
    norm = math.sqrt(dot(w, w))
    return s, Figures(names, norm, cosines, kappas, kappa, protected, conflict, removed, own)


def cosine(dot: Callable[[Model, Model], float], one: Model, two: Model) -> float | None:
    """The cosine of two vectors; nothing where one of them is zero."""
    scale = math.sqrt(dot(one, one) * dot(two, two))
    return min(max(dot(one, two) / scale, -1.0), 1.0) if scale else None


def _alpha(name: str, asked: Asked) -> float:
    return next(
        (alpha for pattern, alpha in asked.rules if fnmatchcase(name, pattern)), asked.alpha
    )


def _layer(name: str) -> str:
    found = re.match(r"(.*\blayers\.\d+)\.", name)
    return found[1] if found else ""


def _groups(alphas: dict[str, float], granularity: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, alpha in alphas.items():
        group = {"tensor": name, "layer": _layer(name) or name, "model": "model"}[granularity]
        if alpha:
            groups.setdefault(group, []).append(name)
    return groups
