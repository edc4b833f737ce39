"""``uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT``: the default command."""

from __future__ import annotations

from uipe_merge.cli.console import Output
from uipe_merge.cli.finish import show_slice
from uipe_merge.cli.merge_shown import show_plan, show_report
from uipe_merge.cli.options import (
    Add,
    AllowPickle,
    Along,
    Alpha,
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
    ExecutorOption,
    GranularityOption,
    MaxAlpha,
    MaxShardSize,
    MinCos,
    OnMismatch,
    Original,
    OutputPath,
    Overwrite,
    PrintRecipe,
    Quiet,
    Rank,
    RankAll,
    RayAddress,
    Recipe,
    RoundingOption,
    Seed,
    SliceOption,
    Threads,
    Unlearned,
    Verbose,
)
from uipe_merge.errors import UsageError
from uipe_merge.steering import GRANULARITY, MAX_ALPHA, MIN_COS


def merge(
    original: Original,
    unlearned: Unlearned,
    output: OutputPath,
    alpha: Alpha = None,
    alpha_rule: AlphaRule = None,
    alpha_layers: AlphaLayers = None,
    alpha_gradient: AlphaGradient = None,
    recipe: Recipe = None,
    print_recipe: PrintRecipe = False,
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
    executor: ExecutorOption = "threads",
    ray_address: RayAddress = None,
    part: SliceOption = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write θᵤ + α·(θᵤ − θ₀) as a new model."""
    from uipe_merge import api, job, running, slicing
    from uipe_merge.executors import make_executor
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.output.slices import parse_slice
    from uipe_merge.recipe import parse_gradient, parse_layers, parse_rule
    from uipe_merge.recipe_file import write_recipe
    from uipe_merge.settling import preview
    from uipe_merge.steering import Steering, parse_added, parse_protected, parse_update

    out = Output(quiet=quiet, verbose=verbose, as_json=as_json)
    one = None if part is None else parse_slice(part)
    if ray_address is not None and executor != "ray":
        raise UsageError("--ray-address without --executor ray", remedy="add it, or leave both out")
    if one is not None and executor == "ray":
        raise UsageError("--slice with --executor ray", remedy="choose one of the two")
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
        device=device,
    )
    here = make_executor(None if executor == "ray" else threads, remote=prepared.remote)
    filesystem = LocalFileSystem()
    if dry_run:
        if one is None:
            job.require_startable(prepared)
        else:
            slicing.require_startable(prepared, one, filesystem)
        groups = [] if prepared.download_bytes else preview(prepared, here, out.progress())
        show_plan(out, prepared, here.width, groups, one)
    elif one is not None:
        show_slice(out, slicing.run_slice(prepared, one, here, filesystem, out.progress()), one)
    elif executor == "ray":
        from uipe_merge.integrations.ray import cluster  # imports Ray

        with cluster(prepared, ray_address, threads) as workers:
            report = running.run(prepared, here, filesystem, out.progress(), workers)
        show_report(out, report)
    else:
        show_report(out, running.run(prepared, here, filesystem, out.progress()))
