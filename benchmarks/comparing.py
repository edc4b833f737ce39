"""Compares the weights of two bfloat16 checkpoints, element by element, in bounded memory."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 2**21
_BYTES = 2


class Place(NamedTuple):
    """Where a tensor lies: its file, the offset of its first byte, and its elements."""

    file: Path
    offset: int
    elements: int


class Difference(NamedTuple):
    """How two checkpoints differ.

    Attributes:
        elements: Elements that both have.
        differing: How many of them are not the same bits.
        missing: Tensors that only one of the two has.
    """

    elements: int
    differing: int
    missing: list[str]

    @property
    def share(self) -> float:
        """Share of the elements that differ."""
        return self.differing / max(self.elements, 1)


def compare(one: Path, two: Path) -> Difference:
    """Compare all weights of two directories, whatever their shards.

    Raises:
        ValueError: A tensor is not bfloat16, or not of the same size in both.
    """
    first, second = places(one), places(two)
    elements = differing = 0
    for name in sorted(first.keys() & second.keys()):
        here, there = first[name], second[name]
        if here.elements != there.elements:
            raise ValueError(f"'{name}' has {here.elements} and {there.elements} elements")
        elements += here.elements
        for start in range(0, here.elements, _BLOCK):
            count = min(_BLOCK, here.elements - start)
            left, right = _words(here, start, count), _words(there, start, count)
            differing += int(np.count_nonzero(left != right))
    return Difference(elements, differing, sorted(first.keys() ^ second.keys()))


def places(directory: Path) -> dict[str, Place]:
    """Return the place of every tensor in a directory's safetensors files.

    Raises:
        ValueError: A tensor is not bfloat16.
    """
    found: dict[str, Place] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file.name}: '{name}' is {entry['dtype']}, not BF16")
            begin, _ = entry["data_offsets"]
            found[name] = Place(file, 8 + length + begin, math.prod(entry["shape"]))
    return found


def _words(place: Place, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    offset = place.offset + start * _BYTES
    return np.fromfile(place.file, np.uint16, count=count, offset=offset)
