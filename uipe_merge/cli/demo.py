"""``uipe-merge demo``: the whole way, on a tiny pair made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uipe_merge.cli.console import Output


def demo(
    directory: Annotated[str, typer.Argument(help="Where to put the example.")] = "uipe-demo",
) -> None:
    """Make a tiny original and unlearned model, merge them, load the result, show the effect."""
    from uipe_merge import demo as example

    out = Output()
    root = Path(directory)
    out.note(f"training two tiny models in {root} (offline, a few seconds) …")
    result = example.run(root, out.progress())
    out.line("")
    out.table(
        ["model", "probability of the fact to forget", "of a related fact", "of a fact to keep"],
        [
            (row.name, f"{row.forget:.3f}", f"{row.related:.3f}", f"{row.retain:.3f}")
            for row in result.rows
        ],
    )
    out.line("")
    out.line("made with:")
    for command in result.commands:
        out.line(f"  {command}")
    out.line("check with:")
    out.line(f"  uipe-merge verify {result.output}")
