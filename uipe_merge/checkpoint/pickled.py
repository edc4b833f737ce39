"""Legacy PyTorch checkpoints (``.bin``): tensors found without unpickling them here.

A zip checkpoint stores every storage uncompressed, so that a tensor is a range of the file
like any other: only the small ``data.pkl``, which says what lies where, is a pickle. It is
read by ``unpickler_child`` in a process of its own, with limits, and what that prints is
believed no further than the bounds of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import Header, TensorSpec
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, UnsafeInputError, escape

if TYPE_CHECKING:
    from uipe_merge.checkpoint.header import KnownHeaders
    from uipe_merge.checkpoint.storage import InputFile

MAX_PICKLE = 64 * 2**20
MAX_ENTRIES = 500_000

_MOST_DIMENSIONS = 64  # as torch has it

_CHILD = Path(__file__).with_name("unpickler_child.py")
_SECONDS = 180
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_SAVE_AGAIN = "load it with a trusted program and save it as safetensors"


def read_pickled(file: InputFile, name: str, known: KnownHeaders | None = None) -> Header:
    """Return the tensors of an open ``.bin`` file called ``name``.

    Args:
        file: The open file.
        name: Its name, for the tensors it holds.
        known: Not used: where a tensor lies in a zip archive depends on the file.

    Raises:
        UnsafeInputError: The zip or its pickle is not what ``torch.save`` writes.
        CorruptInputError: It is no zip archive, or a tensor lies outside its storage.
        IncompatibleModelsError: A tensor is not contiguous.
    """
    del known
    storages, pickle = entries_of(file)
    raw = bytearray(pickle.size)
    file.read_into(memoryview(raw), pickle.offset)
    specs = [spec_of(row, storages, file, name) for row in _describe(bytes(raw), file)]
    if not specs:
        raise CorruptInputError("holds no tensors", file=file.path)
    return Header(specs, hashlib.sha256(raw).hexdigest())


class Entry(NamedTuple):
    """Where an entry of the archive lies in the file, in bytes."""

    offset: int
    size: int


def entries_of(file: InputFile) -> tuple[dict[str, Entry], Entry]:
    """Return where each storage lies, by its key, and the pickle.

    Raises:
        UnsafeInputError: The zip is not what ``torch.save`` writes.
        CorruptInputError: It is no zip archive, or is cut off.
        IncompatibleModelsError: It was saved on a big-endian machine.
    """
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Stream(file)))
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError):
        raise UnsafeInputError(
            "is a pickle of the old kind, or no PyTorch checkpoint",
            file=file.path,
            remedy=_SAVE_AGAIN,
        ) from None
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:
        raise UnsafeInputError(f"has {len(infos)} entries", file=file.path, remedy=_SAVE_AGAIN)
    found: dict[str, Entry] = {}
    root = infos[0].filename.split("/")[0] if infos else ""
    for info in infos:
        top, _, inner = info.filename.partition("/")
        if top != root or not inner or ".." in inner.split("/") or "\\" in inner:
            raise _unsafe(file, f"has an entry '{info.filename}' outside its own folder")
        if inner in found:
            raise _unsafe(file, f"has the entry '{info.filename}' twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _unsafe(file, f"has the compressed entry '{info.filename}'")
        found[inner] = _locate(info, file)
    pickle = found.get("data.pkl")
    if pickle is None or pickle.size > MAX_PICKLE:
        raise _unsafe(file, "has no data.pkl of a usual size")
    if (order := found.get("byteorder")) is not None:
        content = bytearray(min(order.size, 16))
        file.read_into(memoryview(content), order.offset)
        if content != b"little":
            raise IncompatibleModelsError(
                "was saved on a big-endian machine", file=file.path, remedy=_SAVE_AGAIN
            )
    prefix = "data/"
    return {
        inner[len(prefix) :]: entry for inner, entry in found.items() if inner.startswith(prefix)
    }, pickle


def _locate(info: zipfile.ZipInfo, file: InputFile) -> Entry:
    """Find the first byte of an entry behind its local header."""
    end = info.header_offset + _LOCAL_HEADER.size
    if not 0 <= info.header_offset <= file.stamp.size - _LOCAL_HEADER.size:
        raise CorruptInputError(f"the entry '{info.filename}' lies outside", file=file.path)
    raw = bytearray(_LOCAL_HEADER.size)
    file.read_into(memoryview(raw), info.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
    offset = end + name_length + extra_length
    if signature != b"PK\x03\x04" or offset + info.file_size > file.stamp.size:
        raise CorruptInputError(f"the entry '{info.filename}' is cut off", file=file.path)
    return Entry(offset, info.file_size)


def _describe(pickle: bytes, file: InputFile) -> list[list[object]]:
    """Let the child read the pickle."""
    try:
        finished = subprocess.run(  # noqa: S603 - our own file, run by this very interpreter
            [sys.executable, "-I", "-S", _CHILD],
            input=pickle,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        answer = json.loads(finished.stdout) if finished.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {}
    rows = answer.get("tensors")
    if not isinstance(rows, list):
        why = answer.get("refused", "ended the process that read it")
        raise _unsafe(file, f"its pickle {escape(str(why))[:200]}")
    return rows


def spec_of(
    row: list[object], storages: dict[str, Entry], file: InputFile, shard: str
) -> TensorSpec:
    """Check one described tensor against the storage it names."""
    name, code, key, elements, offset, shape, stride = row
    assert isinstance(name, str)  # noqa: S101 - the child checks what it prints
    assert isinstance(shape, list)  # noqa: S101 - the child checks what it prints
    assert isinstance(stride, list)  # noqa: S101 - the child checks what it prints
    dtype, storage = DTYPES.get(str(code)), storages.get(str(key))
    if escape(name) != name:
        raise CorruptInputError("its name holds control characters", file=file.path, tensor=name)
    if dtype is None or dtype.bits % 8:
        raise CorruptInputError(f"has the unknown dtype {code!s:.30}", file=file.path, tensor=name)
    if len(shape) > _MOST_DIMENSIONS or max(shape, default=0) > file.stamp.size:
        raise CorruptInputError("has an impossible shape", file=file.path, tensor=name)
    size = dtype.bits // 8
    if storage is None or type(elements) is not int or elements * size > storage.size:
        raise CorruptInputError("its storage is missing or cut off", file=file.path, tensor=name)
    count = math.prod(shape)
    if type(offset) is not int or not 0 <= offset <= elements - count:
        raise CorruptInputError("lies outside its storage", file=file.path, tensor=name)
    if count > 1 and not (len(shape) == len(stride) and _contiguous(shape, stride)):
        raise IncompatibleModelsError(
            "is stored transposed or strided", file=file.path, tensor=name, remedy=_SAVE_AGAIN
        )
    position = storage.offset + offset * size
    return TensorSpec(name, dtype, tuple(shape), shard, position, count * size)


def _contiguous(shape: list[int], stride: list[int]) -> bool:
    expected = 1
    for size, step in reversed(list(zip(shape, stride, strict=True))):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _unsafe(file: InputFile, what: str) -> UnsafeInputError:
    return UnsafeInputError(what, file=file.path, remedy=_SAVE_AGAIN)


class _Stream(io.RawIOBase):
    """An input file as the stream that ``zipfile`` wants."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.stamp.size}
        self._position = max(base[whence] + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type] # what RawIOBase passes
        count = min(len(view), max(self._file.stamp.size - self._position, 0))
        if count:
            self._file.read_into(view[:count], self._position)
        self._position += count
        return count
