"""Two checkpoints held against one another: what matches, and all that does not."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.hub import unpinned
from uipe_merge.errors import IncompatibleModelsError, UsageError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.checkpoint.model import Checkpoint

_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.(?!\d)")
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


class Pairing(NamedTuple):
    """Every tensor of the unlearned checkpoint with its counterpart.

    Attributes:
        pairs: ``(original, unlearned)`` by name, in the unlearned checkpoint's order.
        mismatches: One line for each thing that keeps the two from being merged.
        warnings: What is odd but does not keep them.
    """

    pairs: dict[str, tuple[TensorSpec, TensorSpec]]
    mismatches: list[str]
    warnings: list[str]

    def require_match(self, original: Checkpoint, unlearned: Checkpoint) -> None:
        """Refuse a pair that does not match.

        Raises:
            IncompatibleModelsError: Naming all mismatches at once.
        """
        if self.mismatches:
            raise IncompatibleModelsError(
                f"does not match {original.location}: {listed(self.mismatches)}",
                file=unlearned.location,
                remedy="merge two checkpoints of one model (`uipe-merge inspect` shows more)",
            )


def match(original: Checkpoint, unlearned: Checkpoint) -> Pairing:
    """Pair the tensors of two checkpoints by name, whatever their shards."""
    pairs: dict[str, tuple[TensorSpec, TensorSpec]] = {}
    mismatches = _config_mismatches(original.config, unlearned.config)
    warnings: list[str] = []
    tied = _tied(original.config) and _tied(unlearned.config)
    if layouts := _expert_layouts(original, unlearned):
        return Pairing({}, [*mismatches, layouts], [])
    for name, spec in unlearned.tensors.items():
        other = original.tensors.get(name)
        if other is None and tied and _HEAD.search(name):
            other = _embedding(original.tensors)
            if other is not None:
                warnings.append(
                    f"{unlearned.location}: tensor '{name}' is stored though tied; its update "
                    f"is taken against '{other.name}' of {original.location}"
                )
        if other is None:
            mismatches.append(f"tensor '{name}' is only in {unlearned.location}")
        elif other.shape != spec.shape:
            mismatches.append(
                f"tensor '{name}' is {list(other.shape)} in {original.location} and "
                f"{list(spec.shape)} in {unlearned.location}{_rows_hint(other, spec)}"
            )
        elif other.dtype != spec.dtype and not _comparable(other, spec):
            mismatches.append(
                f"tensor '{name}' is {other.dtype.name} in {original.location} and "
                f"{spec.dtype.name} in {unlearned.location}"
            )
        else:
            pairs[name] = (other, spec)
    for name in [name for name in original.tensors if name not in unlearned.tensors]:
        if tied and _HEAD.search(name):
            warnings.append(
                f"{original.location}: tensor '{name}' is stored though tied; it is left out, as "
                f"in {unlearned.location}"
            )
        else:
            mismatches.append(f"tensor '{name}' is only in {original.location}")
    return Pairing(pairs, mismatches, warnings + _dtype_warnings(pairs))


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
        f"config.json: {field} is {first[field]!r} and {second[field]!r}"
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


def _embedding(tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    found = [spec for name, spec in tensors.items() if _EMBEDDING.search(name)]
    return found[0] if len(found) == 1 else None


def _comparable(one: TensorSpec, two: TensorSpec) -> bool:
    return one.dtype.computes == two.dtype.computes and one.dtype.lanes == two.dtype.lanes


def _rows_hint(one: TensorSpec, two: TensorSpec) -> str:
    if len(one.shape) == len(two.shape) and one.shape[1:] == two.shape[1:]:
        return " (rows added or padded: bring both to one size with `resize_token_embeddings`)"
    if one.shape == two.shape[::-1]:
        return " (transposed)"
    return ""


def _expert_layouts(original: Checkpoint, unlearned: Checkpoint) -> str | None:
    """Name the two layouts where one stores its experts fused and the other one by one."""
    first, second = _expert_layout(original), _expert_layout(unlearned)
    if first is None or second is None or first[0] == second[0]:
        return None
    return (
        f"experts are stored {first[0]} ('{first[1]}') in {original.location} and {second[0]} "
        f"('{second[1]}') in {unlearned.location}: save both with one version of transformers"
    )


def _expert_layout(checkpoint: Checkpoint) -> tuple[str, str] | None:
    for name in checkpoint.tensors:
        if _EXPERT.search(name):
            return "one by one", name
        if _FUSED_EXPERTS.search(name):
            return "fused", name
    return None


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
