"""From measurements to tables and the page of the documentation; nothing is measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cases import Findings
    from measuring import Series


class Check(NamedTuple):
    """A figure that is held against the bar.

    Attributes:
        what: What it is, with its unit if it has one.
        value: What was measured.
        limit: What it may be at most.
    """

    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is within the bar."""
        return self.value <= self.limit


INTRODUCTION = """\
# Performance

Written by `make bench`; do not edit. Every figure of one table comes from one run on one
machine, in which the programs took turns (A B C A B C …), so that a slow minute hit all of
them alike. Absolute times say something about that machine; the ratios are what counts.
"""

HOW = """\
## How

- Before every run its output is removed, its inputs are read once (warm page cache), and the
  disk is synced. The input checkpoints are made by `benchmarks/checkpoints.py`: Gaussian
  weights and a Gaussian update of a hundredth of their size, the same bytes every time.
- *wall* is the median over the runs and the shortest and longest; *processor* is user and
  system time; *peak memory* is the largest resident size of any run, as the kernel reports it
  for the process that ended (never less than the some 40 MiB of the one that measures).
- *floor* is `cat` of both inputs to `/dev/null`, `cp -r` of one, `sync` of the copy, one after
  the other: reading, writing and making durable with nothing in between.
- *uipe-merge* is the command with its default options, the start of Python included; it says
  itself how long it took from the lock to the published output. Its arithmetic is compiled, so
  that torch is not imported. It writes past the page cache, so its output is on the disk and not
  in memory afterwards, where *floor* and mergekit leave a copy in memory too.
- *engine* is the same merge through the library in a process that has imported everything
  (`benchmarks/engine.py`); its own figure is from the first header read to the published
  directory, with every hash, check and `fsync`.
- *mergekit* is `task_arithmetic` with the original as base model and weight 1 + α, all other
  options at their defaults, in an environment of its own with the same torch.
"""


def median_text(series: Series) -> str:
    """Return the median wall time, with the shortest and longest where there are several."""
    low, high = series.spread
    several = len(series.outcomes) > 1
    return f"{series.wall:.2f} s" + (f" ({low:.2f}–{high:.2f})" if several else "")


def series_table(series: Iterable[Series]) -> list[list[str]]:
    """Return the rows of a table of measurements, the heading first."""
    return [
        ["what", "wall", "its own figure", "processor", "peak memory"],
        *(
            [
                each.name,
                median_text(each),
                "" if each.seconds is None else f"{each.seconds:.2f} s",
                f"{each.processor:.2f} s",
                f"{each.peak / 2**20:,.0f} MiB",
            ]
            for each in series
        ),
    ]


def check_table(findings: Iterable[Findings]) -> list[list[str]]:
    """Return the rows of the table of what is held against the bar, the heading first."""
    return [
        ["measure", "of", "bar", "measured", ""],
        *(
            [
                check.what,
                found.title,
                f"≤ {_figure(check.limit)}",
                _figure(check.value),
                "met" if check.met else "**missed**",
            ]
            for found in findings
            for check in found.checks
        ),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first being the heading, as an aligned Markdown table."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    heading, *body = rows
    rule = line("-" * width for width in widths)
    return "\n".join([line(heading), rule, *map(line, body)])


def tables(findings: Sequence[Findings]) -> str:
    """Return all that was found: what is held against the bar, then every case."""
    parts = ["## Against the bar", table(check_table(findings))]
    for found in findings:
        parts += [f"## {found.title}", table(series_table(found.series))]
        if found.notes:
            parts.append("\n".join(f"- {note}" for note in found.notes))
    return "\n\n".join(parts)


def page(
    findings: Sequence[Findings], machine: Sequence[tuple[str, str]], command: str, caution: str
) -> str:
    """Return the page of the documentation.

    Args:
        findings: What was found, in order.
        machine: What it was measured on.
        command: The command that writes the page anew.
        caution: Lines that say why the figures do not count; empty if they do.
    """
    parts = [INTRODUCTION]
    if caution:
        parts.append("\n".join(f"> {line}" for line in caution.splitlines()) + "\n")
    parts += [
        tables(findings) + "\n",
        HOW,
        f"## Again\n\n<!-- not run: it takes long -->\n```bash\n{command}\n```\n",
        "## Machine\n\n" + table([["what", "value"], *machine]) + "\n",
    ]
    return "\n".join(parts)


def _figure(value: float) -> str:
    """Return three significant digits, without an exponent for what occurs here."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
