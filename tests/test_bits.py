"""bits.py against torch: every bit pattern of the narrow types, chosen ones of the wide."""

import math

import numpy as np
import pytest
import torch
from helpers import bits
from hypothesis import given
from hypothesis import strategies as st

from uipe_merge.bits import BitScanner, NonFinite, combine, count_differing, same_bytes
from uipe_merge.checkpoint.dtypes import DTYPES

CHUNK = 2**16  # elements the scanner looks at in one go
NARROW = [name for name, dtype in DTYPES.items() if dtype.computes and dtype.bits <= 16]
MOVED = [name for name, dtype in DTYPES.items() if not dtype.computes]


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(bits(tensor).tobytes())


def torch_dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(DTYPES[name].torch))
    assert isinstance(found, torch.dtype)
    return found


def expected(tensor: torch.Tensor) -> NonFinite | None:
    """What torch says; float64 holds every value, and torch lacks ``isfinite`` for some."""
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    where = torch.nonzero(~torch.isfinite(wide.reshape(-1)))
    return NonFinite(len(where), int(where[0])) if len(where) else None


# ---------------------------------------------------------------- scan


@pytest.mark.parametrize("name", NARROW)
def test_every_bit_pattern_is_classified_as_torch_does(name: str) -> None:
    integer = torch.uint8 if DTYPES[name].bits == 8 else torch.int16
    low = 0 if integer == torch.uint8 else -(2**15)
    patterns = torch.arange(low, low + 2 ** DTYPES[name].bits, dtype=torch.int32).to(integer)
    values = patterns.view(torch_dtype(name))
    finite = torch.isfinite(values.double())
    scanner = BitScanner()
    for pattern, wanted in zip(values.view(integer), finite.tolist(), strict=True):
        one = raw(pattern.reshape(1))
        assert (scanner.scan(one, DTYPES[name]) is None) == wanted, pattern
    assert scanner.scan(raw(values), DTYPES[name]) == expected(values)
    clean = values[finite]
    assert scanner.scan(raw(clean), DTYPES[name]) is None
    assert len(clean) < len(values)


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_the_edges_of_the_wide_types(name: str) -> None:
    dtype = torch_dtype(name)
    info = torch.finfo(dtype)
    good = torch.tensor(
        [0.0, -0.0, info.max, -info.max, info.tiny, info.tiny * info.eps], dtype=dtype
    )
    assert BitScanner().scan(raw(good), DTYPES[name]) is None
    quiet = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    integer = torch.int32 if name == "F32" else torch.int64
    signalling = (quiet[1:].view(integer) + 1).view(dtype)  # payload 1, either sign
    bad = torch.cat([good, quiet, signalling])
    assert BitScanner().scan(raw(bad), DTYPES[name]) == NonFinite(5, 6) == expected(bad)


@given(
    st.sampled_from(["BF16", "F16", "F32", "F64", "C64", "F8_E4M3", "F8_E5M2"]),
    st.binary(max_size=400),
)
def test_any_bytes_are_counted_as_torch_counts_them(name: str, content: bytes) -> None:
    size = DTYPES[name].bits // 8
    data = bytearray(content[: len(content) // size * size])
    kind = torch.complex64 if name == "C64" else torch_dtype(name)
    values = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
    assert BitScanner().scan(memoryview(data), DTYPES[name]) == expected(values)


@pytest.mark.parametrize("name", ["BF16", "F32", "F64", "F8_E4M3", "C64"])
@pytest.mark.parametrize("index", [0, 1, CHUNK // 2, CHUNK - 1, CHUNK, 2 * CHUNK])
def test_one_value_is_found_wherever_it_stands(name: str, index: int) -> None:
    kind = torch.complex64 if name == "C64" else torch_dtype(name)
    values = torch.ones(2 * CHUNK + 1, dtype=kind)
    values[index] = math.nan
    scanner = BitScanner()
    assert scanner.scan(raw(values), DTYPES[name]) == NonFinite(1, index)
    values[-1] = math.nan
    assert scanner.scan(raw(values), DTYPES[name]) == expected(values)
    assert scanner.scan(raw(values[:index]), DTYPES[name]) is None  # nothing is left over


def test_a_complex_number_is_one_however_much_of_it_is_not_finite() -> None:
    bad = [complex(math.nan, 0), complex(0, math.inf), complex(math.nan, math.nan), 1 + 1j]
    values = torch.tensor([1j, *bad], dtype=torch.complex64)
    assert BitScanner().scan(raw(values), DTYPES["C64"]) == NonFinite(3, 1)


@pytest.mark.parametrize("name", MOVED)
def test_what_is_only_moved_has_no_such_values(name: str) -> None:
    assert BitScanner().scan(memoryview(b"\xff" * 64), DTYPES[name]) is None


def test_combine_counts_from_the_beginning_of_the_tensor() -> None:
    pieces = [(0, None), (10, NonFinite(2, 3)), (20, None), (30, NonFinite(5, 0))]
    assert combine(pieces) == NonFinite(7, 13)
    assert combine([(0, None)]) is None
    assert combine([]) is None


# ---------------------------------------------------------------- compare


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095, 4096, 4097, 4104, 9001, 2**20 + 3])
def test_same_bytes_sees_any_one_bit(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    one, two = bytearray(content), bytearray(content)
    assert same_bytes(memoryview(one), memoryview(two))
    for place in {0, size // 2, size - 1, size - 8} & set(range(size)):
        two[place] ^= 0x80
        assert not same_bytes(memoryview(one), memoryview(two)), place
        two[place] ^= 0x80


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.booleans())),
)
def test_differing_elements_are_counted(size: int, rows: list[tuple[int, int, bool]]) -> None:
    limit = 2 ** (8 * size)
    pairs = [(one % limit, (one if same else two) % limit) for one, two, same in rows]
    one, two = (b"".join(pair[side].to_bytes(size, "little") for pair in pairs) for side in (0, 1))
    wanted = sum(first != second for first, second in pairs)
    assert count_differing(memoryview(one), memoryview(two), size) == wanted
