"""Buffers that begin on a page, and pieces of them that lie as their bytes will lie in a file.

A disk takes bytes straight from a program's memory, past the page cache, where the position
in the file and the address in memory agree modulo the page.
"""

from __future__ import annotations

import ctypes
import mmap

PAGE = max(4096, mmap.PAGESIZE)
"""Bytes that neither a disk nor the page cache divides between two writers."""

_ELEMENT = 8  # bytes of the widest number


def allocate(size: int) -> memoryview:
    """Return a zeroed buffer of ``size`` bytes and a page more, for ``placed``."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, size + PAGE, flags=flags))


def placed(buffer: memoryview, size: int, offset: int) -> memoryview:
    """Return ``size`` bytes of an allocated buffer, fit to be written at ``offset`` of a file.

    Where that would put elements at odd addresses, they are put at the buffer's beginning.
    """
    start = offset % PAGE if offset % _ELEMENT == 0 else 0
    return buffer[start : start + size]


def is_placed(data: memoryview, offset: int) -> bool:
    """Tell whether ``data`` is of a buffer of ours and lies in it as at ``offset`` of a file."""
    if data.readonly:
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return (address - offset) % PAGE == 0
