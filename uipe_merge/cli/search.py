"""``uipe-merge search``: α searched for, by questions or by a command, and its model written."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number, size
from uipe_merge.cli.evaluation_options import (
    FORGET,
    RETAIN,
    BatchSize,
    Device,
    DeviceOption,
    Limit,
    MaxNewTokens,
    RealAuthors,
    Reference,
    RetainLogs,
    Template,
    WorldFacts,
    prompt,
)
from uipe_merge.cli.options import (
    AllowPickle,
    AsJson,
    Dequantize,
    Dtype,
    Original,
    Overwrite,
    Quiet,
    RoundingOption,
    Threads,
    Unlearned,
)
from uipe_merge.errors import UsageError
from uipe_merge.study.examination import BATCH_SIZE, MAX_NEW_TOKENS
from uipe_merge.study.sampling import Sampler
from uipe_merge.study.search import TRIALS

if TYPE_CHECKING:
    from uipe_merge.in_memory import QuestionEvaluator
    from uipe_merge.searching import SearchReport
    from uipe_merge.study.commands import CommandEvaluator


def search(
    original: Original,
    unlearned: Unlearned,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory to make, of the best model.")
    ],
    forget: Annotated[str | None, FORGET] = None,
    retain: Annotated[str | None, RETAIN] = None,
    real_authors: RealAuthors = None,
    world_facts: WorldFacts = None,
    reference: Reference = None,
    retain_logs: RetainLogs = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--eval", metavar="COMMAND", help="What evaluates instead: 'a command {model} {out}'."
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE:KEY", help="A number in JSON that it writes in {out}; repeatable."
        ),
    ] = None,
    maximize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The score to look for. [default, of questions: forget_quality]"
        ),
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same, where less of it is better.")
    ] = None,
    subject_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONSTRAINT",
            help="What to keep, as 'utility>=0.95*unlearned'; repeatable. "
            "[default, of questions: model_utility>=0.95*unlearned]",
        ),
    ] = None,
    alphas: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Between what α is searched for.")
    ] = "0:4",
    trials: Annotated[int, typer.Option(min=1, help="Evaluations at most.")] = TRIALS,
    per_layer_groups: Annotated[
        int | None,
        typer.Option(
            min=2, help="An α each at so many layers from first to last, linear between; else 0."
        ),
    ] = None,
    sampler: Annotated[
        Sampler, typer.Option(help="What searches for several α; needs Optuna.")
    ] = "tpe",
    seed: Annotated[
        int, typer.Option(min=0, help="Of the sampler, and of stochastic rounding.")
    ] = 0,
    work: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where trials and models being tried are. [default: OUTPUT.search]"
        ),
    ] = None,
    batch_size: BatchSize = BATCH_SIZE,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    limit: Limit = None,
    device: DeviceOption = Device.AUTO,
    template: Template = None,
    dtype: Dtype = "auto",
    rounding: RoundingOption = "nearest",
    threads: Threads = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    dequantize: Dequantize = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search for the α with the best score among those that keep enough; write that model.

    With --forget and --retain, one model in memory is moved from α to α and asked these questions
    as evaluate asks them. With --eval and --score, a model is written for every α, and COMMAND run
    on it. The same command goes on where one was stopped, and with more trials where one ended.
    """
    from uipe_merge import searching
    from uipe_merge.api import make_recipe
    from uipe_merge.study import aims

    options = {
        "--forget": forget,
        "--retain": retain,
        "--real-authors": real_authors,
        "--world-facts": world_facts,
        "--reference": reference,
        "--retain-logs": retain_logs,
        "--limit": limit,
        "--template": template,
        "--batch-size": batch_size if batch_size != BATCH_SIZE else None,
        "--max-new-tokens": max_new_tokens if max_new_tokens != MAX_NEW_TOKENS else None,
        "--device": device if device is not Device.AUTO else None,
    }
    _require_one_way(
        [name for name, value in options.items() if value is not None],
        [name for name, value in (("--eval", command), ("--score", score)) if value],
    )
    out = Output(quiet=quiet, as_json=as_json)
    drawn = seed if rounding == "stochastic" else 0  # else merge at this α is told no seed
    planned = searching.plan_search(
        original,
        unlearned,
        output,
        make_recipe(alpha=0.0, dtype=dtype, rounding=rounding, seed=drawn),
        alphas=_range(alphas),
        per_layer_groups=per_layer_groups,
        work=work,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
    )
    evaluator: CommandEvaluator | QuestionEvaluator
    if command is not None:
        from uipe_merge.study.commands import CommandEvaluator

        sought = aims.aim(maximize, minimize, subject_to or [])
        evaluator = CommandEvaluator(
            original,
            unlearned,
            command,
            score or [],
            workplace=planned.models,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
            threads=threads,
        )
        sought.require(evaluator.score_names, remedy="give --score {}=FILE:KEY")
    else:
        from uipe_merge.in_memory import QuestionEvaluator
        from uipe_merge.study.examination import make_examination
        from uipe_merge.study.reference import make_reference

        compared = make_reference(reference, retain_logs)
        sought = aims.aim_of_questions(
            maximize, minimize, subject_to or [], compared=compared is not None
        )
        asked = make_examination(
            forget=forget or "",
            retain=retain or "",
            real_authors=real_authors,
            world_facts=world_facts,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device.value,
            template=prompt(template),
        )
        bar = partial(out.counting, transient=True)  # a line about every trial stays
        evaluator = QuestionEvaluator(planned, asked, compared, bar, threads)
        sought.require(evaluator.score_names)
    report = searching.run_search(
        planned,
        evaluator,
        sought,
        trials=trials,
        sampler=sampler,
        seed=seed,
        threads=threads,
        tell=out.note,
        progress=out.progress,
    )
    _show(out, report, sought.metrics)
    out.warn(report.warnings)


def _require_one_way(questions: list[str], command: list[str]) -> None:
    """Refuse options of both evaluators, of none, or of half of one."""
    if questions and command:
        raise UsageError(
            f"{questions[0]} and {command[0]} are two ways to evaluate",
            remedy="give --forget and --retain, or --eval and --score",
        )
    needed = ["--eval", "--score"] if command else ["--forget", "--retain"]
    if missing := [name for name in needed if name not in questions + command]:
        raise UsageError(
            f"nothing gives the scores without {' and '.join(missing)}",
            remedy="give --forget and --retain, or --eval and --score",
        )


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise UsageError(
            f"'{text:.100}' is no range of α",
            remedy="write --alphas 0:4, the least and the largest",
        ) from None


def _show(out: Output, report: SearchReport, wanted: list[str]) -> None:
    if out.as_json:
        out.data(report.document)
        return
    if out.quiet:
        if report.best is None:  # the exit code does not say it
            out.line(report.reason)
        return
    from uipe_merge.study.aims import shown

    found = list(dict.fromkeys(name for trial in report.trials for name in trial.scores))
    metrics = shown(wanted, found)
    names = ["α"] if report.names == ["alpha"] else [f"α of {name}" for name in report.names]
    out.table(
        ["trial", *names, *metrics, ""],
        [
            (
                str(turn),
                *(number(alpha, "g") for alpha in trial.point.alphas),
                *(number(trial.scores.get(metric), ".4g") for metric in metrics),
                "→" if trial is report.best else "" if trial.problem is None else "problem",
            )
            for turn, trial in enumerate(report.trials, 1)
        ],
    )
    out.line("")
    if len(found) > len(metrics):
        out.line(f"{len(found) - len(metrics)} more scores: --json and the study have them")
    for turn, trial in enumerate(report.trials, 1):
        if trial.problem is not None:
            out.line(f"trial {turn}: {trial.problem}")
    out.line(report.reason)
    rows = [("study", os.fspath(report.study))]
    if report.output is not None:
        written = sum(each.stat().st_size for each in report.output.iterdir() if each.is_file())
        rows = [
            ("output", f"{report.output} ({size(written)})"),
            ("the same", report.command or ""),
            *rows,
        ]
    out.fields(rows)
