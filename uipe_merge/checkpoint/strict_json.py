"""JSON as the safetensors format means it: no duplicate keys, no numbers but naturals.

Python's own parser accepts more than the Rust one that other readers use (duplicate keys,
``NaN``, lone surrogates, ``-0``). A header that two readers could read differently is
refused here.
"""

from __future__ import annotations

import json
import re
from typing import Never

_MAYBE_NEGATIVE = re.compile(r"[\[,:]\s*-")


class StrictJsonError(ValueError):
    """The text is not strict JSON; the message says why."""


def loads(raw: bytes, *, naturals_only: bool = True) -> object:
    """Parse ``raw`` (UTF-8).

    Args:
        raw: The text.
        naturals_only: Refuse every number that is not a natural one, as headers demand.
            Indexes and manifests hold other numbers too.

    Raises:
        StrictJsonError: On malformed JSON, a byte-order mark, a duplicate key, a number
            that is not allowed, a lone surrogate, or nesting too deep to parse.
    """
    try:
        text = raw.decode("utf-8")
        decoder = _DOCUMENT
        if naturals_only:
            # Looking at every integer is slow, and only needed where one may be negative.
            negative = "-" in text and _MAYBE_NEGATIVE.search(text)
            decoder = _CAREFUL_HEADER if negative else _HEADER
        parsed: object = decoder.decode(text)
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    except StrictJsonError:
        raise
    except ValueError as error:
        raise StrictJsonError(str(error)) from None
    if "\\u" in text:
        _refuse_surrogates(parsed)
    return parsed


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
