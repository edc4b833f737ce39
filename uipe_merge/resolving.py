"""From measured inner products to the coefficients of every step, as literals of the plan.

With w the direction of a step (v, or its part of low rank), r a further update and inner products
over the tensors of a group:

- along related updates: s = α·κ·w with κ = Σ ⟨r, w⟩/‖w‖², clipped to [0, max-alpha]; an r whose
  cosine with w is below min-cos counts nothing;
- away from a protected update: s ← s − (⟨s, r⟩/‖r‖²)·r where ⟨s, r⟩ < 0, or ``always``, or r is θ₀;
- control: s ← ‖s‖/‖n‖·n with random n;
- further updates: s ← s + Σ β·r.

They are made in this order. Source: the projection argument of UIPE (arXiv 2503.04693); the gate
of the second is that of gradient surgery (arXiv 2001.06782).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.arithmetic.terms import Term, Vector
from uipe_merge.errors import NumericError
from uipe_merge.naming import natural
from uipe_merge.recipe import ALPHA_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from uipe_merge.plan import Plan, Step
    from uipe_merge.steering import Steering

UPDATE = Vector(1, 0)
"""v = θᵤ − θ₀."""

Products = dict[str, tuple[float, ...]]
"""⟨xᵢ, xⱼ⟩ for i ≤ j, row by row, of the vectors of every tensor that is in a group."""


class Made(NamedTuple):
    """The step of one tensor before further updates: the coefficient of w, and the terms."""

    alpha: float
    terms: list[Term]


class GroupRecord(NamedTuple):
    """What was measured over a group, and what came of it.

    Attributes:
        name: The group: a layer, a tensor, or ``model``.
        tensors: The names of its tensors.
        norm: ‖w‖.
        cosines: cos(r, w) of every related update; ``None`` where one of them is zero.
        kappas: ⟨r, w⟩/‖w‖² of each, 0 for one that counts nothing.
        kappa: Their sum, clipped; ``None`` without related updates.
        protected: cos(s, r) with the protected update, before anything is removed.
        conflict: Whether the step would undo the protected update; ``None`` without one.
        removed: The coefficient of r that was added to the step.
        control: The coefficient of the random direction.
        alphas: The smallest and the largest coefficient of w.
    """

    name: str
    tensors: list[str]
    norm: float
    cosines: tuple[float | None, ...]
    kappas: tuple[float, ...]
    kappa: float | None
    protected: float | None
    conflict: bool | None
    removed: float
    control: float | None
    alphas: tuple[float, float]

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON, without what was not asked for."""
        said: dict[str, object] = {"tensors": len(self.tensors), "norm": self.norm}
        if self.kappa is not None:
            said |= {"cosines": list(self.cosines), "kappas": list(self.kappas)}
            said["kappa"] = self.kappa
        if self.conflict is not None:
            said |= {"protected_cosine": self.protected, "conflict": self.conflict}
            said["removed"] = self.removed
        if self.control is not None:
            said["control"] = self.control
        return {**said, "alpha": self.alphas[0] if self._one_alpha else list(self.alphas)}

    @property
    def _one_alpha(self) -> bool:
        return self.alphas[0] == self.alphas[1]


class Gram:
    """The inner products of one group, added up over its tensors."""

    def __init__(self, rows: Sequence[tuple[float, Sequence[float]]]) -> None:
        """Add rows of products, each with a number that its first vector is multiplied by."""
        entries = max((len(row) for _, row in rows), default=1)
        self.size = (math.isqrt(8 * entries + 1) - 1) // 2
        pairs = [(one, two) for one in range(self.size) for two in range(one, self.size)]
        powers = [(one == 0) + (two == 0) for one, two in pairs]
        self._sums = [
            math.fsum(row[place] * scale**power for scale, row in rows)
            for place, power in enumerate(powers)
        ]

    def of(self, one: int, two: int) -> float:
        """Return ⟨x_one, x_two⟩."""
        one, two = min(one, two), max(one, two)
        return self._sums[one * self.size - one * (one - 1) // 2 + two - one]

    def cosine(self, one: int, two: int) -> float | None:
        """Return the cosine of two vectors; ``None`` where one of them is zero."""
        scale = math.sqrt(self.of(one, one)) * math.sqrt(self.of(two, two))
        return max(-1.0, min(1.0, self.of(one, two) / scale)) if scale else None


def measured_vectors(plan: Plan, direction: Vector = UPDATE) -> list[Vector]:
    """Return what inner products are taken of: w, related updates, a protected one, n."""
    assert plan.directions is not None  # noqa: S101 - only such plans are measured
    vectors = [direction, *plan.directions.along]
    if plan.directions.away is not None:
        vectors.append(plan.directions.away)
    if plan.recipe.steering.control == "random":
        vectors.append(Vector(2 + len(plan.further), -1))
    return vectors


def resolve(
    plan: Plan, products: Products, directions: Mapping[str, Vector]
) -> tuple[Plan, list[GroupRecord]]:
    """Return the plan with the terms of every step, and what they were made from.

    Args:
        plan: With steps in groups.
        products: As measured; empty where the recipe needs none.
        directions: w of the tensors whose direction is not v.

    Raises:
        NumericError: A coefficient is so large that nothing of the model would be left.
    """
    members: dict[str, list[Step]] = {}
    for step in plan.steps:
        if step.group:
            members.setdefault(step.group, []).append(step)
    records: list[GroupRecord] = []
    made: dict[str, Made] = {}
    for name, steps in members.items():
        record, found = _group(plan, name, steps, products, directions)
        made |= found
        if products:
            records.append(record)
    records.sort(key=lambda record: natural(record.name))
    shards = [
        shard._replace(steps=[_resolved(plan, step, made.get(step.name)) for step in shard.steps])
        for shard in plan.shards
    ]
    return plan._replace(shards=shards), records


def _group(
    plan: Plan,
    name: str,
    steps: list[Step],
    products: Products,
    directions: Mapping[str, Vector],
) -> tuple[GroupRecord, dict[str, Made]]:
    """Make the terms of one group's steps, but for further updates."""
    steering = plan.recipe.steering
    vectors = measured_vectors(plan)
    related = len(steering.along)
    # Where nothing was measured, because nothing had to be, every product is 0 and unused.
    nothing = [0.0] * (len(vectors) * (len(vectors) + 1) // 2)
    rows = [products.get(step.name, nothing) for step in steps]
    plain = Gram([(1.0, row) for row in rows])
    cosines, kappas = _along(steering, plain, related)
    kappa = max(0.0, min(math.fsum(kappas), float(steering.max_alpha))) if related else None
    alphas = [step.alpha * (1.0 if kappa is None else kappa) for step in steps]
    _require_usable(name, alphas)
    scaled = Gram(list(zip(alphas, rows, strict=True)))
    protected, removed, conflict = None, 0.0, None
    away = 1 + related
    if steering.away_from is not None:
        inner, square = scaled.of(0, away), scaled.of(away, away)
        protected, conflict = scaled.cosine(0, away), inner < 0
        ungated = steering.always or vectors[away].old < 0
        if square and (conflict or ungated):
            removed = -inner / square
    control: float | None = None
    if steering.control == "random":
        last = plain.size - 1
        square = scaled.of(0, 0)
        if removed:
            square += 2 * removed * scaled.of(0, away) + removed**2 * scaled.of(away, away)
        noise = scaled.of(last, last)
        control = math.sqrt(max(square, 0.0) / noise) if noise else 0.0
    made: dict[str, Made] = {}
    for step, alpha in zip(steps, alphas, strict=True):
        terms = [Term(alpha, *directions.get(step.name, UPDATE))]
        if removed:
            terms.append(Term(removed, *vectors[away]))
        if control is not None:
            terms = [Term(control, *vectors[-1])]
        made[step.name] = Made(alpha, terms)
    names = [step.name for step in steps]
    norm = math.sqrt(plain.of(0, 0))
    spread = min(alphas), max(alphas)
    record = GroupRecord(
        name, names, norm, cosines, kappas, kappa, protected, conflict, removed, control, spread
    )
    return record, made


def _along(
    steering: Steering, gram: Gram, related: int
) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
    """Return cosine and κ of every related update."""
    cosines = tuple(gram.cosine(0, number) for number in range(1, 1 + related))
    square = gram.of(0, 0)
    kappas = tuple(
        0.0 if cosine is None or cosine < steering.min_cos else gram.of(0, number) / square
        for number, cosine in enumerate(cosines, 1)
    )
    return cosines, kappas


def _resolved(plan: Plan, step: Step, made: Made | None) -> Step:
    """Give a step its terms and the operands that they need; α·v alone is a plain step."""
    if step.operation != "extrapolate":
        return step
    assert plan.directions is not None  # noqa: S101 - see measured_vectors
    alpha, terms = made or Made(0.0, [])  # α = 0 is in no group, but further updates are added
    terms = [term for term in (*terms, *plan.directions.add) if term.coefficient]
    if not terms or (len(terms) == 1 and Vector(*terms[0][1:]) == UPDATE):
        plain = terms[0].coefficient if terms else 0.0
        return step._replace(alpha=plain, further=(), terms=())
    step, vectors = narrowed(step, [Vector(*term[1:]) for term in terms])
    moved = [Term(term.coefficient, *vector) for term, vector in zip(terms, vectors, strict=True)]
    return step._replace(alpha=alpha, terms=tuple(moved))


def narrowed(step: Step, vectors: Iterable[Vector]) -> tuple[Step, list[Vector]]:
    """Return a step with just the operands that some vectors need, and those in its numbering."""
    vectors = list(vectors)
    places = {-1: -1, 0: 0, 1: 1}
    for operand in (operand for vector in vectors for operand in vector):
        places.setdefault(operand, len(places) - 1)
    further = tuple(step.further[operand - 2] for operand in places if operand > 1)
    moved = [Vector(places[vector.new], places[vector.old]) for vector in vectors]
    return step._replace(further=further), moved


def _require_usable(name: str, alphas: Iterable[float]) -> None:
    largest = max(map(abs, alphas), default=0.0)
    if not largest < ALPHA_LIMIT:
        raise NumericError(
            f"the related updates make an alpha of {largest:g} in {name}: nothing of the model "
            "would be left",
            remedy="choose a smaller --max-alpha or --alpha",
        )
