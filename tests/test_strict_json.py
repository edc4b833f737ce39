"""JSON as two readers cannot read it differently."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_merge.checkpoint import strict_json
from uipe_merge.checkpoint.strict_json import StrictJsonError, loads

naturals = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**70) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(naturals, st.booleans())
def test_reads_what_json_writes(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert loads(text.encode("utf-8", "strict")) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "line 1 column 2"),
        (b'{"a":1,}', "line 1 column"),
        (b"{'a':1}", "double quotes"),
        (b'{"a":1} x', "Extra data"),
        (b'{"a":1}\0\0', "Extra data"),
        (b'\xef\xbb\xbf{"a":1}', "begins with a byte-order mark"),
        (b'{"\xff":1}', "byte 2 is not UTF-8"),
        (b'{"\xed\xa0\x80":1}', "byte 2 is not UTF-8"),
        (b'{"\xc0\x80":1}', "byte 2 is not UTF-8"),
        (b'{"a":1,"a":1}', "duplicate key 'a'"),
        (b'{"a":1,"\\u0061":2}', "duplicate key 'a'"),
        (b'[{"x":{"b":[],"c":{},"b":[]}}]', "duplicate key 'b'"),
        (b'["a\nb"]', "control character"),
        (b'["\\ud800"]', "half a surrogate pair"),
        (b'{"\\udc00":1}', "half a surrogate pair"),
        (b'{"a":["\\ude00\\ud83d"]}', "half a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)
@pytest.mark.parametrize("naturals_only", [True, False])
def test_refuses(text: bytes, message: str, naturals_only: bool) -> None:
    with pytest.raises(StrictJsonError, match=message):
        loads(text, naturals_only=naturals_only)


@pytest.mark.parametrize("spaces", ["", " ", "\n\t"])
@pytest.mark.parametrize(
    "number", ["-1", "-0", "1.0", "1e3", "-1.5", "NaN", "Infinity", "-Infinity"]
)
@pytest.mark.parametrize("place", ["[{}]", '{{"a":{}}}', "[0,{}]"])
def test_a_header_has_natural_numbers_only(place: str, number: str, spaces: str) -> None:
    text = place.format(spaces + number).encode()
    with pytest.raises(StrictJsonError, match="not a natural number"):
        loads(text)
    json.dumps(loads(text, naturals_only=False))


@pytest.mark.parametrize("text", [b'{"a-b": ", -1", "c": [0, 7]}', b'["\\u002d1", ":-1", 3]'])
def test_a_minus_in_a_string_is_no_number(text: bytes) -> None:
    assert loads(text) == json.loads(text)


def test_surrogates_in_pairs_are_one_character() -> None:
    assert loads(b'["\\ud83d\\ude00"]') == ["\U0001f600"]


def test_lone_surrogates_are_let_through_where_paths_are_meant() -> None:
    text = json.dumps({"caf\udce9": "x"}).encode()
    assert loads(text, any_path=True) == {"caf\udce9": "x"}


@pytest.mark.parametrize("depth", [10, 500, 2_000, 8_000, 30_000])
def test_every_depth_is_read_or_refused(depth: int) -> None:
    # Parsing and checking recurse in different ways, with limits that differ by interpreter.
    text = b"[" * depth + b'"\\u0061"' + b"]" * depth
    try:
        value = loads(text)
    except StrictJsonError as error:
        assert str(error) == "nested too deeply"  # noqa: PT017 - or it is read, see below
    else:
        for _ in range(depth):
            assert isinstance(value, list)
            (value,) = value
        assert value == "a"


@pytest.mark.parametrize(
    "text", [b"[" + b"[]," * 9 + b"0]", b"{" + b'"a":{},' * 9 + b'"b":0}', b"[" + b"0," * 9 + b"0]"]
)
def test_the_number_of_values_is_bounded_before_parsing(text: bytes) -> None:
    opened = text.count(b"[") + text.count(b"{") + text.count(b",")
    with pytest.raises(StrictJsonError, match=f"more than {opened - 1} values"):
        loads(text + b"broken", most_values=opened - 1)
    with pytest.raises(StrictJsonError, match=r"Extra data|duplicate"):
        loads(text + b"broken", most_values=opened)


def test_the_bound_is_on_unless_it_is_lifted() -> None:
    text = b"[" + b"0," * strict_json.MOST_VALUES + b"0]"
    with pytest.raises(StrictJsonError, match="more than 1000000 values"):
        loads(text)
    value = loads(text, most_values=None)
    assert isinstance(value, list)
    assert len(value) == strict_json.MOST_VALUES + 1
