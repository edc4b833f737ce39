"""``uipe-merge verify OUT``: hash a published model again, and compute parts of it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli import options
from uipe_merge.cli.console import Output, size
from uipe_merge.errors import CorruptInputError, UsageError, listed

if TYPE_CHECKING:
    from uipe_merge.api import Deep
    from uipe_merge.recomputing import Recomputed


def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Directory written by uipe-merge.")],
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Compute blocks of it again from the inputs, and compare."),
    ] = False,
    sample: Annotated[
        float | None, typer.Option(help="With --deep: share of the blocks. [default: 0.1]")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="With --deep: number of blocks instead.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --deep: which blocks are drawn.")] = None,
    original: Annotated[
        str | None, typer.Option(help="With --deep: where the original is now, if it moved.")
    ] = None,
    unlearned: Annotated[
        str | None, typer.Option(help="With --deep: the same of the unlearned checkpoint.")
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NOW", help="With --deep: the same of further checkpoints."),
    ] = None,
    allow_pickle: options.AllowPickle = False,
    device: Annotated[
        str | None, typer.Option(help="With --deep: where singular vectors were found.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Hash every file again and compare with the manifest; exit 4 if anything differs.

    With --deep blocks are computed again from the inputs that the manifest names, too.
    """
    from uipe_merge import api

    out = Output(quiet=quiet, as_json=as_json)
    given: dict[str, object] = {
        "sample": sample,
        "blocks": blocks,
        "seed": seed,
        "original": original,
        "unlearned": unlearned,
        "moved": dict(map(_pair, moved)) if moved else None,
        "allow_pickle": allow_pickle or None,
        "device": device,
        "threads": threads,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    found = api.verify(output, deep=_deep(deep, asked), progress=out.progress())
    again = found.recomputed
    if out.as_json:
        out.data(
            {
                "ok": not found.problems,
                "files": found.files,
                "bytes": found.bytes,
                "problems": found.problems,
                "notes": found.notes,
                **({} if again is None else {"recomputed": _numbers(again)}),
            }
        )
    if found.problems:
        raise CorruptInputError(
            f"differs from its manifest: {listed(found.problems)}",
            file=output,
            remedy="run the merge again, or copy the model again"
            + ("; or an input is no longer what it was" if again and again.problems else ""),
        )
    for note in found.notes:
        out.note(note)
    if not (out.as_json or out.quiet):
        out.line(f"{found.files} files, {size(found.bytes)}: all as written")
        if again is not None:
            out.line(
                f"{again.blocks} of {again.of_blocks} blocks, of {again.tensors} tensors, "
                f"{size(again.bytes)}: bit for bit what {again.original} and {again.unlearned} "
                "make"
            )


def _deep(asked_for: bool, asked: dict[str, object]) -> bool | Deep:
    from uipe_merge.api import Deep

    if asked and not asked_for:
        option = next(iter(asked)).replace("_", "-")
        raise UsageError(f"--{option} says nothing without --deep", remedy="add --deep")
    if {"sample", "blocks"} <= asked.keys():
        raise UsageError("both --sample and --blocks", remedy="give one of them")
    return Deep(**asked) if asked_for else False  # type: ignore[arg-type] # checked by typer


def _pair(text: str) -> tuple[str, str]:
    name, _, now = text.partition("=")
    if name and now:
        return name, now
    raise UsageError(f"'{text}' is not NAME=NOW", remedy="write it like related=/data/related")


def _numbers(again: Recomputed) -> dict[str, object]:
    return {name: value for name, value in again._asdict().items() if name != "problems"}
