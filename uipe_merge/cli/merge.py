"""``uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT``: the default command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge import native
from uipe_merge.checkpoint.decisions import Decision
from uipe_merge.cli.console import Output, number, size
from uipe_merge.recipe import Form, Rounding

if TYPE_CHECKING:
    from uipe_merge.job import Job
    from uipe_merge.report import MergeReport


_LISTED_ALPHAS = 5


def merge(
    original: Annotated[
        str,
        typer.Argument(
            metavar="ORIGINAL",
            help="The original checkpoint θ₀: a directory, URL or ORG/NAME@REVISION.",
        ),
    ],
    unlearned: Annotated[
        str,
        typer.Argument(
            metavar="UNLEARNED", help="The unlearned checkpoint θᵤ, likewise; or an adapter."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory or URL to make.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha", "-a", help="α: 0 is the unlearned model, −1 the original, 2 adds 2·v."
        ),
    ] = None,
    alpha_rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=ALPHA", help="α of the tensors that match; the first rule decides."
        ),
    ] = None,
    alpha_layers: Annotated[
        str | None,
        typer.Option(metavar="LAYER=ALPHA,…", help="α by layer, linear between: 0=0,16=2,31=1."),
    ] = None,
    alpha_gradient: Annotated[
        str | None,
        typer.Option(metavar="ALPHA,…", help="α spread from the first layer to the last."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="All of it in a YAML, TOML or JSON file instead."),
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe as YAML and end.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto keeps each tensor's; or float32, bfloat16, float16.")
    ] = "auto",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Such as 5GB. [default: the unlearned checkpoint's own shards]"),
    ] = None,
    on_mismatch: Annotated[
        Decision,
        typer.Option(help="Tensors that one side lacks or has in another shape."),
    ] = "error",
    form: Annotated[
        Form, typer.Option("--as", help="model; or adapter, for a LoRA adapter as UNLEARNED.")
    ] = "model",
    rounding: Annotated[
        Rounding, typer.Option(help="stochastic keeps small steps in 16 bits, on average.")
    ] = "nearest",
    seed: Annotated[int, typer.Option(help="Of stochastic rounding.")] = 0,
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
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Take block-scaled FP8; the output is not quantised."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor.")] = False,
) -> None:
    """Write θᵤ + α·(θᵤ − θ₀) as a new model."""
    from uipe_merge import api, job, running
    from uipe_merge.executors import make_executor
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.recipe import parse_gradient, parse_layers, parse_rule
    from uipe_merge.recipe_file import write_recipe

    out = Output(quiet=quiet, verbose=verbose, as_json=as_json)
    asked = api.make_recipe(
        alpha=alpha,
        alpha_rules=tuple(map(parse_rule, alpha_rule or ())),
        alpha_layers=() if alpha_layers is None else parse_layers(alpha_layers),
        alpha_gradient=() if alpha_gradient is None else parse_gradient(alpha_gradient),
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_mismatch=on_mismatch,
        as_=form,
        rounding=rounding,
        seed=seed,
        recipe=recipe,
    )
    if print_recipe:
        for line in write_recipe(asked).splitlines():
            out.line(line)
        return
    prepared = job.prepare(
        original,
        unlearned,
        output,
        asked,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
    )
    executor = make_executor(threads, remote=prepared.remote)
    if dry_run:
        _show_plan(out, prepared, executor.width)
        job.require_startable(prepared)
        return
    report = running.run(prepared, executor, LocalFileSystem(), out.progress())
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
                "alphas": [
                    {"alpha": alpha, "tensors": count} for alpha, count in plan.alphas().items()
                ],
                "shards": len(plan.shards),
                "read_bytes": plan.read_bytes,
                "write_bytes": plan.write_bytes,
                "download_bytes": job.download_bytes,
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
    where = job.output if job.folder is None else job.named
    rows = [
        ("α", _alphas(plan.alphas())),
        ("output", f"{where} ({len(plan.shards)} shards, {len(job.sidecars)} other files)"),
        ("read", size(plan.read_bytes)),
        ("write", size(plan.write_bytes)),
        *([("download first", size(job.download_bytes))] if job.download_bytes else []),
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


def _alphas(counts: dict[float, int]) -> str:
    """Say which α how many tensors get: all values, or their range."""
    if len(counts) == 1:
        return number(next(iter(counts)), "g")
    if len(counts) > _LISTED_ALPHAS:
        return f"{min(counts):g} to {max(counts):g}, {len(counts)} values; -v lists them"
    return ", ".join(f"{alpha:g} for {count:,}" for alpha, count in sorted(counts.items()))


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
