"""The exception tree. Every error the tool raises on purpose is one of these.

::

    UipeMergeError
    ├── UsageError              2  the command line or call makes no sense
    ├── RecipeError             3  α or another coefficient cannot be used
    ├── CorruptInputError       4  a file is not what it claims to be
    ├── IncompatibleModelsError 5  the two checkpoints do not belong together
    ├── UnsafeInputError        6  reading it would be unsafe, so it is refused
    ├── NumericError            7  a value is, or would become, not finite
    ├── OutputError             8  the disk, a path or a permission is in the way
    ├── OutputLockedError       9  another run is writing the same output
    └── RemoteError            10  a hub or an object store does not give what is asked for

The number is the exit code of the command line. An error reads as one line that names
the file, the tensor and the remedy; text that came from a file is escaped, so that a
tensor name cannot drive the terminal.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

_BREAKS = ("Zl", "Zp")  # the Unicode line and paragraph separators

LISTED = 20
"""How many of the mismatches a one-line message names before it counts the rest."""


_LONGEST_NAME, _LONGEST_MESSAGE = 500, 10_000
"""Characters; a hostile file may have a name of megabytes."""


class UipeMergeError(Exception):
    """Base of the tree.

    Args:
        message: What is wrong, without file, tensor and remedy.
        file: The file or directory concerned.
        tensor: The tensor concerned.
        remedy: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """Keep the parts; they are put together by ``str``."""
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.remedy = remedy

    def __str__(self) -> str:
        """One line: file, tensor, message, remedy."""
        where = [] if self.file is None else [self.file]
        if self.tensor is not None:
            where.append(f"tensor '{_shortened(self.tensor, _LONGEST_NAME)}'")
        line = ": ".join([*where, _shortened(self.message, _LONGEST_MESSAGE)])
        if self.remedy is not None:
            line = f"{line}; {self.remedy}"
        return escape(line)


class UsageError(UipeMergeError):
    """The command line or the call makes no sense."""

    exit_code = 2


class RecipeError(UipeMergeError):
    """A coefficient or another part of the recipe cannot be used."""

    exit_code = 3


class CorruptInputError(UipeMergeError):
    """A file is not what it claims to be, or changed while it was read."""

    exit_code = 4


class IncompatibleModelsError(UipeMergeError):
    """The two checkpoints do not belong together, or are of a kind not supported."""

    exit_code = 5


class UnsafeInputError(UipeMergeError):
    """Reading the input would leave its directory or run code."""

    exit_code = 6


class NumericError(UipeMergeError):
    """A value is not finite, or would not be."""

    exit_code = 7


class OutputError(UipeMergeError):
    """The disk, a path or a permission is in the way."""

    exit_code = 8


class OutputLockedError(UipeMergeError):
    """Another run is writing the same output."""

    exit_code = 9


class RemoteError(UipeMergeError):
    """A hub or an object store refuses, fails, or cannot be reached."""

    exit_code = 10


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text)} characters)"


def escape(text: str) -> str:
    """Return ``text`` with its control, format, surrogate and line-breaking characters escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if (category := unicodedata.category(character))[0] != "C" and category not in _BREAKS
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def listed(items: Iterable[str]) -> str:
    """Join what is wrong into one line, naming the first few and counting the rest."""
    everything = list(items)
    line = "; ".join(everything[:LISTED])
    rest = len(everything) - LISTED
    return f"{line}; and {rest} more" if rest > 0 else line
