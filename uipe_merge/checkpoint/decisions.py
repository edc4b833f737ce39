"""What becomes of a tensor that the two checkpoints do not have alike.

``error``: nothing; the pair is refused. ``keep-unlearned``: the output has the tensor as the
unlearned checkpoint has it, or lacks it as that does. ``keep-original``: the same of the
original. ``common-rows``: the rows that both have are extrapolated and the rest is kept as in
the unlearned checkpoint, as is everything that has no rows in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from uipe_merge.checkpoint.header import OTHER, TensorSpec, joined

if TYPE_CHECKING:
    from collections.abc import Mapping

Decision = Literal["error", "keep-unlearned", "keep-original", "common-rows"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)

FLAG = "decide with --on-mismatch " + ", ".join(DECISIONS[1:-1]) + f" or {DECISIONS[-1]}"

_FOLLOWING = ("vocab_size", "tie_word_embeddings")
"""Fields of the config that say which of the tensors that differ there are."""


class Kept(NamedTuple):
    """A tensor that is taken from one side as it is.

    Attributes:
        spec: The tensor.
        from_original: Whose it is.
    """

    spec: TensorSpec
    from_original: bool


class Outcome(NamedTuple):
    """What was decided about one tensor.

    Attributes:
        original: θ₀ where it is extrapolated after all.
        kept: What is kept of it otherwise; ``None`` where it is left out.
        what: The decision in words, for the warning.
    """

    original: TensorSpec | None
    kept: Kept | None
    what: str


def decide(
    decision: Decision, original: TensorSpec | None, unlearned: TensorSpec | None
) -> Outcome | None:
    """Decide about a tensor of which one side is missing or the two do not match.

    Returns ``None`` where there is nothing to decide with: ``error``, or a side that would have
    to be copied and is not what is stored (an adapter's factors, the scales of FP8).
    """
    if decision == "error":
        return None
    if decision == "keep-original":
        if original is not None and not original.plain:
            return None
        kept = None if original is None else Kept(original, from_original=True)
        return Outcome(None, kept, f"{_verb(kept)} as in ORIGINAL")
    if unlearned is not None and not unlearned.plain:
        return None
    if decision == "common-rows" and original is not None and unlearned is not None:
        shared = _common_rows(original, unlearned)
        if shared is not None:
            rows = min(original.shape[0], unlearned.shape[0])
            return Outcome(shared, None, f"its first {rows} rows are extrapolated")
    kept = None if unlearned is None else Kept(unlearned, from_original=False)
    return Outcome(None, kept, f"{_verb(kept)} as in UNLEARNED")


def _verb(kept: Kept | None) -> str:
    return "left out" if kept is None else "kept"


def _common_rows(original: TensorSpec, unlearned: TensorSpec) -> TensorSpec | None:
    """Return θ₀ in the shape of θᵤ, with θᵤ itself in the rows that θ₀ lacks: v is zero there."""
    if not (original.shape and unlearned.shape and original.shape[1:] == unlearned.shape[1:]):
        return None
    if not original.plain:
        return None
    if not (original.dtype.computes and unlearned.dtype.computes):
        return None
    if original.dtype.lanes != unlearned.dtype.lanes:
        return None
    name, shape = unlearned.name, unlearned.shape
    shared = min(original.elements, unlearned.elements)
    pieces = original.cut(0, shared)
    if missing := unlearned.elements - shared:
        rest = unlearned.cut(shared, missing)
        pieces += [piece._replace(home=OTHER + piece.home) for piece in rest]
    return joined(name, shape, pieces)


def following(original: Mapping[str, object], unlearned: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of the unlearned config that must be the original's, as its tensors are.

    For ``keep-original``, where tensors that differ were decided about.
    """
    fields = {
        name: original[name]
        for name in _FOLLOWING
        if name in original and original[name] != unlearned.get(name)
    }
    inner, outer = original.get("text_config"), unlearned.get("text_config")
    if isinstance(inner, dict) and isinstance(outer, dict) and (nested := following(inner, outer)):
        fields["text_config"] = {**outer, **nested}
    return fields
