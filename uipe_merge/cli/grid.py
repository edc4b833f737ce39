"""``uipe-merge grid``: a model for every α, the checkpoints read once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number, size
from uipe_merge.cli.options import (
    Add,
    AllowPickle,
    Along,
    AlphaGradient,
    AlphaLayers,
    AlphaRule,
    Always,
    As,
    AsJson,
    AwayFrom,
    ControlOption,
    Dequantize,
    Device,
    DryRun,
    Dtype,
    Energy,
    GranularityOption,
    MaxAlpha,
    MaxShardSize,
    MinCos,
    OnMismatch,
    Original,
    Overwrite,
    Quiet,
    Rank,
    RankAll,
    RoundingOption,
    Seed,
    Threads,
    Unlearned,
)
from uipe_merge.errors import UsageError
from uipe_merge.steering import GRANULARITY, MAX_ALPHA, MIN_COS

if TYPE_CHECKING:
    from uipe_merge.gridding import GridReport
    from uipe_merge.grids import Grid


def grid(
    original: Original,
    unlearned: Unlearned,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory of the grid.")],
    alphas: Annotated[
        str, typer.Option("--alphas", "-a", help="0,0.25,0.5,1,2 or 0:4:0.5, whose end counts.")
    ],
    with_references: Annotated[
        bool,
        typer.Option(
            "--with-references",
            help="The unlearned model, the original and a random control besides.",
        ),
    ] = False,
    harness: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="HARNESS",
            help="Write evaluate.sh for open-unlearning, muse, wmdp, lm-eval, "
            "or 'a command with {model} {out}'.",
        ),
    ] = None,
    retain_logs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Logs of a retain-only model, for open-unlearning."),
    ] = None,
    alpha_rule: AlphaRule = None,
    alpha_layers: AlphaLayers = None,
    alpha_gradient: AlphaGradient = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = None,
    on_mismatch: OnMismatch = "error",
    form: As = "model",
    rounding: RoundingOption = "nearest",
    along: Along = None,
    min_cos: MinCos = MIN_COS,
    max_alpha: MaxAlpha = MAX_ALPHA,
    away_from: AwayFrom = None,
    always: Always = False,
    rank: Rank = None,
    energy: Energy = None,
    rank_all: RankAll = False,
    control: ControlOption = "none",
    granularity: GranularityOption = GRANULARITY,
    add: Add = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for every α, each as merge would; ORIGINAL and UNLEARNED are read once."""
    from uipe_merge import api, gridding, grids
    from uipe_merge.executors import make_executor
    from uipe_merge.harnesses import evaluate_script, slurm_script
    from uipe_merge.inputs import open_inputs
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.recipe import parse_gradient, parse_layers, parse_rule
    from uipe_merge.steering import Steering, parse_added, parse_protected, parse_update

    out = Output(quiet=quiet, as_json=as_json)
    recipe = api.make_recipe(
        alpha=1.0,
        alpha_rules=tuple(map(parse_rule, alpha_rule or ())),
        alpha_layers=() if alpha_layers is None else parse_layers(alpha_layers),
        alpha_gradient=() if alpha_gradient is None else parse_gradient(alpha_gradient),
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_mismatch=on_mismatch,
        as_=form,
        rounding=rounding,
        seed=seed,
        steering=Steering(
            along=tuple(map(parse_update, along or ())),
            min_cos=min_cos,
            max_alpha=max_alpha,
            away_from=None if away_from is None else parse_protected(away_from),
            always=always,
            rank=rank,
            energy=energy,
            rank_all=rank_all,
            control=control,
            granularity=granularity,
            add=tuple(map(parse_added, add or ())),
        ),
    )
    values = grids.parse_alphas(alphas)
    opened = open_inputs(
        original, unlearned, recipe, allow_pickle=allow_pickle, dequantize=dequantize
    )
    planned = grids.plan_grid(
        opened,
        output,
        values,
        recipe,
        references=with_references,
        overwrite=overwrite,
        device=device,
    )
    scripts = {}
    if harness is not None:
        scripts["evaluate.sh"] = evaluate_script(harness, retain_logs)
        scripts["evaluate.slurm"] = slurm_script(len(planned.variants))
    elif retain_logs is not None:
        raise UsageError("--retain-logs says nothing without --eval", remedy="leave it out")
    gridding.require_grid_place(planned)
    if dry_run:
        gridding.require_grid_room(planned)
        _show_plan(out, planned)
        return
    executor = make_executor(
        threads, remote=planned.variants[0].job.remote, outputs=len(planned.variants)
    )
    filesystem = LocalFileSystem()
    report = gridding.run_grid(planned, executor, filesystem, out.progress())
    gridding.write_scripts(planned, filesystem, scripts)
    _show(out, planned, report, scripts)


def _show_plan(out: Output, planned: Grid) -> None:
    rows = [
        (each.name, each.family, each.alpha, each.job.plan.write_bytes) for each in planned.variants
    ]
    total = sum(nbytes for *_, nbytes in rows)
    free = planned.variants[0].job.space.free
    if out.as_json:
        fields = ("name", "family", "alpha", "write_bytes")
        variants = [dict(zip(fields, row, strict=True)) for row in rows]
        out.data({"variants": variants, "write_bytes": total, "free_bytes": free})
        return
    out.table(
        ["variant", "family", "α", "bytes"],
        [(name, family, f"{alpha:g}", size(nbytes)) for name, family, alpha, nbytes in rows],
    )
    out.line("")
    read = max(each.job.plan.read_bytes for each in planned.variants)
    out.fields(
        [
            ("read", size(read)),
            ("write", size(total)),
            ("free disk", "unknown" if free is None else size(free)),
        ]
    )
    out.warn(planned.variants[0].job.plan.warnings)


def _show(out: Output, planned: Grid, report: GridReport, scripts: dict[str, str]) -> None:
    if out.as_json:
        out.data(
            {
                "output": str(planned.directory),
                "variants": {
                    name: {"summary": each.summary.as_dict(), "warnings": each.warnings}
                    for name, each in report.reports.items()
                },
                "kept": list(report.kept),
                "seconds": report.seconds,
            }
        )
        return
    rows = []
    for variant in planned.variants:
        found = report.reports.get(variant.name)
        summary = found.summary.as_dict() if found else report.kept[variant.name]
        rows.append(
            (
                variant.name,
                variant.family,
                f"{variant.alpha:g}",
                _number(summary.get("effective_alpha"), ".4g"),
                _number(summary.get("share_kept"), ".2%"),
                "made" if found else "was there",
            )
        )
    if not out.quiet:
        columns = ["variant", "family", "α", "effective α", "step kept", ""]
        out.table(columns, rows)
        out.line("")
        written = sum(each.written for each in report.reports.values())
        out.fields(
            [
                ("output", str(planned.directory)),
                ("written", f"{size(written)} in {report.seconds:.1f} s"),
                *([("next", f"sh {planned.named}/evaluate.sh")] if scripts else []),
            ]
        )
    seen: set[str] = set()
    for name, each in report.reports.items():
        fresh = [text for text in each.warnings if text not in seen]
        out.warn(f"{name}: {text}" for text in fresh)
        seen.update(fresh)


def _number(value: object, form: str) -> str:
    return number(value if isinstance(value, float) else None, form)
