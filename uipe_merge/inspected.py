"""What ``inspect`` found: the update of every tensor, and of any group of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from uipe_merge.report import TOLERANCE, exact_sum, quotient, root
from uipe_merge.resolving import Gram, Products

if TYPE_CHECKING:
    from collections.abc import Callable

    from uipe_merge.naming import Place
    from uipe_merge.plan import Step

Key = TypeVar("Key")


class Group(NamedTuple):
    """The update of some tensors, from additive sums.

    Attributes:
        tensors: How many.
        elements: Their elements; complex ones count twice.
        update: ‖v‖².
        unlearned: ‖θᵤ‖².
        differing: Elements with v ≠ 0.
        along: ⟨θ_out − θᵤ, v⟩ for each α that was tried.
        cosines: cos(r, v) with each further update r; ``None`` where one of the two is zero.
    """

    tensors: int
    elements: int
    update: float
    unlearned: float
    differing: float
    along: tuple[float, ...]
    cosines: tuple[float | None, ...] = ()

    def as_dict(self, alphas: tuple[float, ...]) -> dict[str, object]:
        """Return the measures as plain values for JSON."""
        return {
            **({"cosines": list(self.cosines)} if self.cosines else {}),
            "tensors": self.tensors,
            "elements": self.elements,
            "norm": self.norm,
            "ratio": self.ratio,
            "share_changed": self.share_changed,
            "effective_alpha": dict(zip(map(repr, alphas), self.effective_alphas, strict=True)),
        }

    @property
    def norm(self) -> float | None:
        """‖v‖; ``None`` where its square overflows float64."""
        return root(self.update)

    @property
    def ratio(self) -> float | None:
        """‖v‖/‖θᵤ‖; ``None`` where θᵤ is zero."""
        return root(quotient(self.update, self.unlearned))

    @property
    def share_changed(self) -> float:
        """Share of elements with v ≠ 0."""
        return self.differing / self.elements if self.elements else 0.0

    @property
    def effective_alphas(self) -> tuple[float | None, ...]:
        """The α each α tried would come out as; ``None`` where v is zero or it overflows."""
        return tuple(quotient(along, self.update) for along in self.along)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``inspect`` returns.

    Attributes:
        alphas: The α that were tried at the output dtype.
        updates: The further updates that v was held against.
        tensors: Every tensor that can be extrapolated, by name.
        layers: Per layer; ``None`` gathers what belongs to no layer.
        kinds: Per module kind.
        cells: Per layer and kind, for the heat map.
        total: The model.
        zero: Tensors with v = 0.
        differing_integers: Integer or boolean tensors that differ.
        mismatches: What keeps the two from being merged.
        warnings: What is odd but does not.
    """

    alphas: tuple[float, ...]
    updates: tuple[str, ...]
    tensors: dict[str, Group]
    layers: dict[int | None, Group]
    kinds: dict[str, Group]
    cells: dict[Place, Group]
    total: Group
    zero: list[str]
    differing_integers: list[str]
    mismatches: list[str]
    warnings: list[str]

    def as_dict(self) -> dict[str, object]:
        """Return everything as plain values for JSON."""
        alphas = self.alphas
        return {
            "alphas": list(alphas),
            "updates": list(self.updates),
            "total": self.total.as_dict(alphas),
            "layers": [
                {"layer": layer, **group.as_dict(alphas)} for layer, group in self.layers.items()
            ],
            "kinds": [
                {"kind": kind, **group.as_dict(alphas)} for kind, group in self.kinds.items()
            ],
            "tensors": {name: group.as_dict(alphas) for name, group in self.tensors.items()},
            "zero": self.zero,
            "differing_integers": self.differing_integers,
            "mismatches": self.mismatches,
            "warnings": self.warnings,
        }

    def rounding_warnings(self) -> list[str]:
        """Name the α among those tried that the output dtype would not give."""
        pairs = zip(self.alphas, self.total.effective_alphas, strict=True)
        lost = [
            f"{alpha:g} → {got:.3g}"
            for alpha, got in pairs
            if got is not None and abs(got - alpha) > TOLERANCE * abs(alpha)
        ]
        if not lost:
            return []
        return [
            (
                f"at the output dtype rounding would change α: {', '.join(lost)}; merge with "
                "--dtype float32 to keep the whole step"
            )
        ]


class Gathered:
    """The sums of every tensor, added up over any grouping of them."""

    def __init__(
        self,
        steps: list[Step],
        rows: dict[str, list[tuple[float, ...]]],
        products: Products,
        alphas: tuple[float, ...],
    ) -> None:
        """Take the rows of ``InspectWorker`` and the inner products, both by tensor."""
        self._steps = steps
        self._rows = rows
        self._products = products
        self._alphas = alphas

    def by(self, key: Callable[[str], Key]) -> dict[Key, Group]:
        """Return the groups of tensors whose names have one key."""
        members: dict[Key, list[Step]] = {}
        for step in self._steps:
            members.setdefault(key(step.name), []).append(step)
        return {name: self.of(group) for name, group in members.items()}

    def of(self, steps: list[Step]) -> Group:
        """Return one group."""
        everything = [row for step in steps for row in self._rows.get(step.name, [])]
        columns = [exact_sum(column) for column in zip(*everything, strict=True)]
        update, unlearned, differing, *along = columns or [0.0] * (3 + len(self._alphas))
        elements = sum(step.elements * step.dtype.lanes for step in steps)
        group = Group(len(steps), elements, update, unlearned, differing, tuple(along))
        measured = [(1.0, self._products[each.name]) for each in steps if self._products]
        if not measured:
            return group
        gram = Gram(measured)
        cosines = [gram.cosine(0, number) for number in range(1, gram.size)]
        return group._replace(cosines=tuple(cosines))
