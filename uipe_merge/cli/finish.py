"""``uipe-merge finish OUT``, and what a slice of a merge prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, size
from uipe_merge.cli.merge_shown import show_report

if TYPE_CHECKING:
    from uipe_merge.output.slices import Slice
    from uipe_merge.slicing import SliceReport

_LISTED = 10


def finish(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The output of a --slice run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Publish what the slices of a merge have made; exit 8 where some of it is missing."""
    from uipe_merge import slicing
    from uipe_merge.executors import make_executor
    from uipe_merge.output.filesystem import LocalFileSystem

    out = Output(quiet=quiet, as_json=as_json)
    filesystem = LocalFileSystem()
    begun = slicing.find(output, filesystem)
    if begun is None:
        out.note(f"{output} is published already")
        return
    executor = make_executor(None, remote=begun.job.remote)
    report = slicing.finish(begun.job, begun.total, executor, filesystem, out.progress())
    if report.missing:
        raise slicing.missing_error(report)
    show_slice(out, report, None)


def show_slice(out: Output, report: SliceReport, part: Slice | None) -> None:
    """Print what came of a slice; of the one that published, the report of the merge."""
    if report.published is not None:
        show_report(out, report.published)
        return
    if out.as_json:
        out.data(
            {
                "output": str(report.output),
                "slice": part and part.text,
                "shards": report.shards,
                "kept_shards": report.kept,
                "written_bytes": report.written,
                "seconds": report.seconds,
                "missing": report.missing,
            }
        )
        return
    if not out.quiet and part is not None:
        kept = f", {report.kept} kept from an earlier attempt" if report.kept else ""
        made = f"{report.shards} shards, {size(report.written)} in {report.seconds:.1f} s"
        out.fields([("slice", part.text), ("made", made + kept)])
    if report.missing:
        names = list(report.missing)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        number = sum(report.missing.values())
        which = f"{', '.join(names[:_LISTED])}{more}"
        out.note(f"not published yet: {number} shards are missing, of slices {which}")
    else:
        out.note("published, or about to be, by another process")
