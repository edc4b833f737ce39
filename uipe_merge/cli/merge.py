"""``uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT``: the default command."""

from __future__ import annotations

from typing import Annotated

import typer

from uipe_merge.checkpoint.decisions import Decision
from uipe_merge.cli.console import Output
from uipe_merge.cli.merge_shown import show_plan, show_report
from uipe_merge.recipe import Form, Rounding
from uipe_merge.steering import GRANULARITY, MAX_ALPHA, MIN_COS, Control, Granularity


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
    along: Annotated[
        list[str] | None,
        typer.Option(
            metavar="UPDATE",
            help="A related update, NEW or NEW@@OLD: α is multiplied by its projection on v.",
        ),
    ] = None,
    min_cos: Annotated[
        float, typer.Option(help="Related updates of a smaller cosine with v count nothing.")
    ] = MIN_COS,
    max_alpha: Annotated[
        float, typer.Option(help="The most that related updates multiply α by.")
    ] = MAX_ALPHA,
    away_from: Annotated[
        str | None,
        typer.Option(
            metavar="UPDATE|original", help="A protected update that the step must not undo."
        ),
    ] = None,
    always: Annotated[
        bool, typer.Option("--always", help="Keep off it even where the step does not undo it.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="Amplify only so many singular directions of each matrix.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="As many as hold this share of a matrix's ‖v‖².")
    ] = None,
    rank_all: Annotated[bool, typer.Option("--rank-all", help="Embeddings and head too.")] = False,
    control: Annotated[
        Control, typer.Option(help="random takes a random step of the same norm instead.")
    ] = "none",
    granularity: Annotated[
        Granularity, typer.Option(help="Over what inner products are taken.")
    ] = GRANULARITY,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="UPDATE=BETA", help="A further update times β; repeatable."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of stochastic rounding, of --control, --rank and --energy.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="cuda for singular vectors, and for what is not compiled.")
    ] = "cpu",
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
    from uipe_merge.settling import preview
    from uipe_merge.steering import Steering, parse_added, parse_protected, parse_update

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
    executor = make_executor(threads, remote=prepared.remote)
    if dry_run:
        job.require_startable(prepared)
        groups = [] if prepared.download_bytes else preview(prepared, executor, out.progress())
        show_plan(out, prepared, executor.width, groups)
        return
    report = running.run(prepared, executor, LocalFileSystem(), out.progress())
    show_report(out, report)
