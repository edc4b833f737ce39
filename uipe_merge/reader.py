"""Reads blocks of both checkpoints into reused buffers, few files open at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.aligned import allocate, placed
from uipe_merge.checkpoint.header import OTHER, ZERO
from uipe_merge.errors import CorruptInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.checkpoint.storage import InputFile, Stamp
    from uipe_merge.plan import Plan


class Pair(NamedTuple):
    """The two checkpoints a plan reads."""

    original: Checkpoint
    unlearned: Checkpoint


class BlockReader:
    """Reads blocks of tensors into two reused buffers."""

    def __init__(self, pair: Pair, element_bytes: int, block: int) -> None:
        """Allocate for blocks of ``block`` elements of at most ``element_bytes``."""
        self._pair = pair
        self._stamps = [_stamps(checkpoint) for checkpoint in pair]
        self._files: list[tuple[tuple[str, str], InputFile] | None] = [None, None]
        self._buffers = [allocate(block * element_bytes) for _ in pair]
        self._block = block

    def read(
        self, spec: TensorSpec, side: int, start: int, count: int, offset: int = 0
    ) -> memoryview:
        """Return ``count`` elements from ``start`` as bytes, valid until the next read.

        ``side`` is 0 for the original, 1 for the unlearned checkpoint; each has a buffer.
        ``offset`` is where the bytes would go in a file; see ``aligned``.
        """
        size = spec.dtype.bits // 8
        view = placed(self._buffers[side], count * size, offset)
        if spec.home == ZERO:
            view[:] = bytes(len(view))
        elif count:
            self._open(spec, side).read_into(view, spec.offset + start * size)
        return view

    def whole(self, spec: TensorSpec, side: int) -> bytearray:
        """Return all bytes of a small tensor in a buffer of their own."""
        content = bytearray(spec.nbytes)
        if content:
            self._open(spec, side).read_into(memoryview(content), spec.offset)
        return content

    def blocks(self, spec: TensorSpec, side: int) -> Iterator[tuple[int, DType, memoryview]]:
        """Read a whole tensor block by block: first element, element type, bytes."""
        first = 0
        for piece in spec.pieces or (spec,):
            for start in range(0, piece.elements, self._block):
                count = min(self._block, piece.elements - start)
                yield first + start, piece.dtype, self.read(piece, side, start, count)
            first += piece.elements

    def close(self) -> None:
        """Close the open files."""
        for held in self._files:
            if held is not None:
                held[1].close()
        self._files = [None, None]

    def _open(self, spec: TensorSpec, side: int) -> InputFile:
        # One file a side is held: with hundreds of shards, descriptors stay few.
        side, home = owner(spec, side)
        held, key = self._files[side], (home, spec.file)
        if held is not None and held[0] == key:
            return held[1]
        if held is not None:
            self._files[side] = None
            held[1].close()
        file = self._pair[side].folders[home].open_file(spec.file)
        self._files[side] = (key, file)
        check_stamp(file, self._stamps[side][key])
        return file


def check_stamp(file: InputFile, planned: Stamp) -> None:
    """Refuse a file that is not the one that was planned with.

    Raises:
        CorruptInputError: Its size or modification time differs.
    """
    if file.stamp != planned:
        raise CorruptInputError(
            "changed since its header was read",
            file=file.path,
            remedy="run again when nothing writes to it",
        )


def shown(pair: Pair, spec: TensorSpec, side: int) -> str:
    """Return the file of a tensor as messages name it."""
    side, home = owner(spec, side)
    return f"{pair[side].folders[home].location}/{spec.file}"


def owner(spec: TensorSpec, side: int) -> tuple[int, str]:
    """Return the checkpoint that holds a tensor of ``side``, 0 or 1, and the folder in it."""
    return (
        (1 - side, spec.home.removeprefix(OTHER))
        if spec.home.startswith(OTHER)
        else (side, spec.home)
    )


def widest_input(plan: Plan) -> int:
    """Return the bytes of the widest element that a plan reads."""
    read = [spec for step in plan.steps for spec in (step.source, step.original) if spec]
    plain = [piece for spec in read for piece in spec.pieces or (spec,)]
    return max((spec.dtype.bits // 8 for spec in plain), default=1)


def _stamps(checkpoint: Checkpoint) -> Mapping[tuple[str, str], Stamp]:
    return {(shard.home, shard.name): shard.stamp for shard in checkpoint.shards}
