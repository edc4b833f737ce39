"""``uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT``: the default command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge import native
from uipe_merge.cli.console import Output, number, size

if TYPE_CHECKING:
    from uipe_merge.job import Job
    from uipe_merge.report import MergeReport


def merge(
    original: Annotated[
        str,
        typer.Argument(metavar="ORIGINAL", help="Directory or URL of the original checkpoint θ₀."),
    ],
    unlearned: Annotated[
        str,
        typer.Argument(
            metavar="UNLEARNED", help="Directory or URL of the unlearned checkpoint θᵤ."
        ),
    ],
    alpha: Annotated[
        float,
        typer.Option(
            "--alpha", "-a", help="α: 0 is the unlearned model, −1 the original, 2 adds 2·v."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory or URL to make.")],
    dtype: Annotated[
        str, typer.Option(help="auto keeps each tensor's; or float32, bfloat16, float16.")
    ] = "auto",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Such as 5GB. [default: the unlearned checkpoint's own shards]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads. [default: two a core, at most 8]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model written by uipe-merge.")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pytorch_model*.bin; nothing in it is run."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor.")] = False,
) -> None:
    """Write θᵤ + α·(θᵤ − θ₀) as a new model."""
    from uipe_merge import api, job
    from uipe_merge.executors import make_executor
    from uipe_merge.output.filesystem import LocalFileSystem

    out = Output(quiet=quiet, verbose=verbose, as_json=as_json)
    prepared = api.plan(
        original,
        unlearned,
        output,
        alpha=alpha,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )
    executor = make_executor(threads, remote=prepared.remote)
    if dry_run:
        _show_plan(out, prepared, executor.width)
        job.require_startable(prepared)
        return
    report = job.run(prepared, executor, LocalFileSystem(), out.progress())
    _show_report(out, report)


def _show_plan(out: Output, job: Job, threads: int) -> None:
    plan = job.plan
    operations = plan.operations()
    peak = plan.peak_memory(
        threads, torch=not native.suffices(plan), block=job.block, remote=job.remote
    )
    if out.as_json:
        out.data(
            {
                "operations": {
                    name: {"tensors": count, "bytes": nbytes}
                    for name, (count, nbytes) in operations.items()
                },
                "shards": len(plan.shards),
                "read_bytes": plan.read_bytes,
                "write_bytes": plan.write_bytes,
                "sidecars": [sidecar.name for sidecar in job.sidecars],
                "free_bytes": job.space.free,
                "peak_memory_bytes": peak,
                "threads": threads,
                "compiled": native.COMPILED,
                "warnings": plan.warnings,
            }
        )
        return
    out.table(
        ["operation", "tensors", "bytes"],
        [(name, f"{count:,}", size(nbytes)) for name, (count, nbytes) in operations.items()],
    )
    out.line("")
    free = "unknown" if job.space.free is None else size(job.space.free)
    rows = [
        (
            "output",
            f"{job.output if job.folder is None else job.named} ({len(plan.shards)} shards, {len(job.sidecars)} other files)",
        ),
        ("read", size(plan.read_bytes)),
        ("write", size(plan.write_bytes)),
        ("free disk", free),
        ("peak memory", f"{size(peak)} with {threads} threads"),
        ("arithmetic", "compiled" if native.COMPILED else "torch; slower, the same bytes"),
    ]
    out.fields(rows)
    if out.verbose:
        out.line("")
        out.table(
            ["tensor", "operation", "α", "dtype", "bytes"],
            [
                (
                    step.name,
                    step.operation,
                    number(step.alpha, "g"),
                    step.dtype.name,
                    size(step.nbytes),
                )
                for step in plan.steps
            ],
        )
    out.warn(plan.warnings)


def _show_report(out: Output, report: MergeReport) -> None:
    if out.as_json:
        out.data(
            {
                "output": str(report.output),
                "summary": report.summary.as_dict(),
                "written_bytes": report.written,
                "seconds": report.seconds,
                "resumed_shards": report.resumed,
                "warnings": report.warnings,
                **({"tensors": report.tensors} if out.verbose else {}),
            }
        )
        return
    if not out.quiet:
        if out.verbose:
            out.table(
                ["tensor", "operation", "‖v‖", "‖v‖/‖θᵤ‖", "effective α", "changed"],
                [_tensor_row(name, record) for name, record in report.tensors.items()],
            )
            out.line("")
        rows = [("output", str(report.output)), *report.summary.rows()]
        rows.append(("written", f"{size(report.written)} in {report.seconds:.1f} s"))
        if report.resumed:
            rows.append(("shards kept from an interrupted run", f"{report.resumed:,}"))
        out.fields(rows)
    out.warn(report.warnings)


def _tensor_row(name: str, record: dict[str, object]) -> tuple[str, ...]:
    def shown(field: str, form: str = ".3g") -> str:
        value = record.get(field)
        return number(value if isinstance(value, float) else None, form)

    return (
        name,
        str(record["operation"]),
        shown("norm"),
        shown("ratio"),
        shown("effective_alpha", ".4g"),
        shown("share_changed", ".2%"),
    )
