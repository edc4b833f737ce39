"""Reads blocks of both checkpoints into reused buffers, few files open at a time."""

from __future__ import annotations

import os
from pathlib import Path
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
    from uipe_merge.plan import Plan, Step


class Pair(NamedTuple):
    """The checkpoints a plan reads: the two, and those of further updates."""

    original: Checkpoint
    unlearned: Checkpoint
    further: tuple[Checkpoint, ...] = ()

    @property
    def sides(self) -> tuple[Checkpoint, ...]:
        """All of them, in the order in which a plan counts them."""
        return (self.original, self.unlearned, *self.further)

    @property
    def locations(self) -> list[list[str]]:
        """Where each side is read from: with its headers it tells one checkpoint from another."""
        return [
            [
                os.path.realpath(location) if Path(location).is_dir() else location
                for location in side
            ]
            for side in ([each.location for each in one.folders.values()] for one in self.sides)
        ]


class BlockReader:
    """Reads blocks of tensors into reused buffers, one for each operand."""

    def __init__(self, pair: Pair, element_bytes: int, block: int) -> None:
        """Prepare for blocks of ``block`` elements of at most ``element_bytes``.

        A buffer is made when it is first needed, and used for every block from then on.
        """
        self._sides = pair.sides
        self._stamps = [_stamps(checkpoint) for checkpoint in self._sides]
        self._files: list[tuple[tuple[str, str], InputFile] | None] = [None] * len(self._sides)
        self._buffers: list[memoryview] = []
        self._buffer_bytes = block * element_bytes
        self._seen: dict[tuple[str, str, int], memoryview] = {}
        self._block = block

    def read(
        self,
        spec: TensorSpec,
        side: int,
        start: int,
        count: int,
        offset: int = 0,
        buffer: int = 0,
    ) -> memoryview:
        """Return ``count`` elements from ``start`` as bytes, valid until the buffer's next read.

        ``side`` is 0 for the original, 1 for the unlearned checkpoint, further ones follow.
        ``offset`` is where the bytes would go in a file; see ``aligned``.
        """
        while len(self._buffers) <= buffer:
            self._buffers.append(allocate(self._buffer_bytes))
        size = spec.dtype.bits // 8
        view = placed(self._buffers[buffer], count * size, offset)
        if spec.home == ZERO:
            view[:] = bytes(len(view))
        elif count:
            self._open(spec, side).read_into(view, spec.offset + start * size)
        return view

    def begin(self) -> None:
        """Begin a block: what was read for the last one is read again."""
        self._seen = {}

    def shared(self, spec: TensorSpec, side: int, count: int, offset: int = 0) -> memoryview:
        """Return a block of a tensor, valid until ``begin``; bytes that were read are not again.

        ``offset`` is where the bytes would go in a file; see ``aligned``.
        """
        at, home = owner(spec, side)
        # A tensor that is in no file is told from others by the size of its elements alone.
        where = spec.dtype.name if home == ZERO else self._sides[at].folders[home].location
        key = (where, spec.file, spec.offset)
        if key not in self._seen:
            self._seen[key] = self.read(spec, side, 0, count, offset, len(self._seen))
        return self._seen[key]

    def operands(self, step: Step, count: int, offset: int = 0) -> list[memoryview]:
        """Read a block of all operands, as ``shared``."""
        return [self.shared(spec, side, count, offset) for side, spec, _ in step.operands]

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
        self._files = [None] * len(self._sides)

    def _open(self, spec: TensorSpec, side: int) -> InputFile:
        # One file a side is held: with hundreds of shards, descriptors stay few.
        side, home = owner(spec, side)
        held, key = self._files[side], (home, spec.file)
        if held is not None and held[0] == key:
            return held[1]
        if held is not None:
            self._files[side] = None
            held[1].close()
        file = self._sides[side].folders[home].open_file(spec.file)
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
    return f"{pair.sides[side].folders[home].location}/{spec.file}"


def owner(spec: TensorSpec, side: int) -> tuple[int, str]:
    """Return the checkpoint that holds a tensor of ``side``, and the folder in it."""
    return (
        (1 - side, spec.home.removeprefix(OTHER))
        if spec.home.startswith(OTHER)
        else (side, spec.home)
    )


def widest_input(plan: Plan) -> int:
    """Return the bytes of the widest element that a plan reads."""
    read = [spec for step in plan.steps for spec in step.specs]
    plain = [piece for spec in read for piece in spec.pieces or (spec,)]
    return max((spec.dtype.bits // 8 for spec in plain), default=1)


def _stamps(checkpoint: Checkpoint) -> Mapping[tuple[str, str], Stamp]:
    return {(shard.home, shard.name): shard.stamp for shard in checkpoint.shards}
