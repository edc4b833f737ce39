"""``uipe-merge search``: α searched for with a command that evaluates, and its model written."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number, size
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
from uipe_merge.errors import UsageError, listed
from uipe_merge.study.sampling import Sampler
from uipe_merge.study.search import TRIALS

if TYPE_CHECKING:
    from uipe_merge.inputs import Inputs
    from uipe_merge.job import Job
    from uipe_merge.study.commands import CommandEvaluator
    from uipe_merge.study.constraints import Constraint
    from uipe_merge.study.search import Point, SearchResult, Space, Trial


def search(
    original: Original,
    unlearned: Unlearned,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory to make, of the best model.")
    ],
    command: Annotated[
        str,
        typer.Option("--eval", metavar="COMMAND", help="Evaluates: 'a command {model} {out}'."),
    ],
    score: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE:KEY", help="A number in JSON that it writes in {out}; repeatable."
        ),
    ],
    maximize: Annotated[
        str | None, typer.Option(metavar="NAME", help="The score to look for.")
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same, where less of it is better.")
    ] = None,
    subject_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONSTRAINT", help="What to keep, as 'utility>=0.95*unlearned'; repeatable."
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

    A model is made for every α in turn, and COMMAND run on it. The same command goes on where one
    was stopped, and with more trials where one ended.
    """
    from uipe_merge.api import make_recipe
    from uipe_merge.inputs import open_inputs
    from uipe_merge.job import plan_job, prepare, run_digest
    from uipe_merge.output.lock import hold
    from uipe_merge.study import search as study
    from uipe_merge.study import workplace
    from uipe_merge.study.commands import CommandEvaluator
    from uipe_merge.study.constraints import parse_constraint

    out = Output(quiet=quiet, as_json=as_json)
    if (maximize is None) == (minimize is None):
        raise UsageError("what is looked for is one score", remedy="give --maximize or --minimize")
    constraints = list(map(parse_constraint, subject_to or ()))
    drawn = seed if rounding == "stochastic" else 0  # else merge at this α is told no seed
    base = make_recipe(alpha=0.0, dtype=dtype, rounding=rounding, seed=drawn)
    low, high = _range(alphas)
    inputs = open_inputs(
        original, unlearned, base, allow_pickle=allow_pickle, dequantize=dequantize
    )
    layers = () if per_layer_groups is None else _spread(inputs, per_layer_groups)
    space = study.Space(low, high, layers=layers, base=base)
    recipe = space.point((low,) * len(space.names)).recipe
    planned = plan_job(inputs, output, recipe, overwrite=overwrite)
    place = workplace.choose(work, planned, inputs)
    evaluator = CommandEvaluator(
        original,
        unlearned,
        command,
        score,
        workplace=place / workplace.MODELS,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
        threads=threads,
    )
    objective = _known(evaluator, minimize or maximize or "", constraints)
    workplace.require_replaceable(planned, place)
    with hold(place):
        workplace.tidy(place)
        result = study.search(
            _Watched(evaluator, planned, out),
            space,
            maximise=objective,
            subject_to=constraints,
            minimise=minimize is not None,
            trials=trials,
            sampler=sampler,
            seed=seed,
            directory=place,
        )
        workplace.tidy(place)
        found = {
            "schema": 1,
            "original": planned.arguments[0],
            "unlearned": planned.arguments[1],
            "evaluator": {"command": command, "scores": list(score)},
            "space": {"names": space.names, "low": low, "high": high},
            "objective": {
                "metric": objective,
                "direction": "maximize" if minimize is None else "minimize",
            },
            "constraints": list(map(str, constraints)),
            "trials": [_plain(trial) for trial in result.trials],
            "chosen": None,
            "reason": result.reason,
        }
        if result.best is None:
            workplace.write_study(place, found)
            _show(out, space, result, found, place)
            return
        job = prepare(
            original,
            unlearned,
            output,
            result.best.point.recipe,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
        )
        chosen = {**_plain(result.best), "command": job.command, "run": run_digest(job)}
        found |= {"output": str(job.output), "chosen": chosen}
        workplace.write_study(place, found)  # by which the model is known again, whenever this ends
        warnings = workplace.write_model(job, threads, out.progress())
    _show(out, space, result, found, place)
    out.warn(warnings)


# ------------------------------------------------------------------- before anything is made


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise UsageError(
            f"'{text:.100}' is no range of α",
            remedy="write --alphas 0:4, the least and the largest",
        ) from None


def _spread(inputs: Inputs, count: int) -> tuple[int, ...]:
    """Return so many layers, from the first to the last."""
    from uipe_merge.naming import place

    found = [place(name).layer for name in inputs.pair.original.tensors]
    last = max((layer for layer in found if layer is not None), default=-1)
    if count > last + 1:
        raise UsageError(
            f"the model has {last + 1} layers, which make no {count} groups",
            remedy="give a smaller --per-layer-groups, or leave it out",
        )
    return tuple(round(last * turn / (count - 1)) for turn in range(count))


def _known(evaluator: CommandEvaluator, asked: str, constraints: list[Constraint]) -> str:
    """Return the objective's name.

    Raises:
        UsageError: It or a constraint's is no score that is read, or two scores share a name.
    """
    from uipe_merge.study.commands import parse_score
    from uipe_merge.study.layouts import normalised

    names = [parse_score(text).name for text in evaluator.scores]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two scores are called '{twice[0]}'", remedy="write NAME=FILE:KEY")
    objective = normalised(asked)
    for metric in (objective, *(each.metric for each in constraints)):
        if metric not in names:
            raise UsageError(
                f"no score is called '{metric}', but {listed(names)}",
                remedy=f"give --score {metric}=FILE:KEY",
            )
    return objective


# ------------------------------------------------------------------- while it is searched


@dataclass(frozen=True, slots=True)
class _Watched:
    """An evaluator that says what it found, and knows checkpoints by more than their names."""

    evaluator: CommandEvaluator
    planned: Job
    out: Output

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others."""
        plan = self.planned.plan
        sides = {"original": plan.original, "unlearned": plan.unlearned}
        return {**self.evaluator.identity, **sides}

    def __call__(self, point: Point) -> dict[str, float]:
        """Return the scores of one model."""
        from uipe_merge.study.trials import EvaluationError

        Path(self.evaluator.workplace or "").mkdir(exist_ok=True)
        try:
            scores = self.evaluator(point)
        except EvaluationError as error:
            self.out.note(f"{point}: {error}")
            raise
        found = (f"{name} {value:.4g}" for name, value in scores.items())
        self.out.note(f"{point}: {', '.join(found)}")
        return scores


# ------------------------------------------------------------------- when it was found


def _plain(trial: Trial) -> dict[str, object]:
    scores = {name: value if math.isfinite(value) else None for name, value in trial.scores.items()}
    return {**trial.document(), "scores": scores}


def _show(
    out: Output, space: Space, result: SearchResult, found: dict[str, object], place: Path
) -> None:
    if out.as_json:
        out.data(found)
        return
    if out.quiet:
        if result.best is None:  # the exit code does not say it
            out.line(result.reason)
        return
    from uipe_merge.study.workplace import STUDY_NAME

    metrics = list(dict.fromkeys(name for trial in result.trials for name in trial.scores))
    names = ["α"] if space.names == ["alpha"] else [f"α of {name}" for name in space.names]
    out.table(
        ["trial", *names, *metrics, ""],
        [
            (
                str(turn),
                *(number(alpha, "g") for alpha in trial.point.alphas),
                *(number(trial.scores.get(metric), ".4g") for metric in metrics),
                "→" if trial is result.best else "" if trial.problem is None else "problem",
            )
            for turn, trial in enumerate(result.trials, 1)
        ],
    )
    out.line("")
    for turn, trial in enumerate(result.trials, 1):
        if trial.problem is not None:
            out.line(f"trial {turn}: {trial.problem}")
    out.line(result.reason)
    chosen = found["chosen"]
    rows = [("study", os.fspath(place / STUDY_NAME))]
    if isinstance(chosen, dict):
        model = Path(str(found["output"]))
        written = sum(each.stat().st_size for each in model.iterdir() if each.is_file())
        rows = [
            ("output", f"{model} ({size(written)})"),
            ("the same", str(chosen["command"])),
            *rows,
        ]
    out.fields(rows)
