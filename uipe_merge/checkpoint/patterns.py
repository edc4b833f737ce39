r"""The patterns by which a PEFT config names modules, matched in bounded time.

PEFT takes the keys of ``rank_pattern`` and ``alpha_pattern`` for regular expressions and matches
``(.*\.)?(KEY)`` against the whole name. ``re`` goes back and tries again, so that a key of 20
characters can keep it busy for years. Keys of letters and dots, nearly all there are, cannot; what
says more is matched here position by position, and what needs more than that is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import IncompatibleModelsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LONGEST_KEY, LONGEST_NAME, MOST_KEYS, DEEPEST = 200, 500, 64, 2
"""Of keys that are more than letters and dots, and of the names that they are held against."""

MOST_LITERALS = 20_000
"""Of keys of letters and dots: each is held against every module."""

_LITERAL = re.compile(r"\^?(?:[\w.:/ -]|\\\.)*\$?", re.ASCII)
_ATOM = re.compile(r"\\[dwsDWS]|\\[^\w\s]|\[\^?[^\[\]\\]+\]|[^\\\[\](){}|*+?^$]", re.ASCII)

Positions = set[int]
"""Where in a name a match may have come to."""


class PatternError(ValueError):
    """A key is no pattern of this kind."""


class Pattern(NamedTuple):
    """A compiled key.

    Attributes:
        literal: What matches a key of letters and dots.
        steps: What matches another one.
        whole: Whether the key begins with ``^``, so that no dot may come before it.
    """

    literal: re.Pattern[str] | None
    steps: Callable[[Positions, str], Positions] | None
    whole: bool = False

    def matches(self, name: str) -> bool:
        """Tell whether a name, or its end after a dot, is what the key says.

        Raises:
            IncompatibleModelsError: The name is longer than any module's is.
        """
        if self.literal is not None:
            return self.literal.fullmatch(name) is not None
        assert self.steps is not None  # noqa: S101 - one of the two
        if len(name) > LONGEST_NAME:
            raise IncompatibleModelsError(
                f"is longer than the {LONGEST_NAME} characters that patterns are held against",
                tensor=name,
            )
        dots = (at + 1 for at, each in enumerate(name) if each == "." and not self.whole)
        starts = {0, *dots}
        return len(name) in self.steps(starts, name)


def compile_keys(keys: Iterable[str]) -> dict[str, Pattern]:
    """Compile the keys of a config, in their order.

    Raises:
        PatternError: One is no regular expression, or one that is not matched in bounded time.
    """
    found: dict[str, Pattern] = {}
    others = 0
    for key in keys:
        if _LITERAL.fullmatch(key) and len(found) < MOST_LITERALS:
            found[key] = Pattern(re.compile(rf"(?:.*\.)?(?:{key})"), None)
            continue
        others += 1
        if others > MOST_KEYS or len(key) > LONGEST_KEY:
            raise PatternError(f"'{key[:40]}' is one pattern too many, or too long")
        found[key] = Pattern(None, _Parser(key).parsed(), key.startswith("^"))
    return found


class _Parser:
    """Reads a key: characters and sets, groups, ``|``, ``* + ?``, and anchors at its ends."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._rest = key.removeprefix("^")
        self._branches = 1

    def parsed(self) -> Callable[[Positions, str], Positions]:
        steps = self._choice(0)
        # Of several branches the sign would belong to the first alone.
        of_one = self._key.startswith("^") and self._branches > 1
        if self._rest not in ("", "$") or of_one:
            raise self._refused()
        return steps

    def _choice(self, depth: int) -> Callable[[Positions, str], Positions]:
        branches = [self._sequence(depth)]
        while self._rest.startswith("|"):
            self._rest = self._rest[1:]
            branches.append(self._sequence(depth))
        self._branches = len(branches)  # of the outermost at last
        if len(branches) == 1:
            return branches[0]
        return lambda at, name: set().union(*(branch(at, name) for branch in branches))

    def _sequence(self, depth: int) -> Callable[[Positions, str], Positions]:
        parts = []
        while self._rest and self._rest[0] not in "|)$":
            parts.append(self._repeated(depth))

        def all_of(at: Positions, name: str) -> Positions:
            for part in parts:
                at = part(at, name) if at else at
            return at

        return all_of

    def _repeated(self, depth: int) -> Callable[[Positions, str], Positions]:
        if self._rest.startswith("("):
            if depth == DEEPEST:
                raise self._refused()
            self._rest = self._rest[3 if self._rest.startswith("(?:") else 1 :]
            inner = self._choice(depth + 1)
            if not self._rest.startswith(")"):
                raise self._refused()
            self._rest = self._rest[1:]
        else:
            inner = self._atom()
        sign = self._rest[:1]
        if sign not in ("*", "+", "?"):
            return inner
        self._rest = self._rest[1:]
        if self._rest[:1] in ("*", "+", "?", "{"):
            raise self._refused()
        if sign == "?":
            return lambda at, name: at | inner(at, name)
        more = _closure(inner)
        return more if sign == "*" else lambda at, name: more(inner(at, name), name)

    def _atom(self) -> Callable[[Positions, str], Positions]:
        match = _ATOM.match(self._rest)
        if match is None:
            raise self._refused()
        self._rest = self._rest[match.end() :]
        try:
            one = re.compile(match[0])
        except re.error:
            raise self._refused() from None
        return lambda at, name: {end + 1 for end in at if one.match(name, end)}

    def _refused(self) -> PatternError:
        return PatternError(f"'{self._key[:40]}' is no pattern that is matched in bounded time")


def _closure(
    inner: Callable[[Positions, str], Positions],
) -> Callable[[Positions, str], Positions]:
    """Return any number of times ``inner``; every position is gone on from once."""

    def repeated(at: Positions, name: str) -> Positions:
        reached, fresh = set(at), set(at)
        while fresh:
            fresh = inner(fresh, name) - reached
            reached |= fresh
        return reached

    return repeated
