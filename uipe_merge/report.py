"""What a run did, in numbers: per tensor and over the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from uipe_merge.plan import Operation, Step

TOLERANCE = 0.05
"""Relative departure of the effective α from α above which a run warns."""


class Sums(NamedTuple):
    """Additive sums over a group of tensors; see ``arithmetic.mixed.MixedMoments``."""

    update: float = 0.0
    unlearned: float = 0.0
    along: float = 0.0
    error: float = 0.0
    changed: float = 0.0
    step: float = 0.0
    asked: float = 0.0
    realised: float = 0.0

    @property
    def norm(self) -> float | None:
        """‖v‖; ``None`` where its square overflows float64."""
        return root(self.update)

    @property
    def ratio(self) -> float | None:
        """‖v‖/‖θᵤ‖; ``None`` where θᵤ is zero."""
        return root(quotient(self.update, self.unlearned))

    @property
    def effective_alpha(self) -> float | None:
        """⟨θ_out − θᵤ, v⟩/‖v‖²; ``None`` where v is zero."""
        return quotient(self.along, self.update)

    @property
    def asked_alpha(self) -> float | None:
        """⟨s, v⟩/‖v‖² of the step s that was asked for; ``None`` where v is zero."""
        return quotient(self.asked, self.update)

    @property
    def rounding_error(self) -> float | None:
        """‖θ_out − θᵤ − s‖/‖s‖; ``None`` where the step is zero."""
        return root(quotient(self.error, self.step))

    @property
    def kept(self) -> float | None:
        """⟨θ_out − θᵤ, s⟩/‖s‖², what rounding left of the step; ``None`` where that is zero."""
        return quotient(self.realised, self.step)

    def of_plain(self, alpha: float) -> Sums:
        """Return them with what follows from the others where s = α·v."""
        step, asked = alpha * alpha * self.update, alpha * self.update
        return self._replace(step=step, asked=asked, realised=alpha * self.along)


def root(square: float | None) -> float | None:
    """Return the square root; ``None`` where there is no number to take it of."""
    return math.sqrt(square) if square is not None and math.isfinite(square) else None


def quotient(one: float, two: float) -> float | None:
    """Divide; ``None`` where the divisor is zero or a sum overflowed."""
    return one / two if two and math.isfinite(one) and math.isfinite(two) else None


def exact_sum(column: Iterable[float]) -> float:
    """Add, exactly rounded, so that the result does not depend on the order.

    Infinite where the sum overflows or a summand is not finite.
    """
    try:
        total = math.fsum(column)
    except (OverflowError, ValueError):  # too large on the way; infinities of both signs
        return math.inf
    return total if math.isfinite(total) else math.inf


def add(groups: Iterable[Sums]) -> Sums:
    """Add sums, column by column."""
    return Sums(*map(exact_sum, zip(*groups, strict=True)))


def sums_of(step: Step, cells: Sequence[Sums]) -> Sums | None:
    """Return the sums of a tensor, from those of its cells; ``None`` for copies and casts."""
    if not cells and step.operation not in ("extrapolate", "keep"):
        return None
    sums = add(cells) if cells else Sums()
    return sums if step.terms else sums.of_plain(step.alpha)


@dataclass(frozen=True, slots=True)
class Summary:
    """A run over the whole model.

    Attributes:
        alpha: The α asked for; where it differs between tensors, their mean weighted by ‖v‖².
        tensors: ``(tensors, bytes)`` by operation.
        unchanged: Extrapolated tensors whose update is zero.
        total: Sums over the extrapolated tensors; ``None`` where there are none.
        elements: Elements of the extrapolated tensors; complex ones count twice.
        spread: The smallest and the largest α of all tensors, where they differ.
        steered: Whether the step is anything else than α·v.
        kept: Tensors copied or cast at another α than 0 and −1: kept from one side by decision,
            or the A factors of an adapter that is written as one.
    """

    alpha: float
    tensors: dict[Operation, tuple[int, int]]
    unchanged: int
    total: Sums | None
    elements: int
    spread: tuple[float, float] | None = None
    steered: bool = False
    kept: int = 0

    @property
    def asked(self) -> str:
        """What was asked for, in words: α, or the values that it has."""
        if self.spread is None:
            return f"{self.alpha:.4g}"
        values = f"{self.spread[0]:g} to {self.spread[1]:g}"
        return values if self.steered else f"{values}, {self.alpha:.4g} on average"

    @property
    def rounding_error(self) -> float | None:
        """‖θ_out − θᵤ − s‖/‖s‖; ``None`` where the step is zero or nothing was extrapolated."""
        return None if self.total is None else self.total.rounding_error

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the closing table."""
        extrapolated, _ = self.tensors.get("extrapolate", (0, 0))
        carried = sum(count for count, _ in self.tensors.values()) - extrapolated
        rows = [
            ("tensors extrapolated", f"{extrapolated:,} ({self.unchanged:,} with v = 0)"),
            ("tensors copied", f"{carried:,}"),
        ]
        if self.total is not None:
            total, error = self.total, self.rounding_error
            step = "s" if self.steered else "αv"
            rows.append(("‖v‖/‖θᵤ‖", "–" if total.ratio is None else f"{total.ratio:.3e}"))
            if self.steered:
                asked, kept = _shown(total.asked_alpha), _shown(total.kept, ".2%")
                rows += [
                    ("α of the direction", self.asked),
                    ("⟨s, v⟩/‖v‖² asked / effective", f"{asked} / {_shown(total.effective_alpha)}"),
                    ("step kept by rounding", kept),
                ]
            else:
                effective = _shown(total.effective_alpha)
                rows.append(("α asked / effective", f"{self.asked} / {effective}"))
            rows += [
                (f"rounding error ‖θ−θᵤ−{step}‖/‖{step}‖", _shown(error, ".3g")),
                ("elements changed", f"{self.total.changed / max(self.elements, 1):.2%}"),
            ]
        return rows

    def warnings(self) -> list[str]:
        """Return what the user should know about the numbers."""
        if self.total is None or not self.elements:
            return []
        if self.total.update == 0 and self.total.step == 0 and not self.kept:
            return [
                (
                    "the two checkpoints hold identical weights: every update is zero and the "
                    "output equals both; check that the right directories were named"
                )
            ]
        share = self.total.kept
        if share is None or abs(share - 1) <= TOLERANCE:
            return []
        effective = self.total.effective_alpha
        what = f"{share:.1%} of the step"
        if not self.steered and effective is not None:
            what = f"an effective α of {effective:.4g} where {self.alpha:.4g} was asked for"
        lost = 1 - self.total.changed / self.elements
        return [
            (
                f"rounding to the output dtype leaves {what} ({lost:.0%} of the elements did not "
                "change); write with --dtype float32 to keep the whole step, or with --rounding "
                "stochastic to keep it on average"
            )
        ]

    def as_dict(self) -> dict[str, object]:
        """Return the summary as plain values for JSON."""
        total = self.total
        return {
            "alpha": self.alpha,
            "alpha_spread": self.spread,
            "tensors": {name: {"count": n, "bytes": b} for name, (n, b) in self.tensors.items()},
            "unchanged": self.unchanged,
            "norm": total and total.norm,
            "ratio": total and total.ratio,
            "effective_alpha": total and total.effective_alpha,
            "share_kept": total and total.kept,
            "rounding_error": self.rounding_error,
            "share_changed": total and total.changed / max(self.elements, 1),
        }


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What ``merge`` returns.

    Attributes:
        output: The published directory, or its URL.
        summary: The numbers over the model.
        tensors: The record of every tensor, as in the manifest.
        warnings: Everything the user should know, with the remedy.
        written: Bytes of the weight files.
        seconds: Wall time.
        resumed: Shards that an interrupted run had finished already.
        groups: What was measured to make the steps, and what came of it, as in the manifest.
    """

    output: Path | str
    summary: Summary
    tensors: dict[str, dict[str, object]]
    warnings: list[str]
    written: int
    seconds: float
    resumed: int = 0
    groups: dict[str, dict[str, object]] = field(default_factory=dict)


def summarise(
    steps: Iterable[Step],
    sums: Mapping[str, Sums | None],
    fallback: float,
    *,
    steered: bool = False,
) -> Summary:
    """Reduce the sums of every tensor to those of the model.

    Args:
        steps: The plan.
        sums: The sums by tensor.
        fallback: The recipe's own α, where nothing was extrapolated.
        steered: Whether the recipe asks for anything else than α·v.
    """
    counts: dict[Operation, tuple[int, int]] = {}
    moved: list[Sums] = []
    unchanged = elements = kept = 0
    alphas: list[float] = []
    copied: set[float] = set()
    for step in steps:
        tensors, nbytes = counts.get(step.operation, (0, 0))
        counts[step.operation] = (tensors + 1, nbytes + step.nbytes)
        values = sums[step.name]
        if step.operation == "extrapolate" and values is not None:
            moved.append(values)
            alphas.append(step.alpha)
            elements += step.elements * step.dtype.lanes
            unchanged += values.update == 0
        elif step.operation in ("copy", "cast") and step.dtype.computes:
            # α = 0 and −1 make copies; at any other α it was a decision, or a factor A.
            copied |= {step.alpha} & {0.0, -1.0}
            kept += step.alpha not in (0, -1)
    everything = {*alphas, *copied} or {fallback}
    spread = None if len(everything) == 1 else (min(everything), max(everything))
    total = add(moved) if moved else None
    mean = next(iter(everything)) if spread is None else total and total.asked_alpha
    alpha = fallback if mean is None else mean
    return Summary(alpha, counts, unchanged, total, elements, spread, steered, kept)


def _shown(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def tensor_record(step: Step, values: Sums | None) -> dict[str, object]:
    """Return one tensor's record for the manifest."""
    record: dict[str, object] = {"operation": step.operation, "alpha": step.alpha}
    if step.operation == "extrapolate" and values is not None:
        record |= {
            "norm": values.norm,
            "ratio": values.ratio,
            "effective_alpha": values.effective_alpha,
            "rounding_error": values.rounding_error,
            "share_changed": values.changed / max(step.elements * step.dtype.lanes, 1),
        }
        if step.terms:
            record |= {"asked_alpha": values.asked_alpha, "share_kept": values.kept}
    elif step.operation in ("copy", "cast"):
        record["source"] = "original" if step.from_original else "unlearned"
    elif step.operation == "keep" and values is not None:
        record["share_differing"] = values.changed / max(step.elements, 1)
    return record
