"""The safetensors header: read strictly, written as the format says.

Layout of a file: 8 bytes little-endian length N, N bytes JSON, then the tensors without a
gap. Source: the format section of the safetensors documentation. What this reader accepts,
the safetensors library accepts and decodes equally; it refuses more (see the checks).
"""

from __future__ import annotations

import hashlib
import struct
from itertools import pairwise
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import strict_json
from uipe_merge.checkpoint.dtypes import DTYPES, DType
from uipe_merge.errors import CorruptInputError, escape

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.checkpoint.storage import InputFile

MAX_HEADER = 100_000_000
"""Longest header the format allows, in bytes."""

_LENGTH = struct.Struct("<Q")
_MOST_BITS = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}
_AGAIN = "download the file again (`hf cache verify` finds the damaged ones)"

_MAGIC = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights", "run `git lfs pull`"),
    (b"gguf", "is a GGUF file", "use the safetensors form of the model"),
    (b"pk\x03\x04", "is a zip archive (a PyTorch .bin?)", "save the model as safetensors first"),
    (b"<!doctype html", "is a web page, not weights", _AGAIN),
    (b"<html", "is a web page, not weights", _AGAIN),
    (b"<?xml", "is an XML message of a server, not weights", _AGAIN),
    (b"entry not found", "is an error message of a server, not weights", _AGAIN),
    (b"\x80\x02", "is a pickle", "save the model as safetensors first"),
)


class TensorSpec(NamedTuple):
    """Where one tensor lies.

    Attributes:
        name: Its name.
        dtype: Its element type.
        shape: Its shape; ``()`` for a scalar.
        file: Name of the shard that holds it.
        offset: Absolute position of its first byte in that file.
        nbytes: Its length in bytes.
        home: Which of a checkpoint's folders the shard is in; ``""`` is its own. With ``OTHER``
            before it, a folder of the other checkpoint of the pair.
        factors: Low-rank updates that adapters make to the stored values, one after the other.
        pieces: For a tensor that is no tensor of a file, what its elements are, one piece
            after the other; ``file`` and ``offset`` are the first one's then.
        scales: What the stored values are multiplied by, before factors are added.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    home: str = ""
    factors: tuple[Factor, ...] = ()
    pieces: tuple[TensorSpec, ...] = ()
    scales: Scales | None = None

    @property
    def plain(self) -> bool:
        """Whether its values are the stored ones: nothing is multiplied in or added."""
        return not self.factors and self.scales is None

    @property
    def kept_dtype(self) -> DType:
        """The element type of its output where none is asked for."""
        return self.dtype if self.scales is None else self.scales.dtype

    def in_home(self, home: str) -> TensorSpec:
        """Return it, its scales and its pieces as tensors of another folder."""
        scales = self.scales
        if scales is not None:
            scales = scales._replace(values=scales.values._replace(home=home))
        pieces = tuple(piece.in_home(home) for piece in self.pieces)
        return self._replace(home=home, scales=scales, pieces=pieces)

    @property
    def elements(self) -> int:
        """Number of elements."""
        if self.pieces:
            return sum(piece.elements for piece in self.pieces)
        return self.nbytes * 8 // self.dtype.bits

    def part(self, start: int, count: int) -> TensorSpec:
        """Return ``count`` elements from ``start``, which must lie in one piece, as a vector."""
        for piece in self.pieces:
            if start < piece.elements:
                return piece.part(start, count)._replace(factors=self.factors)
            start -= piece.elements
        assert start + count <= self.elements  # noqa: S101 - a caller that overlooks a seam
        size = self.dtype.bits // 8
        return self._replace(shape=(count,), offset=self.offset + start * size, nbytes=count * size)

    def cut(self, start: int, count: int) -> list[TensorSpec]:
        """Return ``count`` elements from ``start``, piece by piece."""
        seams = [*self.seams(), self.elements]
        ranges = [(max(a, start), min(b, start + count)) for a, b in pairwise(seams)]
        return [self.part(a, b - a) for a, b in ranges if b > a] or [self.part(0, 0)]

    def seams(self) -> list[int]:
        """Return the elements at which its pieces begin, the first one's 0 included."""
        starts = [0]
        for piece in self.pieces[:-1]:
            starts.append(starts[-1] + piece.elements)
        return starts


OTHER = "other:"
"""Before the ``home`` of a tensor that belongs to the other checkpoint of a pair."""

ZERO = "zero"
"""The ``home`` of a tensor that is in no folder: every element is zero."""


def joined(name: str, shape: tuple[int, ...], pieces: Iterable[TensorSpec]) -> TensorSpec:
    """Return a tensor whose elements are those of some others, one after the other.

    The others are plain: whatever is multiplied in or added belongs to the whole.
    """
    everything = [each for piece in pieces for each in piece.pieces or (piece,)]
    parts = tuple(each for each in everything if each.nbytes) or (everything[0],)
    nbytes = sum(piece.nbytes for piece in parts)
    whole = parts[0]._replace(name=name, shape=shape, nbytes=nbytes, factors=(), scales=None)
    return whole._replace(pieces=parts)


class Factor(NamedTuple):
    """One update c·B·A of a matrix W or of a stack of them, or c·b of a vector.

    Attributes:
        left: B, of shape ``(rows, rank·experts)``; b, of the vector's shape.
        right: A, of shape ``(experts·rank, columns)``; ``None`` for a vector.
        transposed: Whether W is stored as ``(columns, rows)``: (B·A)ᵀ is added.
        scale: c.
        experts: The matrices of a stack. The expert is the slower index of A's rows and the
            faster one of B's columns.
        magnitude: m of DoRA, of shape ``(rows,)``: W becomes m ⊙ (W + c·B·A)/‖W + c·B·A‖, the
            norm taken over the columns.
    """

    left: TensorSpec
    right: TensorSpec | None
    transposed: bool
    scale: float
    experts: int = 1
    magnitude: TensorSpec | None = None

    @property
    def tensors(self) -> list[TensorSpec]:
        """The tensors it is made of."""
        return [spec for spec in (self.left, self.right, self.magnitude) if spec is not None]


class Scales(NamedTuple):
    """What the blocks of a tensor are multiplied by.

    Attributes:
        values: One number a block, of shape ``(…, block rows, block columns)`` with the
            tensor's own leading dimensions; or a single one.
        block: Rows and columns of a block, smaller ones at the ends; ``()`` where a single
            number scales the whole tensor.
        dtype: The element type that the products are to be stored in.
    """

    values: TensorSpec
    block: tuple[int, ...]
    dtype: DType


class Header(NamedTuple):
    """What the beginning of a shard says.

    Attributes:
        tensors: The tensors, in the order of their bytes.
        sha256: Hex digest of the length field and the JSON.
    """

    tensors: list[TensorSpec]
    sha256: str


KnownHeaders = dict[tuple[str, str, int], Header]
"""Headers by digest, file name and file size, so that the second checkpoint of a pair, whose
headers mostly say the same, is not parsed again."""


def read_header(file: InputFile, name: str, known: KnownHeaders | None = None) -> Header:
    """Read and check the header of an open shard called ``name``.

    Args:
        file: The open shard.
        name: Its name, for the tensors it holds.
        known: Headers that were read before; this one is looked up there and put there.

    Raises:
        CorruptInputError: Whatever is wrong with it, naming the file and, where there is
            one, the tensor.
    """
    size = file.stamp.size
    if size < _LENGTH.size:
        what = "is empty" if size == 0 else f"is only {size} bytes long"
        raise CorruptInputError(what, file=file.path, remedy=_AGAIN)
    start = bytearray(min(size, 32))
    file.read_into(memoryview(start), 0)
    (length,) = _LENGTH.unpack_from(start)
    if not 2 <= length <= min(MAX_HEADER, size - _LENGTH.size):  # "{}" is the shortest JSON
        what, remedy = f"says its header is {length} bytes long; the file has {size}", _AGAIN
        for magic, other, instead in _MAGIC:
            if bytes(start).lower().startswith(magic):
                what, remedy = other, instead
        raise CorruptInputError(what, file=file.path, remedy=remedy)
    if length > strict_json.MOST_BYTES:
        raise CorruptInputError(
            f"its header is {length} bytes long, more than the {strict_json.MOST_BYTES} that "
            "are read",
            file=file.path,
            remedy="no model needs so many: do not trust this file, or split it into shards",
        )
    raw = bytearray(_LENGTH.size + length)
    file.read_into(memoryview(raw), 0)
    digest = hashlib.sha256(raw).hexdigest()
    del raw[: _LENGTH.size]
    key = (digest, name, size)
    if known is not None and key in known:
        return known[key]
    try:
        tensors = _parse(raw, name, length + _LENGTH.size, size)
    except _HeaderError as error:
        raise CorruptInputError(
            str(error), file=file.path, tensor=error.tensor, remedy=_AGAIN
        ) from None
    header = Header(tensors, digest)
    if known is not None:
        known[key] = header
    return header


class _HeaderError(ValueError):
    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


def _parse(raw: bytearray, file: str, data: int, size: int) -> list[TensorSpec]:
    """Check the JSON ``raw``; ``data`` is where the tensors begin, ``size`` the file's end."""
    if not raw.startswith(b"{"):
        raise _HeaderError("its header does not begin with '{'")
    try:
        parsed = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise _HeaderError(f"its header is not valid: {error}") from None
    assert isinstance(parsed, dict)  # noqa: S101 - it began with "{"
    _check_metadata(parsed.pop("__metadata__", {}))
    if not parsed:
        raise _HeaderError("holds no tensors")
    specs = [_spec(name, entry, file, data) for name, entry in parsed.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    end = data
    for spec in specs:
        if spec.offset != end:
            what = "overlaps the one before it" if spec.offset < end else "leaves a gap before it"
            raise _HeaderError(what, spec.name)
        end += spec.nbytes
    if end != size:
        difference = f"{end - size} short of" if end > size else f"{size - end} longer than"
        raise _HeaderError(f"is {size} bytes, {difference} what its header describes")
    return specs


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _HeaderError("its __metadata__ is not a map from strings to strings")


def _spec(name: str, entry: object, file: str, data: int) -> TensorSpec:
    if not name.isprintable() and escape(name) != name:
        raise _HeaderError("its name holds control characters", name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _HeaderError("is not described by dtype, shape and data_offsets", name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        raise _HeaderError(f"has the unknown dtype {str(code)[:30]!r}", name)
    if type(offsets) is not list or [type(offset) for offset in offsets] != [int, int]:
        raise _HeaderError("its data_offsets are not two natural numbers", name)
    begin, end = offsets
    bits = _bits(name, dtype, shape)
    if (end - begin) * 8 != bits:
        raise _HeaderError(
            f"has {end - begin} bytes, but {code} {shape!s:.60} needs {bits / 8:g}", name
        )
    return TensorSpec(name, dtype, tuple(shape), file, data + begin, end - begin)


def _bits(name: str, dtype: DType, shape: object) -> int:
    """Return the bits of all elements, refusing a product that 64 bits cannot hold."""
    if type(shape) is not list:
        raise _HeaderError("its shape is not a list of natural numbers", name)
    bits = bound = dtype.bits
    for dimension in shape:
        if type(dimension) is not int:
            raise _HeaderError("its shape is not a list of natural numbers", name)
        bits *= dimension
        bound *= dimension or 1  # [0, 2**63] is 0 elements, yet no product to compute with
        if bound > _MOST_BITS:
            raise _HeaderError(f"its shape {shape!s:.60} overflows", name)
    return bits


def encode_header(tensors: Iterable[tuple[str, DType, tuple[int, ...], int]]) -> bytes:
    """Return the header for ``(name, dtype, shape, nbytes)`` tensors laid out in that order.

    The metadata is ``{"format": "pt"}``, which transformers demands, and the JSON is padded
    with spaces so that the first tensor begins at a multiple of 8.
    """
    entries = ['{"__metadata__":{"format":"pt"}']
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries.append(
            f'{encode_basestring(name)}:{{"dtype":"{dtype.name}",'
            f'"shape":[{",".join(map(str, shape))}],'
            f'"data_offsets":[{position},{position + nbytes}]}}'
        )
        position += nbytes
    raw = (",".join(entries) + "}").encode()
    raw += b" " * (-len(raw) % 8)
    return _LENGTH.pack(len(raw)) + raw
