"""Against the safetensors library: what our reader accepts, the library accepts and reads alike.

Three kinds of file: valid ones written in every way JSON allows, which both must read; those
with tokens of the header exchanged, and those with bytes changed anywhere, where ours may
refuse more but must not accept anything else.
"""

import json
import math
import re
import struct
from pathlib import Path

import fuzzing
import pytest
from fuzzing import Tensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import encode_header

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[a-zA-Z]+|\s+|.', re.DOTALL)
NUMBERS = "0 -0 00 1 -1 +1 1.0 1e0 2E0 0.5 .5 1. 0x1 4 8 16 9223372036854775807 9223372036854775808"
LITERALS = "18446744073709551615 18446744073709551616 null true false NaN Infinity -Infinity"
STRINGS = (
    '"" "dtype" "shape" "data_offsets" "__metadata__" "a" "F128" "f32" "extra" "\x7f" "\x00" "😀"'
)
ESCAPES = r'"\u0061" "\ud800" "\ud83d\ude00" "\ude00\ud83d" "\u0000" "\/" "\x" "\n" "dtyp\u0065"'
ATOMS = [
    *"{}[]:,",
    *f"{NUMBERS} {LITERALS} {STRINGS} {ESCAPES}".split(" "),
    *(f'"{dtype}"' for dtype in DTYPES),
    "9" * 30,
    *" \n\t\r\x0b\x0c\x00\ufeff\u00a0\u2028'/",
    '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
    "[0,0]",
    "[0,9223372036854775808,9223372036854775808]",
    '{"x":[]}',
    '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
    '["U8",[0],[0,0]]',
]

shapes = st.lists(st.integers(0, 4), max_size=3)
readable = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """Tensors in the order of their bytes."""
    chosen: Tensors = {}
    for name in draw(st.lists(readable, min_size=1, max_size=5, unique=True)):
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(shapes)
        if DTYPES[dtype].bits < 8:
            shape.append(8)  # whole bytes
        nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
        chosen[name] = dtype, tuple(shape), draw(st.binary(min_size=nbytes, max_size=nbytes))
    return chosen


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[Tensors, bytes, bytes]:
    """Tensors, and header and data that hold them: keys in any order, spaces, escapes."""
    chosen = draw(tensors().filter(bool))
    entries: list[tuple[str, object]] = []
    position = 0
    for name, (dtype, shape, content) in chosen.items():
        end = position + len(content)
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [position, end])]
        entries.append((name, dict(draw(st.permutations(fields)))))
        position = end
    if draw(st.booleans()):
        entries.append(("__metadata__", draw(st.dictionaries(readable, readable, max_size=2))))
    text = json.dumps(
        dict(draw(st.permutations(entries))),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, "\t"])),
    )
    text += draw(st.text(" ", max_size=9))
    return chosen, text.encode(), b"".join(content for _, _, content in chosen.values())


@st.composite
def files_with_other_tokens(draw: st.DrawFn) -> bytes:
    """Files whose header has tokens replaced, dropped, repeated or put in; the length fits."""
    _, header, data = draw(valid_files())
    tokens = TOKEN.findall(header.decode())
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(tokens)))
        stop = draw(st.integers(start, min(start + 12, len(tokens))))
        atoms = draw(st.lists(st.sampled_from(ATOMS), max_size=2))
        # The first two keep a copy of what was there: the likeliest way to a duplicate key.
        new = draw(st.sampled_from([tokens[start:stop] * 2, [*tokens[start:stop], *atoms], atoms]))
        tokens[start:stop] = new
    header = "".join(tokens).encode()
    return struct.pack("<Q", len(header)) + header + data


@st.composite
def files_with_other_bytes(draw: st.DrawFn) -> bytes:
    """Valid files with a few bytes set, put in or removed, wherever they are."""
    _, header, data = draw(valid_files())
    raw = bytearray(struct.pack("<Q", len(header)) + header + data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        stop = draw(st.integers(start, min(start + 2, len(raw))))
        raw[start:stop] = draw(st.binary(max_size=2))
    return bytes(raw)


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(unhurried, max_examples=200)
@given(valid_files())
def test_valid_files_are_read_by_both(file: tuple[Tensors, bytes, bytes]) -> None:
    chosen, header, data = file
    raw = struct.pack("<Q", len(header)) + header + data
    assert fuzzing.by_us(raw) == chosen
    assert fuzzing.by_library(raw) == chosen


@settings(unhurried, max_examples=500)
@given(files_with_other_tokens())
def test_other_tokens(raw: bytes) -> None:
    fuzzing.header(raw)


@settings(unhurried, max_examples=500)
@given(files_with_other_bytes())
def test_other_bytes(raw: bytes) -> None:
    fuzzing.header(raw)


@settings(unhurried, max_examples=300)
@given(st.text('{}[]",:0123456789.-eE+truefalsn\\u \n', max_size=40), st.binary(max_size=4))
@example('{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x")
def test_arbitrary_json(text: str, data: bytes) -> None:
    header = f"{{{text}".encode()
    fuzzing.header(struct.pack("<Q", len(header)) + header + data)


@settings(unhurried, max_examples=200)
@given(tensors().filter(bool))
def test_what_we_write_is_read_by_both(chosen: Tensors) -> None:
    header = encode_header(
        (name, DTYPES[dtype], shape, len(content))
        for name, (dtype, shape, content) in chosen.items()
    )
    raw = header + b"".join(content for _, _, content in chosen.values())
    assert len(header) % 8 == 0
    assert fuzzing.by_us(raw) == chosen
    assert fuzzing.by_library(raw) == chosen
    assert list(fuzzing.by_us(raw) or ()) == list(chosen)


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"])
def test_safe_open_reads_the_same_from_disk(dtype: str, tmp_path: Path) -> None:
    content = bytes(range(48)) if dtype != "BOOL" else b"\1\0" * 24
    elements = 48 * 8 // DTYPES[dtype].bits
    raw = encode_header([("a", DTYPES[dtype], (2, elements // 2), 48)]) + content
    (tmp_path / "f").write_bytes(raw)
    with safe_open(tmp_path / "f", framework="np") as opened:
        array = opened.get_tensor("a")
        assert opened.metadata() == {"format": "pt"}
    assert fuzzing.by_us(raw) == {"a": (dtype, array.shape, array.tobytes())}
