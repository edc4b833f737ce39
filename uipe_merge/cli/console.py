"""How the command line speaks: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from uipe_merge.errors import escape
from uipe_merge.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.progress import TaskID

    from uipe_merge.progress import Progress


_PIPE_WIDTH = 240
"""Columns of a table in a file or a pipe, where nothing has to be folded."""


class Output:
    """What one command prints, and how much of it.

    Attributes:
        quiet: Print neither progress, tables nor warnings.
        verbose: Print per-tensor and per-group details too.
        as_json: Print data as JSON on stdout.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False
    ) -> None:
        """Open both consoles; rich honours NO_COLOR and drops colours in a pipe."""
        if quiet:  # the hub's client has progress bars of its own
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self.quiet = quiet
        self.verbose = verbose
        self.as_json = as_json
        self._stdout = Console(highlight=False, emoji=False, soft_wrap=True)
        if not self._stdout.is_terminal and "COLUMNS" not in os.environ:
            self._stdout.width = _PIPE_WIDTH
        self._stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

    def data(self, value: object) -> None:
        """Print a JSON document on stdout."""
        sys.stdout.write(json.dumps(value, indent=1) + "\n")

    def line(self, text: str) -> None:
        """Print a line of data on stdout."""
        self._stdout.print(escape_markup(escape(text)))

    def text(self, text: str) -> None:
        """Print lines of data on stdout."""
        for line in text.splitlines():
            self.line(line)

    def note(self, text: str) -> None:
        """Print a line for the reader on stderr."""
        if not self.quiet:
            self._stderr.print(escape_markup(escape(text)))

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings on stderr."""
        for text in warnings if not self.quiet else ():
            self._stderr.print(f"[yellow]warning:[/] {escape_markup(escape(text))}")

    def error(self, text: str) -> None:
        """Print an error, on one line, whether quiet or not."""
        self._stderr.print(f"[red]error:[/] {escape_markup(escape(text))}")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
    ) -> None:
        """Print a table of data on stdout; the first column is text, the rest are numbers."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            # A name is never cut: it is what the reader looks for.
            table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
        for row in rows:
            table.add_row(*(escape_markup(escape(cell)) for cell in row))
        self._stdout.print(table, soft_wrap=False)

    def fields(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print named values on stdout."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape_markup(escape(name)), escape_markup(escape(value)))
        self._stdout.print(table, soft_wrap=False)

    def progress(self) -> Progress:
        """Return a progress bar on a terminal, and silence elsewhere."""
        if self.quiet or not self._stderr.is_terminal:
            return Silent()
        return Bar(self._stderr)

    def counting(self, *, transient: bool = False) -> Progress:
        """Return the same for an evaluation, which counts sequences; it may go when it ends."""
        if self.quiet or not self._stderr.is_terminal:
            return Silent()
        return Count(self._stderr, transient=transient)


class Bar:
    """A rich progress bar in bytes: rate, time left, and the shard in hand."""

    def __init__(self, console: Console) -> None:
        """Prepare the bar; it appears with ``start``."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def start(self, total: int) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("reading", total=total)
        self._progress.start()

    def advance(self, written: int, shard: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(
                self._task, advance=written, description=escape_markup(escape(shard))
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


class Count:
    """A progress bar that counts sequences, not bytes."""

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        """Prepare the bar; it appears with ``start``."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
        )
        self._task: TaskID | None = None

    def start(self, total: int) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("scoring", total=total)
        self._progress.start()

    def advance(self, written: int, shard: str) -> None:
        """Move the bar by some sequences, and name what is being done."""
        if self._task is not None:
            self._progress.update(self._task, advance=written, description=shard)

    def close(self) -> None:
        """Leave the bar as it stands, or take it away."""
        self._progress.stop()


def size(nbytes: float) -> str:
    """Return bytes in the decimal unit that suits them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number, or a dash where there is none."""
    return "–" if value is None else format(value, form)
