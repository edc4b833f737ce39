"""JSON as the safetensors format means it: no duplicate keys, no numbers but naturals.

Python's own parser accepts more than the Rust one that other readers use (duplicate keys,
``NaN``, lone surrogates, ``-0``). A header that two readers could read differently is
refused here.
"""

from __future__ import annotations

import json
import re
from typing import Never

MOST_BYTES, MOST_VALUES = 25_000_000, 1_000_000
"""How much JSON a header or an index may be: more than that of a shard with 100 k tensors.

A tensor takes 8 values and 100 bytes. In a hostile text a value may take 2 bytes, for which
Python needs 350 bytes of memory, and every byte 4 where the text holds one rare character.
"""

DEEPEST_SETTINGS = 100

_MAYBE_NEGATIVE = re.compile(r"[\[,:]\s*-")


class StrictJsonError(ValueError):
    """The text is not strict JSON; the message says why."""


def loads(
    raw: bytes | bytearray,
    *,
    naturals_only: bool = True,
    any_path: bool = False,
    most_values: int | None = MOST_VALUES,
) -> object:
    """Parse ``raw`` (UTF-8).

    Args:
        raw: The text.
        naturals_only: Refuse every number that is not a natural one, as headers demand.
            Indexes and manifests hold other numbers too.
        any_path: Accept lone surrogates, as which Python holds the bytes of a path that are
            not UTF-8.
        most_values: Refuse a text of more values than this, before it is parsed. Commas and
            opening brackets are counted, wherever they stand.

    Raises:
        StrictJsonError: On malformed JSON, a byte-order mark, a duplicate key, a number
            that is not allowed, a lone surrogate, nesting too deep to parse, or too many
            values.
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise StrictJsonError("it begins with a byte-order mark")
    if most_values is not None and sum(map(raw.count, (b",", b"[", b"{"))) > most_values:
        raise StrictJsonError(f"more than {most_values} values")
    try:
        text = raw.decode("utf-8")
        decoder = _DOCUMENT
        if naturals_only:
            # Looking at every integer is slow, and only needed where one may be negative.
            negative = "-" in text and _MAYBE_NEGATIVE.search(text)
            decoder = _CAREFUL_HEADER if negative else _HEADER
        parsed: object = decoder.decode(text)
        if "\\u" in text and not any_path:
            _refuse_surrogates(parsed)
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    except StrictJsonError:
        raise
    except ValueError as error:
        raise StrictJsonError(str(error)) from None
    return parsed


def settings(raw: bytes) -> object:
    """Parse a configuration as Python does, so far as it can be written again.

    Others' writers leave ``NaN`` and keys twice in theirs, and their readers take them.

    Raises:
        ValueError: It is not JSON.
        StrictJsonError: It holds a lone surrogate, or is nested deeper than any configuration.
    """
    try:
        parsed: object = json.loads(raw)
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    _refuse_depth(parsed, DEEPEST_SETTINGS)
    _refuse_surrogates(parsed)
    return parsed


def _refuse_depth(value: object, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise StrictJsonError("nested too deeply")
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_depth(inner, left - 1)


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise StrictJsonError(f"duplicate key '{name}'")
            seen.add(name)
    return unique


def _natural(literal: str) -> int:
    if literal.startswith("-"):
        raise StrictJsonError(f"{literal[:30]} is not a natural number")
    return int(literal)


def _refuse(literal: str) -> Never:
    raise StrictJsonError(f"{literal[:30]} is not a natural number")


def _refuse_surrogates(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise StrictJsonError("a string holds half a surrogate pair") from None
    elif isinstance(value, dict):
        for name, inner in value.items():
            _refuse_surrogates(name)
            _refuse_surrogates(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_surrogates(inner)


_DOCUMENT = json.JSONDecoder(object_pairs_hook=_pairs)
_HEADER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_refuse, parse_constant=_refuse)
_CAREFUL_HEADER = json.JSONDecoder(
    object_pairs_hook=_pairs,
    parse_int=_natural,
    parse_float=_refuse,
    parse_constant=_refuse,
)
