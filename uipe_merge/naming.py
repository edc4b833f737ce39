"""What a tensor's name tells: its layer and its kind of module.

The layer of a tensor is the first ``layers.N``, ``h.N``, ``blocks.N`` or ``block.N`` in
its name (``layer.N`` for encoders), which covers the decoder families of transformers.
Everything after it is the module kind, with the indices of experts folded into ``*`` and
a trailing ``.weight`` dropped. Embeddings, final norm and head belong to no layer: they
are kinds of their own and are never guessed into the first or the last one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
_INDEX = re.compile(r"\.\d+(?=\.|$)")


class Place(NamedTuple):
    """Where a tensor sits in its model.

    Attributes:
        layer: Layer index, counted from 0; ``None`` for tensors outside the layers.
        kind: Module kind, for example ``self_attn.q_proj`` or ``model.embed_tokens``.
    """

    layer: int | None
    kind: str


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return what names are sorted by so that layer 10 comes after layer 9."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def stack(name: str) -> str:
    """Return the beginning of a name up to the number of its layer: which stack it is in."""
    match = _LAYER.search(name)
    return name[: match.start(1)] if match else ""


def place(name: str) -> Place:
    """Return the layer and module kind that a tensor's name tells."""
    match = _LAYER.search(name)
    layer, kind = (int(match[1]), match[2]) if match else (None, name)
    return Place(layer, _INDEX.sub(".*", kind.removesuffix(".weight")))
