"""What a notebook imports, and all that the command line calls.

Heavy imports (numpy, torch) happen in the functions that need them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uipe_merge.drawing import Deep
from uipe_merge.errors import UsageError
from uipe_merge.progress import watcher
from uipe_merge.steering import PLAIN, Steering
from uipe_merge.verification import Verification, verify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from uipe_merge.checkpoint.decisions import Decision
    from uipe_merge.gridding import GridReport
    from uipe_merge.inspected import Inspection
    from uipe_merge.job import Job
    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Form, Recipe, Rounding
    from uipe_merge.report import MergeReport
    from uipe_merge.steering import Update

PathLike = str | os.PathLike[str]

__all__ = ["Deep", "Verification", "grid", "inspect", "make_recipe", "merge", "plan", "verify"]


def plan(
    original: PathLike,
    unlearned: PathLike,
    output: PathLike,
    *,
    alpha: float | None = None,
    alpha_rules: Mapping[str, float] | None = None,
    alpha_layers: Mapping[int, float] | None = None,
    alpha_gradient: Sequence[float] = (),
    dtype: str = "auto",
    max_shard_size: str | int | None = None,
    on_mismatch: Decision = "error",
    as_: Form = "model",
    rounding: Rounding = "nearest",
    seed: int = 0,
    steering: Steering = PLAIN,
    recipe: Recipe | PathLike | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
    device: str = "cpu",
) -> Job:
    """Read headers and decide everything; write nothing. The arguments are ``merge``'s.

    Raises:
        UipeMergeError: Whatever would keep ``merge`` from beginning, with its exit code.
    """
    from uipe_merge import job

    asked = make_recipe(
        alpha=alpha,
        alpha_rules=tuple((name, float(at)) for name, at in (alpha_rules or {}).items()),
        alpha_layers=tuple(
            (layer, float(at)) for layer, at in sorted((alpha_layers or {}).items())
        ),
        alpha_gradient=tuple(map(float, alpha_gradient)),
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_mismatch=on_mismatch,
        as_=as_,
        rounding=rounding,
        seed=seed,
        steering=steering,
        recipe=recipe,
    )
    return job.prepare(
        original,
        unlearned,
        output,
        asked,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
        device=device,
    )


def make_recipe(
    *,
    alpha: float | None,
    alpha_rules: tuple[tuple[str, float], ...] = (),
    alpha_layers: tuple[tuple[int, float], ...] = (),
    alpha_gradient: tuple[float, ...] = (),
    dtype: str = "auto",
    max_shard_size: str | int | None = None,
    on_mismatch: Decision = "error",
    as_: Form = "model",
    rounding: Rounding = "nearest",
    seed: int = 0,
    steering: Steering = PLAIN,
    recipe: Recipe | PathLike | None = None,
) -> Recipe:
    """Return the recipe that the arguments of ``merge`` make, or the one that a file holds.

    Raises:
        UsageError: Neither α nor a recipe was given, or both; or a file cannot be read.
        RecipeError: Something in it cannot be used.
        NumericError: An α is too large.
    """
    from uipe_merge.recipe import Recipe, parse_size

    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    rest = (
        dtype,
        limit,
        on_mismatch,
        alpha_rules,
        alpha_layers,
        alpha_gradient,
        as_,
        rounding,
        seed,
        steering,
    )
    if recipe is None:
        if alpha is None and steering.along:
            alpha = 1.0  # the related updates say how far
        if alpha is None:
            raise UsageError(
                "no alpha", remedy="give --alpha (2 adds twice the update), or --recipe"
            )
        return Recipe(float(alpha), *rest)
    if alpha is not None or rest != Recipe(0.0).rest():
        raise UsageError("a recipe says all of it", remedy="write the other options into it")
    if isinstance(recipe, Recipe):
        return recipe
    from uipe_merge.recipe_file import read_recipe

    return read_recipe(recipe)


def merge(
    original: PathLike,
    unlearned: PathLike,
    output: PathLike,
    *,
    alpha: float | None = None,
    alpha_rules: Mapping[str, float] | None = None,
    alpha_layers: Mapping[int, float] | None = None,
    alpha_gradient: Sequence[float] = (),
    dtype: str = "auto",
    max_shard_size: str | int | None = None,
    on_mismatch: Decision = "error",
    as_: Form = "model",
    rounding: Rounding = "nearest",
    seed: int = 0,
    steering: Steering = PLAIN,
    recipe: Recipe | PathLike | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool | Progress = True,
) -> MergeReport:
    """Write θᵤ + α·(θᵤ − θ₀) as a new model directory.

    The rule is UIPE's (arXiv 2503.04693). Both checkpoints are streamed; memory stays below
    512 MiB whatever their size. A run that was interrupted is continued by the same call.

    Args:
        original: The original checkpoint θ₀: a directory, ``ORG/NAME@REVISION`` on a hub,
            or the URL of a folder in an object store.
        unlearned: The unlearned checkpoint θᵤ, likewise; or an adapter.
        output: Directory to make; it appears whole, at the very end. Or the URL of a folder in
            an object store, which gets its manifest at the very end.
        alpha: α, dimensionless: 0 gives the unlearned model, −1 the original. Of every tensor
            that no rule and no layer decides. May be left out with ``along``: 1 then.
        alpha_rules: α by pattern of the tensor's name (``*``, ``?``, ``[…]``), in order: the
            first that matches decides.
        alpha_layers: α by layer, linear between the layers named and constant outside.
        alpha_gradient: Instead of layers: values spread evenly from the first to the last.
        dtype: ``auto`` keeps each tensor's dtype in the unlearned checkpoint (for FP8 with
            scales, the one that its config.json says); ``float32``, ``bfloat16`` or
            ``float16`` converts.
        max_shard_size: Largest output shard, in bytes or as ``5GB``; by default the shards
            of the unlearned checkpoint.
        on_mismatch: What becomes of tensors that are in one checkpoint only or have other
            shapes: ``error``, ``keep-unlearned``, ``keep-original``, or ``common-rows`` (the
            rows that both have are extrapolated, the others kept as they are).
        as_: ``model`` writes a whole model; ``adapter``, where ``unlearned`` is a LoRA adapter
            on ``original``, an adapter on it with B scaled by 1 + α.
        rounding: ``nearest``, or ``stochastic``: up or down by chance, so that in a 16-bit output
            the mean of many elements keeps the whole step. Copies and conversions, and outputs
            of other types, are rounded to nearest all the same.
        seed: Of that chance, of a random control and of the search for singular vectors; the same
            seed gives the same bytes.
        steering: What else than α·v goes into the step: related, protected and further updates,
            a part of the rank, a random control. Their checkpoints are read too.
        recipe: All of the above, from α on, as an object or in a file.
        overwrite: Replace a model that this tool wrote at ``output``.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file; nothing in
            the pickle is run.
        dequantize: Take block-scaled FP8 checkpoints; the output is not quantised.
        device: Where the singular vectors of a rank or an energy are found: ``cpu``, ``cuda``,
            ``cuda:1``. On another device they differ in their last bits.
        threads: Threads; by default two a processor, at most 8, and 8 over a network. Changes no
            byte.
        progress: Show a tqdm bar; or an object to be told of the progress.

    Returns:
        The report: norms, effective α, and the warnings the user should see.

    Raises:
        UipeMergeError: See ``uipe_merge.errors`` for the tree. Nothing is left at
            ``output``; only a partial directory that the same call goes on with.
    """
    from uipe_merge import running
    from uipe_merge.executors import make_executor
    from uipe_merge.output.filesystem import LocalFileSystem

    prepared = plan(
        original,
        unlearned,
        output,
        alpha=alpha,
        alpha_rules=alpha_rules,
        alpha_layers=alpha_layers,
        alpha_gradient=alpha_gradient,
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_mismatch=on_mismatch,
        as_=as_,
        rounding=rounding,
        seed=seed,
        steering=steering,
        recipe=recipe,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
        device=device,
    )
    executor = make_executor(threads, remote=prepared.remote)
    return running.run(prepared, executor, LocalFileSystem(), watcher(progress))


def grid(
    original: PathLike,
    unlearned: PathLike,
    output: PathLike,
    alphas: Sequence[float],
    *,
    recipe: Recipe | PathLike | None = None,
    references: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool | Progress = True,
) -> GridReport:
    """Write a model for every α into one directory; the checkpoints are read once for all.

    Each is byte for byte what ``merge`` would write. A grid that was interrupted, or that gets
    further α, is continued by the same call.

    Args:
        original: As for ``merge``.
        unlearned: As for ``merge``.
        output: The directory of the grid; ``grid.json`` in it lists the variants.
        alphas: α of each variant, in place of the recipe's own.
        recipe: All else, as an object or in a file. With a random control every α that is not 0
            gives two variants.
        references: Add the unlearned model, the original, and a random control.
        overwrite: As for ``merge``, of every variant.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
        device: As for ``merge``.
        threads: As for ``merge``.
        progress: As for ``merge``.

    Raises:
        UipeMergeError: As for ``merge``. What was published stays.
    """
    from uipe_merge import gridding, grids
    from uipe_merge.executors import make_executor
    from uipe_merge.inputs import open_inputs
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.recipe import Recipe

    asked = Recipe(1.0) if recipe is None else make_recipe(alpha=None, recipe=recipe)
    opened = open_inputs(
        original, unlearned, asked, allow_pickle=allow_pickle, dequantize=dequantize
    )
    planned = grids.plan_grid(
        opened, output, alphas, asked, references=references, overwrite=overwrite, device=device
    )
    gridding.require_grid_place(planned)
    outputs = len(planned.variants)
    executor = make_executor(threads, remote=planned.variants[0].job.remote, outputs=outputs)
    return gridding.run_grid(planned, executor, LocalFileSystem(), watcher(progress))


def inspect(
    original: PathLike,
    unlearned: PathLike,
    *,
    alphas: tuple[float, ...] | None = None,
    dtype: str = "auto",
    along: Sequence[Update] = (),
    away_from: Update | None = None,
    allow_pickle: bool = False,
    dequantize: bool = False,
    threads: int | None = None,
    progress: bool | Progress = True,
) -> Inspection:
    """Measure the update of every tensor in one streaming pass; write nothing.

    Mismatches are reported, not refused: the tensors that match are measured. With further
    updates, a second pass measures the cosines of v with them.

    Args:
        original: The original checkpoint θ₀: a directory, ``ORG/NAME@REVISION`` on a hub,
            or the URL of a folder in an object store.
        unlearned: The unlearned checkpoint θᵤ, likewise; or an adapter.
        alphas: The α whose rounding is tried; by default 0.1, 0.25, 0.5, 1 and 2.
        dtype: The output dtype the rounding is tried at, as for ``merge``.
        along: Related updates, to see where v goes along them.
        away_from: A protected update, or ``ORIGINAL_ITSELF`` for θ₀.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
        threads: As for ``merge``.
        progress: As for ``merge``.

    Raises:
        UipeMergeError: A checkpoint cannot be read, or holds values that are not finite.
    """
    from uipe_merge import inspection
    from uipe_merge.executors import make_executor
    from uipe_merge.opening import is_remote
    from uipe_merge.recipe import Recipe

    steering = Steering(along=tuple(along), away_from=away_from)
    arguments = (original, unlearned, *steering.checkpoints)
    watching = watcher(progress)
    try:
        return inspection.inspect_pair(
            original,
            unlearned,
            alphas or inspection.DEFAULT_ALPHAS,
            Recipe(1.0, dtype, steering=steering),
            make_executor(threads, remote=any(map(is_remote, arguments))),
            watching,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
        )
    finally:
        watching.close()
