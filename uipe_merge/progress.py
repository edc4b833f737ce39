"""How a run tells whoever watches how far it is: one narrow protocol.

The command line shows a rich progress bar, the Python API a tqdm one, tests a list.
"""

from __future__ import annotations

from typing import Protocol

from uipe_merge.errors import escape


class Progress(Protocol):
    """What a run calls, from one thread."""

    def start(self, total: int) -> None:
        """Begin; ``total`` is the number of bytes that will be written."""

    def advance(self, written: int, shard: str) -> None:
        """``written`` more bytes are done, the last of them in ``shard``."""

    def close(self) -> None:
        """End, whether or not everything was written."""


class Silent:
    """Shows nothing."""

    def start(self, total: int) -> None:
        """Show nothing."""

    def advance(self, written: int, shard: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""


class TqdmBar:
    """A tqdm bar in bytes, or in what else is counted, for notebooks and scripts."""

    def __init__(self, unit: str = "B") -> None:
        """Import tqdm only where a bar is wanted."""
        from tqdm.auto import tqdm

        self._bar = tqdm(unit=unit, unit_scale=unit == "B", delay=0.5)

    def start(self, total: int) -> None:
        """Set the length of the bar."""
        self._bar.reset(total=total)

    def advance(self, written: int, shard: str) -> None:
        """Move the bar and name the shard in hand."""
        self._bar.set_description_str(escape(shard), refresh=False)
        self._bar.update(written)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def watcher(progress: bool | Progress, unit: str = "B") -> Progress:  # noqa: FBT001 - the callers' argument
    """Return what is told of the progress: a tqdm bar, nobody, or what was given."""
    if isinstance(progress, bool):
        return TqdmBar(unit) if progress else Silent()
    return progress
