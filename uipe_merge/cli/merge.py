"""``uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT``: the default command.

With one argument, ``uipe-merge CONFIG.yml -o OUT``, it runs a recipe of mergekit's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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
    RayAddress,
    Recipe,
    RoundingOption,
    Seed,
    SliceOption,
    Threads,
    UnlearnedIfAny,
    Verbose,
)
from uipe_merge.errors import UsageError
from uipe_merge.steering import GRANULARITY, MAX_ALPHA, MIN_COS

if TYPE_CHECKING:
    from uipe_merge.executors import Executor
    from uipe_merge.job import Job
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.slices import Slice
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
    from uipe_merge import api, job, mergekit_file
    from uipe_merge.recipe import parse_gradient, parse_layers, parse_rule
    from uipe_merge.recipe_file import write_recipe
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
    run = _Run(executor, ray_address, part, threads, dry_run)
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
        from uipe_merge.integrations import mergekit_writing

        out.text(mergekit_writing.write(original, unlearned, asked, mergekit_method, **allowed))
        return
    if output is None:
        raise UsageError("missing option --output", remedy="name what is to be made: -o OUT")
    if config is not None:
        original, unlearned, said = mergekit_file.read_config(config)
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
    run.carry_out(prepared, out)


class _Run:
    """Where a prepared merge is done, and how much of it."""

    def __init__(
        self,
        executor: str,
        ray_address: str | None,
        part: str | None,
        threads: int | None,
        dry_run: bool,
    ) -> None:
        """Check that it goes together.

        Raises:
            UsageError: It does not.
        """
        self._ray = executor == "ray"
        self._address, self._threads, self._dry_run = ray_address, threads, dry_run
        self._slice: Slice | None = None
        if part is not None:
            from uipe_merge.output.slices import parse_slice

            self._slice = parse_slice(part)
        if ray_address is not None and not self._ray:
            raise UsageError(
                "--ray-address without --executor ray", remedy="add it, or leave both out"
            )
        if self._slice is not None and self._ray:
            raise UsageError("--slice with --executor ray", remedy="choose one of the two")

    def carry_out(self, prepared: Job, out: Output) -> None:
        """Do it, or say what would be done."""
        from uipe_merge import running
        from uipe_merge.executors import make_executor
        from uipe_merge.output.filesystem import LocalFileSystem

        here = make_executor(None if self._ray else self._threads, remote=prepared.remote)
        filesystem, progress = LocalFileSystem(), out.progress()
        if self._dry_run:
            self._preview(prepared, here, filesystem, out)
        elif self._slice is not None:
            from uipe_merge import slicing

            report = slicing.run_slice(prepared, self._slice, here, filesystem, progress)
            show_slice(out, report, self._slice)
        elif self._ray:
            from uipe_merge.integrations.ray import cluster  # imports Ray

            with cluster(prepared, self._address, self._threads) as workers:
                made = running.run(prepared, here, filesystem, progress, workers)
            show_report(out, made)
        else:
            show_report(out, running.run(prepared, here, filesystem, progress))

    def _preview(self, prepared: Job, here: Executor, filesystem: FileSystem, out: Output) -> None:
        from uipe_merge import job
        from uipe_merge.settling import preview

        if self._slice is None:
            job.require_startable(prepared)
        else:
            from uipe_merge import slicing

            slicing.require_startable(prepared, self._slice, filesystem)
        groups = [] if prepared.download_bytes else preview(prepared, here, out.progress())
        show_plan(out, prepared, here.width, groups, self._slice)


def _config(original: str, unlearned: str | None) -> str | None:
    """Return the recipe of mergekit's that stands alone where the two models would."""
    from uipe_merge.mergekit_file import ENDINGS

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
