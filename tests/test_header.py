"""The safetensors header: golden bytes, both directions, and every rule of the format.

That the library reads the same is shown in test_header_property.py.
"""

import hashlib
import json
import struct

import numpy as np
import pytest
from fakes import MemoryFile
from helpers import raw_safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import (
    MAX_HEADER,
    Header,
    TensorSpec,
    encode_header,
    joined,
    read_header,
)
from uipe_merge.checkpoint.storage import Stamp
from uipe_merge.checkpoint.strict_json import MOST_BYTES
from uipe_merge.errors import CorruptInputError

F32, BF16 = DTYPES["F32"], DTYPES["BF16"]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NESTED = [
    '{"t":%s}',
    '{"__metadata__":{"a":%s}}',
    '{"t":{"dtype":%s,"shape":[],"data_offsets":[0,0]}}',
    '{"t":{"dtype":"U8","shape":[9223372036854775808,%s],"data_offsets":[0,0]}}',
    '{"t":{"dtype":"U8","shape":[],"data_offsets":%s}}',
]
"""Where a value may be nested too deeply."""


def parse(raw: bytes) -> Header:
    return read_header(MemoryFile("m/f.safetensors", raw), "f.safetensors")


def refused(raw: bytes) -> CorruptInputError:
    with pytest.raises(CorruptInputError) as caught:
        parse(raw)
    assert caught.value.file == "m/f.safetensors"
    assert caught.value.remedy
    return caught.value


class TestEncode:
    def test_golden_bytes(self) -> None:
        tensors = [("b", BF16, (2, 3), 12), ("a", F32, (), 4), ("θ\n", DTYPES["I64"], (0,), 0)]
        text = (
            '{"__metadata__":{"format":"pt"},'
            '"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
            '"a":{"dtype":"F32","shape":[],"data_offsets":[12,16]},'
            '"θ\\n":{"dtype":"I64","shape":[0],"data_offsets":[16,16]}}'
        ).encode()
        assert len(text) == 201
        assert encode_header(tensors) == b"\xd0\0\0\0\0\0\0\0" + text + b" " * 7

    def test_no_tensors(self) -> None:
        assert encode_header([]) == b'\x20\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"}}'

    def test_as_the_library_writes_it(self) -> None:
        names = [f"model.layers.{number}.weight" for number in (0, 1, 10)]
        theirs = save({name: np.ones((2, 3), "float32") for name in names}, {"format": "pt"})
        ours = encode_header([(name, F32, (2, 3), 24) for name in names])
        assert ours + np.ones(18, "float32").tobytes() == theirs

    @pytest.mark.parametrize("length", range(9))
    def test_the_first_tensor_is_aligned(self, length: int) -> None:
        header = encode_header([("x" * length, F32, (1,), 4)])
        assert len(header) % 8 == 0
        assert struct.unpack_from("<Q", header) == (len(header) - 8,)
        assert len(header) - len(header.rstrip(b" ")) < 8

    def test_what_was_written_is_read(self) -> None:
        tensors = [("w", F32, (2,), 8), ('q"\\', DTYPES["BOOL"], (3, 1), 3), ("😀", BF16, (), 2)]
        raw = encode_header(tensors)
        header = parse(raw + bytes(13))
        start = len(raw)
        assert header.tensors == [
            TensorSpec("w", F32, (2,), "f.safetensors", start, 8),
            TensorSpec('q"\\', DTYPES["BOOL"], (3, 1), "f.safetensors", start + 8, 3),
            TensorSpec("😀", BF16, (), "f.safetensors", start + 11, 2),
        ]
        assert [spec.elements for spec in header.tensors] == [2, 3, 1]
        assert header.sha256 == hashlib.sha256(raw).hexdigest()


class TestAccepted:
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_every_dtype(self, dtype: object) -> None:
        assert isinstance(dtype, type(F32))
        nbytes = 8 * dtype.bits // 8
        (spec,) = parse(raw_safetensors({"t": entry(dtype.name, [8], 0, nbytes)}, bytes(nbytes)))[0]
        assert (spec.dtype, spec.shape, spec.nbytes, spec.elements) == (dtype, (8,), nbytes, 8)

    @pytest.mark.parametrize("shape", [[], [1], [0], [2, 0, 3], [1] * 40, [7, 3]])
    def test_every_rank_and_empty_tensors(self, shape: list[int]) -> None:
        elements = 0 if 0 in shape else 21 if shape == [7, 3] else 1
        raw = raw_safetensors({"t": entry("U8", shape, 0, elements)}, bytes(elements))
        assert parse(raw).tensors[0].shape == tuple(shape)

    def test_tensors_come_in_the_order_of_their_bytes(self) -> None:
        document = {"z": entry("U8", [2], 5, 7), "a": entry("U8", [5], 0, 5)}
        document["e"] = entry("U8", [0], 5, 5)
        assert [spec.name for spec in parse(raw_safetensors(document, bytes(7))).tensors] == [
            *"aez"
        ]

    @pytest.mark.parametrize("metadata", [{}, {"format": "pt", "any": "thing,[{"}])
    def test_metadata(self, metadata: dict[str, str]) -> None:
        document = {"__metadata__": metadata, "t": entry("U8", [1], 0, 1)}
        assert [spec.name for spec in parse(raw_safetensors(document, b"x")).tensors] == ["t"]

    @pytest.mark.parametrize("tail", ["", " ", " " * 1000, "\n\t\r "])
    def test_white_space_after_the_header(self, tail: str) -> None:
        text = json.dumps({"t": entry("U8", [1], 0, 1)}) + tail
        assert parse(raw_safetensors(text.encode(), b"x")).tensors[0].offset == 8 + len(text)

    def test_no_alignment_is_asked_for(self) -> None:
        document = {"a": entry("U8", [1], 0, 1), "b": entry("F64", [1], 1, 9)}
        assert len(parse(raw_safetensors(document, bytes(9))).tensors) == 2


class TestRefused:
    """The hazards' rows are in test_hazards_header.py; here are the rest of the rules."""

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "not described"),
            ([], "not described"),
            (["U8", [0], [0, 0]], "not described"),
            ({"dtype": "U8", "shape": [0]}, "not described"),
            ({**entry("U8", [0], 0, 0), "extra": 1}, "not described"),
            ({"Dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "not described"),
            ({**entry("U8", [0], 0, 0), "dtype": None}, "unknown dtype"),
            ({**entry("U8", [0], 0, 0), "dtype": {"U8": None}}, "unknown dtype"),
            (entry("u8", [0], 0, 0), "unknown dtype 'u8'"),
            (entry("x" * 99, [0], 0, 0), "unknown dtype 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"),
            ({**entry("U8", [0], 0, 0), "shape": None}, "shape is not a list"),
            ({**entry("U8", [0], 0, 0), "shape": {"0": 1}}, "shape is not a list"),
            ({**entry("U8", [0], 0, 0), "shape": [None]}, "shape is not a list"),
            ({**entry("U8", [0], 0, 0), "shape": ["0"]}, "shape is not a list"),
            ({**entry("U8", [0], 0, 0), "shape": [[0]]}, "shape is not a list"),
            ({**entry("U8", [0], 0, 0), "shape": [False]}, "shape is not a list"),
            ({**entry("U8", [0], 0, 0), "data_offsets": None}, "data_offsets are not"),
            ({**entry("U8", [0], 0, 0), "data_offsets": [0]}, "data_offsets are not"),
            ({**entry("U8", [0], 0, 0), "data_offsets": [0, 0, 0]}, "data_offsets are not"),
            ({**entry("U8", [0], 0, 0), "data_offsets": [False, 0]}, "data_offsets are not"),
            ({**entry("U8", [0], 0, 0), "data_offsets": ["0", "0"]}, "data_offsets are not"),
            (entry("U8", [0], 1, 0), "has -1 bytes, but U8 [0] needs 0"),
            (entry("F4", [3], 0, 1), "has 1 bytes, but F4 [3] needs 1.5"),
            (entry("F32", [2**61], 0, 2**63), "overflows"),
            (entry("U8", [0, 2**63], 0, 0), "overflows"),
        ],
    )
    def test_an_entry_that_is(self, value: object, message: str) -> None:
        error = refused(raw_safetensors({"t": value}))
        assert error.tensor == "t"
        assert message in error.message

    @pytest.mark.parametrize(
        "offsets", [[(0, 4), (0, 4)], [(0, 4), (4, 8), (4, 8)], [(0, 8), (4, 8)]]
    )
    def test_tensors_that_overlap_and_add_up_to_the_size(
        self, offsets: list[tuple[int, int]]
    ) -> None:
        document = {
            f"t{number}": entry("U8", [end - begin], begin, end)
            for number, (begin, end) in enumerate(offsets)
        }
        size = sum(end - begin for begin, end in offsets)
        error = refused(raw_safetensors(document, bytes(size)))
        assert error.tensor == f"t{len(offsets) - 1}"
        assert "overlaps the one before it" in error.message

    @pytest.mark.parametrize("metadata", [None, [], "pt", {"a": 1}, {"a": None}, {"a": {}}])
    def test_metadata_that_is(self, metadata: object) -> None:
        document = {"__metadata__": metadata, "t": entry("U8", [0], 0, 0)}
        assert "from strings to strings" in refused(raw_safetensors(document)).message

    @pytest.mark.parametrize(
        "character", ["\x00", "\x1f", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff"]
    )
    def test_a_name_with(self, character: str) -> None:
        name = f"a{character}b"
        error = refused(raw_safetensors({name: entry("U8", [0], 0, 0)}))
        assert error.tensor == name
        assert "control characters" in error.message
        assert character not in str(error)

    @pytest.mark.parametrize("size", range(8))
    def test_fewer_bytes_than_the_length_field_has(self, size: int) -> None:
        what = f"only {size} bytes" if size else "is empty"
        assert what in refused(b"\2\0\0\0\0\0\0\0"[:size]).message

    @pytest.mark.parametrize("depth", [10, 5_000, 20_000, 200_000])
    @pytest.mark.parametrize("place", NESTED)
    def test_any_depth(self, place: str, depth: int) -> None:
        text = place % ("[" * depth + "]" * depth)
        assert refused(raw_safetensors(text.encode())).remedy

    @pytest.mark.parametrize("place", NESTED)
    def test_a_depth_that_the_parser_can_just_take(self, place: str) -> None:
        # A message about a value recurses too, and from another depth than the parser did.
        for depth in range(800, 1000):
            text = place % ("[" * depth + "]" * depth)
            assert refused(raw_safetensors(text.encode())).remedy

    def test_a_header_of_the_longest_length_is_read(self) -> None:
        text = json.dumps({"t": entry("U8", [0], 0, 0)}).encode()
        assert len(parse(raw_safetensors(text.ljust(MOST_BYTES))).tensors) == 1

    @pytest.mark.parametrize("length", [MOST_BYTES + 1, MAX_HEADER])
    def test_a_longer_one_is_refused_before_it_is_read(self, length: int) -> None:
        file = Counting("m/f", struct.pack("<Q", length) + b'{"a":', length + 8)
        with pytest.raises(CorruptInputError, match=f"is {length} bytes long, more than"):
            read_header(file, "f")
        assert file.bytes_read <= 32

    def test_a_longer_one_than_the_format_allows_is_damage(self) -> None:
        file = Counting("m/f", struct.pack("<Q", MAX_HEADER + 1) + b'{"a":', 2**40)
        with pytest.raises(CorruptInputError, match="download the file again"):
            read_header(file, "f")


class Counting(MemoryFile):
    """A file that claims a size and counts what is read of it."""

    def __init__(self, path: str, content: bytes, size: int) -> None:
        super().__init__(path, content.ljust(64))
        self.stamp = Stamp(size, 0)
        self.bytes_read = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.bytes_read += len(buffer)
        super().read_into(buffer, offset)


# ---------------------------------------------------------------- tensors made of pieces


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_a_cut_of_a_tensor_made_of_pieces_is_that_of_its_elements(
    sizes: list[int], data: st.DataObject
) -> None:
    # Piece n holds n·100, n·100 + 1, …: where an element lies says which one it is.
    pieces = [
        TensorSpec(f"p{number}", DTYPES["BF16"], (size,), "f", 200 * number, 2 * size)
        for number, size in enumerate(sizes)
    ]
    elements = [number * 100 + at for number, size in enumerate(sizes) for at in range(size)]
    whole = joined("t", (len(elements),), [joined("inner", (sizes[0],), pieces[:1]), *pieces[1:]])
    assert whole.elements == len(elements)
    start = data.draw(st.integers(0, len(elements)))
    count = data.draw(st.integers(0, len(elements) - start))
    found = [
        part.offset // 2 + at for part in whole.cut(start, count) for at in range(part.elements)
    ]
    assert found == elements[start : start + count]


def test_a_part_across_a_seam_is_a_defect_of_the_caller() -> None:
    pieces = [TensorSpec("p", DTYPES["F32"], (3,), "f", 12 * number, 12) for number in range(2)]
    whole = joined("t", (6,), pieces)
    assert whole.part(3, 3).offset == 12
    with pytest.raises(AssertionError):
        whole.part(2, 2)
