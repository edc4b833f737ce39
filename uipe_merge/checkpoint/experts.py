"""Experts stored one by one in one checkpoint and fused in the other.

transformers holds the experts of a layer in one tensor of shape ``(experts, rows, columns)``
and may save them so, or one by one as the model was published. Which names belong together,
and in which order, is its own table (``transformers.conversion_mapping``); where that says no
more than "one expert after the other, gate before up", the fused tensor is the same bytes in
a row, and is read as such.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.checkpoint.header import TensorSpec, joined

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.model import Checkpoint

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.(?!\d)")
_IN_A_ROW = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
"""Operations of the table that put whole matrices one after the other (see ``_in_a_row``)."""

SPLIT, FUSED = "one by one", "fused"


class Slot(NamedTuple):
    """Where one matrix of one expert is in a fused tensor.

    Attributes:
        fused: The fused tensor's name.
        expert: The expert's number.
        position: The matrix's place among those of one expert.
    """

    fused: str
    expert: int
    position: int


def layout(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return how a checkpoint stores its experts, if it has any, and a name that shows it."""
    for name in checkpoint.tensors:
        if ".experts." not in name:
            continue
        if _EXPERT.search(name):
            return SPLIT, name
        if _FUSED_EXPERTS.search(name):
            return FUSED, name
    return None


def relaid(original: Checkpoint, unlearned: Checkpoint) -> dict[str, TensorSpec] | None:
    """Return the original's tensors under the names and in the layout of the unlearned.

    One of the two stores its experts one by one and the other fused. ``None`` where the table
    of transformers does not relate them, or they are not what is stored (adapters, FP8).
    """
    stored = layout(unlearned)
    fused = stored is not None and stored[0] == FUSED
    split = original if fused else unlearned
    slots, renamed = _table(split)
    if not slots or not all(spec.plain for spec in original.tensors.values()):
        return None
    if not fused:
        return _cut_experts(original.tensors, unlearned.tensors, slots, renamed)
    tensors = _joined_experts(original.tensors, slots, renamed)
    names = {slot.fused for slot in slots.values()}
    if tensors is None or any(not _alike(tensors[name], unlearned, name) for name in names):
        return None
    return tensors


def together(split: Checkpoint) -> dict[str, TensorSpec] | None:
    """Return the tensors of a checkpoint with its experts fused, as the model has them in memory.

    ``None`` where they are not stored one by one, or as ``relaid`` says.
    """
    slots, renamed = _table(split)
    if not slots or not all(spec.plain for spec in split.tensors.values()):
        return None
    return _joined_experts(split.tensors, slots, renamed)


def _alike(spec: TensorSpec, checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors and checkpoint.tensors[name].shape == spec.shape


def _joined_experts(
    stored: Mapping[str, TensorSpec], slots: Mapping[str, Slot], renamed: Mapping[str, str]
) -> dict[str, TensorSpec] | None:
    members: dict[str, dict[tuple[int, int], TensorSpec]] = {}
    tensors: dict[str, TensorSpec] = {}
    for name, spec in stored.items():
        if slot := slots.get(name):
            members.setdefault(slot.fused, {})[slot.expert, slot.position] = spec
        else:
            tensors[renamed.get(name, name)] = spec
    for name, parts in members.items():
        shape = _fused_shape(parts)
        if shape is None:
            return None
        tensors[name] = joined(name, shape, (parts[key] for key in sorted(parts)))
    return tensors


def _cut_experts(
    original: Mapping[str, TensorSpec],
    unlearned: Mapping[str, TensorSpec],
    slots: Mapping[str, Slot],
    renamed: Mapping[str, str],
) -> dict[str, TensorSpec] | None:
    members: dict[str, dict[tuple[int, int], TensorSpec]] = {}
    for name, slot in slots.items():
        members.setdefault(slot.fused, {})[slot.expert, slot.position] = unlearned[name]
    tensors = {name: spec for name, spec in original.items() if name not in members}
    for name, new in renamed.items():
        if new in tensors:
            tensors[name] = tensors.pop(new)
    for fused, parts in members.items():
        whole = original.get(fused)
        if whole is None or _fused_shape(parts) != whole.shape:
            return None
        start = 0
        for _, spec in sorted(parts.items()):
            tensors[spec.name] = joined(spec.name, spec.shape, whole.cut(start, spec.elements))
            start += spec.elements
    return tensors


def _fused_shape(parts: Mapping[tuple[int, int], TensorSpec]) -> tuple[int, ...] | None:
    """Return the shape of what the matrices of all experts make; ``None`` if one is missing."""
    experts = 1 + max(expert for expert, _ in parts)
    positions = 1 + max(position for _, position in parts)
    specs = parts.values()
    if len(parts) != experts * positions or any(len(spec.shape) != 2 for spec in specs):
        return None
    if len({(spec.dtype.computes, spec.dtype.lanes) for spec in specs}) != 1:
        return None
    first = [parts[0, position].shape for position in range(positions)]
    alike = all(spec.shape == first[position] for (_, position), spec in parts.items())
    if not alike or len({columns for _, columns in first}) != 1:
        return None
    return experts, sum(rows for rows, _ in first), first[0][1]


def _table(split: Checkpoint) -> tuple[dict[str, Slot], dict[str, str]]:
    """Look every name of a checkpoint up in transformers' table for its model type.

    Returns:
        The place of every expert's matrix in a fused tensor, and the other names that differ.
        Nothing where the table is missing, or does more than to put matrices in a row.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # transformers 4 has no such table
        return {}, {}
    transforms: list[Any] = get_checkpoint_conversion_mapping(split.config.get("model_type")) or []
    renamings = [each for each in transforms if type(each) is WeightRenaming]
    converters = [each for each in transforms if type(each) is WeightConverter]
    if len(renamings) + len(converters) != len(transforms):
        return {}, {}
    slots: dict[str, Slot] = {}
    renamed: dict[str, str] = {}
    for name in split.tensors:
        new = name
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        for converter in converters:
            target, pattern = converter.rename_source_key(new)
            expert = _EXPERT.search(name)
            if pattern is not None and expert is not None:
                if not _in_a_row(converter):
                    return {}, {}
                position = converter.source_patterns.index(pattern)
                slots[name] = Slot(target, int(expert[1]), position)
                break
        if name not in slots and new != name:
            renamed[name] = new
    return slots, renamed


def _in_a_row(converter: Any) -> bool:  # noqa: ANN401 - a class of transformers without types
    """Tell whether a rule only stacks experts, and a matrix of each on another of it."""
    operations = converter.operations
    axes = [operation.dim for operation in operations if hasattr(operation, "dim")]
    return [type(each).__name__ for each in operations] in _IN_A_ROW and axes in ([0], [0, 1])
