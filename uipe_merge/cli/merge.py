"""``uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT``: the default command.

With one argument, ``uipe-merge CONFIG.yml -o OUT``, it runs a recipe of mergekit's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from uipe_merge.cli.console import Output
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
    GranularityOption,
    MaxAlpha,
    MaxShardSize,
    MergekitMethod,
    MinCos,
    OnMismatch,
    OriginalOrConfig,
    OutputIfAny,
    Overwrite,
    PrintMergekit,
    PrintRecipe,
    Quiet,
    Rank,
    RankAll,
    Recipe,
    RoundingOption,
    Seed,
    Threads,
    UnlearnedIfAny,
    Verbose,
)
from uipe_merge.errors import UsageError
from uipe_merge.steering import GRANULARITY, MAX_ALPHA, MIN_COS

if TYPE_CHECKING:
    from uipe_merge.recipe import Recipe as AskedRecipe


def merge(
    original: OriginalOrConfig,
    unlearned: UnlearnedIfAny = None,
    output: OutputIfAny = None,
    alpha: Alpha = None,
    alpha_rule: AlphaRule = None,
    alpha_layers: AlphaLayers = None,
    alpha_gradient: AlphaGradient = None,
    recipe: Recipe = None,
    print_recipe: PrintRecipe = False,
    print_mergekit: PrintMergekit = False,
    mergekit_method: MergekitMethod = "task_arithmetic",
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
    verbose: Verbose = False,
) -> None:
    """Write θᵤ + α·(θᵤ − θ₀) as a new model."""
    from uipe_merge import api, job, running
    from uipe_merge.executors import make_executor
    from uipe_merge.integrations import mergekit_reading, mergekit_writing
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.recipe import parse_gradient, parse_layers, parse_rule
    from uipe_merge.recipe_file import write_recipe
    from uipe_merge.settling import preview
    from uipe_merge.steering import Steering, parse_added, parse_protected, parse_update

    out = Output(quiet=quiet, verbose=verbose, as_json=as_json)
    config = _config(original, unlearned)
    if mergekit_method != "task_arithmetic" and not print_mergekit:
        raise UsageError(
            "--mergekit-method changes nothing without --print-mergekit", remedy="leave it out"
        )
    if config is not None:
        others = {
            "alpha": alpha is not None,
            "recipe": recipe is not None,
            "print-recipe": print_recipe,
            "print-mergekit": print_mergekit,
        }
        _refuse_decided([name for name, given in others.items() if given])
    asked = api.make_recipe(
        alpha=alpha if config is None else 0.0,
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
        out.text(write_recipe(asked))
        return
    allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
    if print_mergekit and unlearned is not None:
        out.text(mergekit_writing.write(original, unlearned, asked, mergekit_method, **allowed))
        return
    if output is None:
        raise UsageError("missing option --output", remedy="name what is to be made: -o OUT")
    if config is not None:
        original, unlearned, said = mergekit_reading.read_config(config)
        asked = _with_options(said, asked)
    assert unlearned is not None  # noqa: S101 - one argument alone is a recipe
    prepared = job.prepare(
        original,
        unlearned,
        output,
        asked,
        overwrite=overwrite,
        device=device,
        **allowed,
    )
    executor = make_executor(threads, remote=prepared.remote)
    if dry_run:
        job.require_startable(prepared)
        groups = [] if prepared.download_bytes else preview(prepared, executor, out.progress())
        show_plan(out, prepared, executor.width, groups)
        return
    report = running.run(prepared, executor, LocalFileSystem(), out.progress())
    show_report(out, report)


def _config(original: str, unlearned: str | None) -> str | None:
    """Return the recipe of mergekit's that stands alone where the two models would."""
    from uipe_merge.integrations.mergekit_reading import ENDINGS

    if unlearned is not None:
        return None
    if not original.lower().endswith(ENDINGS):
        raise UsageError("missing argument UNLEARNED", remedy="see uipe-merge merge --help")
    return original


def _with_options(said: AskedRecipe, asked: AskedRecipe) -> AskedRecipe:
    """Return a recipe of mergekit's with the options that it has no word for.

    Raises:
        UsageError: There are others.
    """
    free = ("max_shard_bytes", "on_mismatch", "rounding", "seed")
    plain = type(asked)(0.0)
    decided = replace(asked, **{name: getattr(plain, name) for name in free}).words()[2:]
    _refuse_decided([word[2:] for word in decided if word.startswith("--")])
    return replace(said, **{name: getattr(asked, name) for name in free})


def _refuse_decided(options: list[str]) -> None:
    if options:
        names = ", ".join(f"--{name}" for name in options)
        raise UsageError(
            f"a recipe of mergekit's decides about {names}",
            remedy="leave it out, or change the recipe",
        )
