"""``uipe-merge verify OUT``: hash a published model again."""

from __future__ import annotations

from typing import Annotated

import typer

from uipe_merge.cli.console import Output, size
from uipe_merge.errors import CorruptInputError, listed


def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Directory written by uipe-merge.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Hash every file again and compare with the manifest; exit 4 if anything differs."""
    from uipe_merge import api

    out = Output(quiet=quiet, as_json=as_json)
    found = api.verify(output, progress=out.progress())
    if out.as_json:
        out.data(
            {
                "ok": not found.problems,
                "files": found.files,
                "bytes": found.bytes,
                "problems": found.problems,
                "notes": found.notes,
            }
        )
    if found.problems:
        raise CorruptInputError(
            f"differs from its manifest: {listed(found.problems)}",
            file=output,
            remedy="run the merge again, or copy the model again",
        )
    for note in found.notes:
        out.note(note)
    if not (out.as_json or out.quiet):
        out.line(f"{found.files} files, {size(found.bytes)}: all as written")
