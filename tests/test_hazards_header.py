"""Group A of the hazards: a weight file that is not what it claims to be (exit 4).

Each row is met through the command line, as the original's file in a process of its own and
as the unlearned checkpoint's in this one.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import refuse_merge, tree
from helpers import assert_refused, raw_safetensors, run_cli, write_pair
from hostile import filled, numbered, refuse_started, refuse_within_memory

from uipe_merge.checkpoint.strict_json import MOST_BYTES

AGAIN = "hf cache verify"

HTML = b"<!DOCTYPE html><html><body>Sign in to download this file</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"


def entry(dtype: str, shape: object, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(dtype: str = "F32", shape: object = (), begin: int = 0, end: int = 4) -> bytes:
    """A file of 4 bytes of data and one tensor, called w."""
    return raw_safetensors({"w": entry(dtype, shape, begin, end)}, b"\0\0\0\0")


def text(header: str | bytes, data: bytes = b"") -> bytes:
    return raw_safetensors(header.encode() if isinstance(header, str) else header, data)


GOOD = one("F32", [1])
W = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWO = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]},"b":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}}'

# What the hazards' list calls the row: the file, and what the message says of it.
ROWS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty"),
    "git-lfs pointer text": (LFS, "git-lfs pointer, not the weights; run `git lfs pull`"),
    "HTML body": (HTML, "a web page, not weights"),
    "HTML body in capitals": (HTML.upper(), "a web page, not weights"),
    "XML body": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "message of a server"),
    "Entry not found body": (b"Entry not found", "error message of a server"),
    "GGUF magic": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file"),
    "zip magic": (b"PK\3\4\0\0\x08\x08\0\0" + bytes(64), "is a zip archive (a PyTorch .bin?)"),
    "pickle magic": (b"\x80\x02}q\0X\1\0\0\0a." + bytes(64), "is a pickle"),
    "four bytes": (b"\0\0\0\0", "is only 4 bytes long"),
    "one byte short": (GOOD[:-1], "1 short of what its header describes"),
    "one byte long": (GOOD + b"\0", "1 longer than what its header describes"),
    "data cut off": (GOOD[:-4], "4 short of what its header describes"),
    "header cut off": (GOOD[:30], "says its header is"),
    "N = 2⁶³": (struct.pack("<Q", 2**63) + GOOD[8:], f"says its header is {2**63} bytes long"),
    "N = 10⁸ in a tiny file": (struct.pack("<Q", 10**8) + GOOD[8:], "says its header is 100000000"),
    "N = 0": (bytes(8) + b"\0\0\0\0", "says its header is 0 bytes long"),
    "header []": (text("[]"), "does not begin with '{'"),
    "header {": (text("{  "), "its header is not valid"),
    "header \\xff": (text(b'{"\xff":1}'), "byte 2 is not UTF-8"),
    "header with a BOM": (text(b"\xef\xbb\xbf" + GOOD[8:-4], GOOD[-4:]), "does not begin with '{'"),
    "header padded before": (text(b" " + GOOD[8:-4], GOOD[-4:]), "does not begin with '{'"),
    "NUL padding": (text(GOOD[8:-4] + b"\0\0", GOOD[-4:]), "its header is not valid"),
    "duplicate name, equal offsets": (text(f"{{{W},{W}}}", b"data"), "duplicate key 'w'"),
    "duplicate name, differing offsets": (
        text(f"{{{W},{W.replace('0,4', '4,8')}}}", b"datadata"),
        "duplicate key 'w'",
    ),
    "duplicate field": (
        text('{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', b"data"),
        "duplicate key 'dtype'",
    ),
    "duplicate name by an escape": (
        text(f"{{{W},{W.replace('w', chr(92) + 'u0077')}}}", b"data"),
        "duplicate key 'w'",
    ),
    "hole": (text(TWO % (0, 4, 5, 9), bytes(9)), "tensor 'b': leaves a gap before it"),
    "overlap": (text(TWO % (0, 4, 3, 7), bytes(7)), "tensor 'b': overlaps the one before it"),
    "same bytes twice": (text(TWO % (0, 4, 0, 4), bytes(4)), "tensor 'b': overlaps"),
    "first offset ≠ 0": (one("F32", [1], 4, 8), "tensor 'w': leaves a gap before it"),
    "reversed": (one("F32", [1], 4, 0), "tensor 'w': has -4 bytes, but F32 [1] needs 4"),
    "shape × dtype ≠ bytes": (one("F32", [2]), "tensor 'w': has 4 bytes, but F32 [2] needs 8"),
    "dtype ≠ bytes": (one("BF16", [1]), "tensor 'w': has 4 bytes, but BF16 [1] needs 2"),
    "dimension −1": (one("F32", [-1]), "-1 is not a natural number"),
    "dimensions −1 and −1": (one("F32", [-1, -1]), "-1 is not a natural number"),
    "dimension −0": (text(f"{{{W.replace('[1]', '[-0]')}}}"), "-0 is not a natural number"),
    "dimension 1.0": (one("F32", [1.0]), "1.0 is not a natural number"),
    "dimension 1e0": (text(f"{{{W.replace('[1]', '[1e0]')}}}", b"data"), "1e0 is not a natural"),
    "dimension true": (one("F32", [True]), "tensor 'w': its shape is not a list of natural"),
    "dimension 2⁶⁴": (one("F32", [2**64]), "tensor 'w': its shape [18446744073709551616] over"),
    "dimension of 5000 digits": (
        text(f"{{{W.replace('[1]', '[' + '9' * 5000 + ']')}}}", b"data"),
        "its header is not valid",
    ),
    "overflow [2,2⁶³−1]": (one("F32", [2, 2**63 - 1]), "tensor 'w': its shape [2, 9223372036854"),
    "overflow to 0 in 64 bits": (one("U8", [2**32, 2**32], 0, 0), "overflows"),
    "overflow [0,2⁶³,2⁶³]": (one("F32", [0, 2**63, 2**63], 0, 0), "tensor 'w': its shape [0, 922"),
    "dtype F128": (one("F128", [1]), "tensor 'w': has the unknown dtype 'F128'"),
    "200-deep JSON": (text('{"w":' + "[" * 200 + "]" * 200 + "}"), "tensor 'w': is not described"),
    "200 000-deep JSON": (text('{"w":' + "[" * 200_000), "nested too deeply"),
    "tensor name with ESC": (
        text(json.dumps({"\x1b[2Jw": entry("F32", [1], 0, 4)}), b"data"),
        r"tensor '\x1b[2Jw': its name holds control characters",
    ),
    "tensor name with NUL": (
        text(json.dumps({"w\0": entry("F32", [1], 0, 4)}), b"data"),
        r"tensor 'w\x00': its name holds control characters",
    ),
    "tensor name with a newline": (
        text(json.dumps({"w\nerror: x": entry("F32", [1], 0, 4)}), b"data"),
        r"tensor 'w\nerror: x': its name holds control characters",
    ),
    "tensor name that is half a surrogate": (
        text(r'{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"data"),
        "half a surrogate pair",
    ),
    "tensor name that rich would print as a picture": (
        text(json.dumps({":bomb: [red]w[/]": entry("F33", [1], 0, 4)}), b"data"),
        "tensor ':bomb: [red]w[/]': has the unknown dtype",
    ),
    "tensor name of 2 MB": (
        text(json.dumps({"w" * 2_000_000: entry("F33", [1], 0, 4)}), b"data"),
        "w… (2000000 characters)': has the unknown dtype 'F33'",
    ),
    "no tensors at all": (text("{}"), "holds no tensors"),
    "only metadata": (text('{"__metadata__":{"format":"pt"}}'), "holds no tensors"),
    "metadata that is no text": (
        text(f'{{"__metadata__":{{"a":1}},{W}}}', b"data"),
        "__metadata__",
    ),
}

ELSEWHERE = {  # the remedy is another one than to download the file again
    "git-lfs pointer text": "git lfs pull",
    "GGUF magic": "use the safetensors form of the model",
    "zip magic": "save the model as safetensors first",
    "pickle magic": "save the model as safetensors first",
}


@pytest.mark.parametrize("row", ROWS)
def test_as_the_original(tmp_path: Path, row: str) -> None:
    raw, message = ROWS[row]
    original, _ = write_pair(tmp_path)
    file = original / "model.safetensors"
    file.write_bytes(raw)
    refuse_started(tmp_path, 4, f"error: {file}: ", message, ELSEWHERE.get(row, AGAIN))


@pytest.mark.parametrize("row", ROWS)
def test_as_the_unlearned(tmp_path: Path, row: str) -> None:
    raw, message = ROWS[row]
    _, unlearned = write_pair(tmp_path)
    (unlearned / "model.safetensors").write_bytes(raw)
    where = str(unlearned / "model.safetensors")
    refuse_merge(tmp_path, 4, where, message, ELSEWHERE.get(row, AGAIN))


def test_in_one_of_several_shards(tmp_path: Path) -> None:
    _, unlearned = write_pair(tmp_path, shards=3)
    shard = unlearned / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse_merge(tmp_path, 4, str(shard), "1 short of what its header describes", AGAIN)


@pytest.mark.parametrize("command", ["inspect", "dry run"])
def test_the_other_commands_refuse_as_well(tmp_path: Path, command: str) -> None:
    original, unlearned = write_pair(tmp_path)
    (original / "model.safetensors").write_bytes(LFS)
    before = tree(tmp_path)
    if command == "inspect":
        result = run_cli("inspect", original, unlearned)
    else:
        out = tmp_path / "out"
        result = run_cli(original, unlearned, "--alpha", 2, "-o", out, "--dry-run")
    assert_refused(result, 4, "git lfs pull")
    assert tree(tmp_path) == before


EMPTY = '"#":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
ESCAPED = EMPTY.replace("offsets", r"offset\u0073")
WIDE = f'{{"__metadata__":{{"a":"😀{"x" * (MOST_BYTES - 200)}"}},{W}}}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param(
            lambda: filled(numbered(EMPTY.replace("#", "1" * 12 + "#")), 99_000_000),
            "more than the 25000000 that are read",
            id="1.3 M tensors in a 99 MB header",
        ),
        pytest.param(
            lambda: filled(numbered(EMPTY), MOST_BYTES),
            "more than 1000000 values",
            id="half a million tensors in the longest header that is read",
        ),
        pytest.param(
            lambda: filled(numbered(ESCAPED), MOST_BYTES),
            "more than 1000000 values",
            id="the same with escapes in the names of the fields",
        ),
        pytest.param(
            lambda: filled(numbered('"#":{}'), MOST_BYTES),
            "more than 1000000 values",
            id="millions of empty entries",
        ),
        pytest.param(
            lambda: b'{"a":[' + b"[]," * (MOST_BYTES // 3 - 4) + b"0]}",
            "more than 1000000 values",
            id="millions of empty lists",
        ),
        pytest.param(
            lambda: (
                filled(numbered('"#":"#"'), 15_000_000).replace(
                    b"{", b'{"__metadata__":{"a":"\xf0\x9f\x98\x80' + b"x" * 9_000_000 + b'",', 1
                )
                + b"}"
            ),
            "holds no tensors",
            id="a million metadata entries",
        ),
        pytest.param(WIDE.encode, "4 short of", id="one string of 25 MB, 4 bytes wide"),
    ],
)
def test_memory_stays_bounded(tmp_path: Path, header: Callable[[], bytes], message: str) -> None:
    original, _ = write_pair(tmp_path)
    (original / "model.safetensors").write_bytes(raw_safetensors(header()))
    refuse_within_memory(tmp_path, 4, str(original / "model.safetensors"), message)
