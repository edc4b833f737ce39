"""Two checkpoints held against one another: what matches, and all that does not."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import experts
from uipe_merge.checkpoint.decisions import FLAG, Decision, Kept, decide
from uipe_merge.checkpoint.hub import unpinned
from uipe_merge.errors import IncompatibleModelsError, UsageError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.checkpoint.model import Checkpoint

_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$"
)
_SAME_ARCHITECTURE = (
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rope_type",
)


CONFIG = "config.json"
"""What a mismatch of the architecture begins with."""


class Pairing(NamedTuple):
    """What is done with every tensor of the two checkpoints.

    Attributes:
        pairs: ``(original, unlearned)`` of what is extrapolated, by name, in the unlearned
            checkpoint's order.
        kept: What is taken from one side although the two do not match, by decision.
        mismatches: One line for each thing that keeps the two from being merged.
        decided: One line for each thing that would, and that was decided about.
        warnings: What is odd but does not keep them.
        decision: What was to be done with mismatches.
    """

    pairs: dict[str, tuple[TensorSpec, TensorSpec]]
    kept: dict[str, Kept]
    mismatches: list[str]
    decided: list[str]
    warnings: list[str]
    decision: Decision

    def require_match(self, original: Checkpoint, unlearned: Checkpoint) -> None:
        """Refuse a pair that does not match.

        Raises:
            IncompatibleModelsError: Naming all mismatches at once.
        """
        if not self.mismatches:
            return
        fixed = any(line.startswith(CONFIG) for line in self.mismatches)
        undecided = self.decision == "error" and not fixed
        raise IncompatibleModelsError(
            f"does not match {original.location}: {listed(self.mismatches)}",
            file=unlearned.location,
            remedy=FLAG if undecided else "merge two checkpoints of one model, stored alike",
        )


def match(original: Checkpoint, unlearned: Checkpoint, decision: Decision = "error") -> Pairing:
    """Pair the tensors of two checkpoints by name, whatever their shards.

    Args:
        original: θ₀.
        unlearned: θᵤ.
        decision: What to do with tensors that do not match; see ``decisions``. Another
            architecture is a mismatch all the same.
    """
    fixed = _config_mismatches(original.config, unlearned.config)
    found = Pairing({}, {}, fixed, [], [], decision)
    relaid = _in_one_layout(original, unlearned, found)
    if relaid is None:
        return found
    original = relaid
    tied = _tied(original.config) and _tied(unlearned.config)
    for name, spec in unlearned.tensors.items():
        other = original.tensors.get(name)
        if other is None and _HEAD.search(name) and (tied or _head_in_common(original, decision)):
            other = _embedding(original.tensors)
            if other is not None:
                found.warnings.append(
                    f"{unlearned.location}: tensor '{name}' is stored though tied in "
                    f"{original.location}; its update is taken against '{other.name}' there"
                )
        problem = _problem(name, other, spec, original, unlearned)
        if problem is None and other is not None:
            found.pairs[name] = (other, spec)
        else:
            _settle(found, decision, name, other, spec, problem or "")
    for name, spec in original.tensors.items():
        if name in unlearned.tensors:
            continue
        if tied and _HEAD.search(name):
            found.warnings.append(
                f"{original.location}: tensor '{name}' is stored though tied; it is left out, as "
                f"in {unlearned.location}"
            )
        else:
            problem = f"tensor '{name}' is only in {original.location}"
            _settle(found, decision, name, spec, None, problem)
    if found.decided:
        found.warnings.append(f"--on-mismatch {decision}: {listed(found.decided)}")
    found.warnings.extend(_dtype_warnings(found.pairs))
    return found


def _in_one_layout(
    original: Checkpoint, unlearned: Checkpoint, found: Pairing
) -> Checkpoint | None:
    """Return the original with its experts stored as the unlearned's; ``None`` if they cannot be."""
    first, second = experts.layout(original), experts.layout(unlearned)
    if first is None or second is None or first[0] == second[0]:
        return original
    how = (
        f"experts are stored {first[0]} ('{first[1]}') in {original.location} and {second[0]} "
        f"('{second[1]}') in {unlearned.location}"
    )
    tensors = experts.relaid(original, unlearned)
    if tensors is None:
        found.mismatches.append(f"{how}: save both with one version of transformers")
        return None
    found.warnings.append(f"{how}: matched as transformers does")
    return original._replace(tensors=tensors)


def _problem(
    name: str,
    other: TensorSpec | None,
    spec: TensorSpec,
    original: Checkpoint,
    unlearned: Checkpoint,
) -> str | None:
    """Say what keeps a tensor of the unlearned checkpoint from having an update."""
    if other is None:
        return f"tensor '{name}' is only in {unlearned.location}"
    if other.shape != spec.shape:
        return (
            f"tensor '{name}' is {list(other.shape)} in {original.location} and "
            f"{list(spec.shape)} in {unlearned.location}{_rows_hint(other, spec)}"
        )
    if other.dtype != spec.dtype and not _comparable(other, spec):
        return (
            f"tensor '{name}' is {other.dtype.name} in {original.location} and "
            f"{spec.dtype.name} in {unlearned.location}"
        )
    return None


def _settle(
    found: Pairing,
    decision: Decision,
    name: str,
    original: TensorSpec | None,
    unlearned: TensorSpec | None,
    problem: str,
) -> None:
    """Decide about one mismatch, or list it."""
    outcome = decide(decision, original, unlearned)
    if outcome is None:
        found.mismatches.append(problem)
        return
    if outcome.original is not None and unlearned is not None:
        found.pairs[name] = (outcome.original, unlearned)
    elif outcome.kept is not None:
        found.kept[name] = outcome.kept
    found.decided.append(f"{problem}: {outcome.what}")


def _head_in_common(original: Checkpoint, decision: Decision) -> bool:
    """Tell whether the original's embedding is its head, and heads are to be extrapolated."""
    return decision == "common-rows" and _tied(original.config)


def refuse_swapped(original: Checkpoint, unlearned: Checkpoint, base_models: list[str]) -> None:
    """Refuse a pair whose ORIGINAL says that it was made from UNLEARNED.

    Args:
        original: The first checkpoint.
        unlearned: The second checkpoint.
        base_models: What ORIGINAL's model card calls its base models.

    Raises:
        UsageError: The two arguments look swapped.
    """
    named = {*base_models, str(original.config.get("_name_or_path", ""))}
    own = unpinned(unlearned.location).rstrip("/")
    other = PurePath(unpinned(original.location)).name
    if claimed := named & {own, PurePath(own).name} - {"", ".", other}:
        raise UsageError(
            f"says that it was made from {min(claimed)}, which was given as UNLEARNED",
            file=original.location,
            remedy="swap the two arguments (ORIGINAL comes first)",
        )


def _config_mismatches(one: Mapping[str, object], two: Mapping[str, object]) -> list[str]:
    """Name the fields of the architecture that both configs have and that differ."""
    first, second = _architecture(one), _architecture(two)
    return [
        f"{CONFIG}: {field} is {first[field]!r} and {second[field]!r}"
        for field in _SAME_ARCHITECTURE
        if field in first and field in second and first[field] != second[field]
    ]


def _architecture(config: Mapping[str, object]) -> dict[str, object]:
    """Read the fields, wherever a version of transformers keeps the rotary ones."""
    fields = {name: config[name] for name in _SAME_ARCHITECTURE if config.get(name) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        rotary = config.get(key)
        if isinstance(rotary, dict):
            kind = rotary.get("rope_type", rotary.get("type"))
            fields |= {"rope_type": kind} if isinstance(kind, str) else {}
            theta = rotary.get("rope_theta")
            fields |= {"rope_theta": theta} if isinstance(theta, int | float) else {}
    return fields


def _tied(config: Mapping[str, object]) -> bool:
    return config.get("tie_word_embeddings") is True


def tied_names(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the stored head and the embedding it is tied to; empty where that is not so."""
    if not _tied(checkpoint.config):
        return "", ""
    heads = [name for name in checkpoint.tensors if _HEAD.search(name)]
    embedding = _embedding(checkpoint.tensors)
    if len(heads) != 1 or embedding is None:
        return "", ""
    return heads[0], embedding.name


def _embedding(tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    found = [spec for name, spec in tensors.items() if _EMBEDDING.search(name)]
    return found[0] if len(found) == 1 else None


def _comparable(one: TensorSpec, two: TensorSpec) -> bool:
    return one.dtype.computes == two.dtype.computes and one.dtype.lanes == two.dtype.lanes


def _rows_hint(one: TensorSpec, two: TensorSpec) -> str:
    if len(one.shape) == len(two.shape) and one.shape[1:] == two.shape[1:]:
        return " (rows added or padded)"
    if one.shape == two.shape[::-1]:
        return " (transposed)"
    return ""


def _dtype_warnings(pairs: Mapping[str, tuple[TensorSpec, TensorSpec]]) -> list[str]:
    counts: dict[tuple[str, str, str], int] = {}
    for one, two in pairs.values():
        if one.dtype != two.dtype:
            computes = two.dtype.computes
            what = "the update is formed in the wider arithmetic" if computes else "they are kept"
            key = (one.dtype.name, two.dtype.name, what)
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{count} tensors are {one} in ORIGINAL and {two} in UNLEARNED; {what}"
        for (one, two, what), count in counts.items()
    ]
