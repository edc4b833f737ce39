"""Non-finite values, found in the bits of a tensor without torch.

A copied tensor never meets the arithmetic, yet a NaN in it must stop the run all the same.
NaN and infinity have every exponent bit set, so two integer operations on a reused scratch
buffer find them at the speed of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.checkpoint.dtypes import DType

_CHUNK = 2**16
_PAGE = 4096


class NonFinite(NamedTuple):
    """How many values are NaN or infinite, and the index of the first, from 0."""

    total: int
    first: int


class BitScanner:
    """Looks for non-finite values with scratch buffers of its own (one per thread)."""

    def __init__(self) -> None:
        """Allocate the scratch once."""
        self._masked = np.empty(_CHUNK, np.uint64)
        self._hits = np.empty(_CHUNK, np.bool_)

    def scan(self, data: memoryview, dtype: DType) -> NonFinite | None:
        """Return what is not finite in ``data`` (bytes of whole elements), if anything.

        Complex numbers are two lanes each and count once.
        """
        if dtype.mask == 0:
            return None
        lanes = np.frombuffer(data, np.dtype(f"u{dtype.lane_bytes}"))
        masked = self._masked.view(lanes.dtype)[:_CHUNK]
        mask, pattern = lanes.dtype.type(dtype.mask), lanes.dtype.type(dtype.pattern)
        count, first = 0, -1
        for start in range(0, len(lanes), _CHUNK):
            chunk = lanes[start : start + _CHUNK]
            hits = self._hits[: len(chunk)]
            np.bitwise_and(chunk, mask, out=masked[: len(chunk)])
            np.equal(masked[: len(chunk)], pattern, out=hits)
            if not hits.any():
                continue
            elements = hits.reshape(-1, dtype.lanes).any(axis=1)
            if first < 0:
                first = start // dtype.lanes + int(elements.argmax())
            count += int(np.count_nonzero(elements))
        return NonFinite(count, first) if count else None


def same_bytes(one: memoryview, two: memoryview) -> bool:
    """Tell whether two pieces of equal length hold the same bytes.

    Updates of unlearning touch nearly every element or none, so the first page decides
    almost always and the rest is only compared where it agrees.
    """
    if one[:_PAGE] != two[:_PAGE]:
        return False
    wide = len(one) // 8 * 8
    first, second = np.frombuffer(one[:wide], np.uint64), np.frombuffer(two[:wide], np.uint64)
    return np.array_equal(first, second) and one[wide:] == two[wide:]


def count_differing(one: memoryview, two: memoryview, size: int) -> int:
    """Count the elements of ``size`` bytes in which ``two`` differs from ``one``.

    Where the elements of ``one`` have another width, all differ.
    """
    if len(one) != len(two):
        return len(two) // size
    if same_bytes(one, two):
        return 0
    first, second = np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)
    return int(np.count_nonzero((first != second).reshape(-1, size).any(axis=1)))


def combine(pieces: Iterable[tuple[int, NonFinite | None]]) -> NonFinite | None:
    """Join the findings of consecutive pieces, each with the index of its first element."""
    count, first = 0, -1
    for start, found in pieces:
        if found is not None:
            count += found.total
            first = start + found.first if first < 0 else first
    return NonFinite(count, first) if count else None
