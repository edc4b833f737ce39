"""A search from its arguments to the model that is written: what a command and a call share.

Trials go into a working directory, the winner where ``merge`` would write it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from uipe_merge.errors import NumericError, UsageError
from uipe_merge.inputs import open_inputs
from uipe_merge.job import plan_job, prepare, run_digest
from uipe_merge.output.lock import hold
from uipe_merge.study import search, workplace
from uipe_merge.study.aims import shown
from uipe_merge.study.layouts import normalised
from uipe_merge.study.trials import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from uipe_merge.inputs import Inputs
    from uipe_merge.job import Job
    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Recipe
    from uipe_merge.study.aims import Aim
    from uipe_merge.study.sampling import Sampler
    from uipe_merge.study.search import Point, Space, Trial

PathLike = str | os.PathLike[str]


class Evaluator(Protocol):
    """What gives the scores of a model."""

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others, as plain values."""

    @property
    def description(self) -> dict[str, object]:
        """What the study says of it."""

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Return the scores of one model."""


@dataclass(frozen=True, slots=True)
class PlannedSearch:
    """A search that may begin.

    Attributes:
        original: θ₀, as the user named it.
        unlearned: θᵤ, likewise.
        planned: The merge at the least α: where the winner goes, and what goes with it.
        space: Which α are searched for.
        place: The working directory.
        overwrite: As for ``merge``.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
    """

    original: PathLike
    unlearned: PathLike
    planned: Job
    space: Space
    place: Path
    overwrite: bool
    allow_pickle: bool
    dequantize: bool

    @property
    def models(self) -> Path:
        """Where models are that are written to be tried."""
        return self.place / workplace.MODELS


def plan_search(  # noqa: PLR0913 - one keyword-only argument a choice of the search
    original: PathLike,
    unlearned: PathLike,
    output: PathLike,
    base: Recipe,
    *,
    alphas: tuple[float, float],
    per_layer_groups: int | None = None,
    work: PathLike | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> PlannedSearch:
    """Read headers and decide where everything goes; write nothing.

    Raises:
        UipeMergeError: Whatever would keep ``merge`` from beginning; or there is no such range of
            α, too few layers, or the working directory is something else.
    """
    allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
    inputs = open_inputs(original, unlearned, base, **allowed)
    layers = () if per_layer_groups is None else _spread(inputs, per_layer_groups)
    if len(alphas) != 2:
        raise UsageError("α is searched for in a range", remedy="give the least and the largest")
    low, high = map(float, alphas)
    space = search.Space(low, high, layers=layers, base=base)
    recipe = space.point((low,) * len(space.names)).recipe
    planned = plan_job(inputs, output, recipe, overwrite=overwrite)
    place = workplace.choose(None if work is None else os.fspath(work), planned, inputs)
    return PlannedSearch(original, unlearned, planned, space, place, overwrite, **allowed)


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What ``search`` returns.

    Attributes:
        best: The trial whose model was written; None where none meets every constraint.
        reason: Why this one, or why none.
        trials: All evaluations, in their order.
        names: What each α is of.
        output: The model, where one was written.
        command: The command line of ``merge`` that writes the same bytes.
        study: The file that holds all of it.
        document: What that file says.
        warnings: What ``merge`` warns of at this α.
    """

    best: Trial | None
    reason: str
    trials: list[Trial]
    names: list[str]
    output: Path | None
    command: str | None
    study: Path
    document: dict[str, object] = field(repr=False)
    warnings: list[str] = field(default_factory=list)


def run_search(  # noqa: PLR0913 - one keyword-only argument a choice of the search
    asked: PlannedSearch,
    evaluator: Evaluator,
    sought: Aim,
    *,
    trials: int,
    sampler: Sampler,
    seed: int,
    threads: int | None,
    tell: Callable[[str], None],
    progress: Callable[[], Progress],
) -> SearchReport:
    """Search, and write the best model; what an earlier run of the same has found counts.

    Args:
        asked: What ``plan_search`` returned.
        evaluator: Gives the scores.
        sought: What is looked for.
        trials: Evaluations at most.
        sampler: Of several α.
        seed: Of that.
        threads: Of the merge.
        tell: Is given a line about every evaluation.
        progress: Makes what is told of the merge.

    Raises:
        UipeMergeError: See ``study.search.search`` and ``merge``.
    """
    place, space, planned = asked.place, asked.space, asked.planned
    workplace.require_replaceable(planned, place)
    with hold(place):
        workplace.tidy(place)
        result = search.search(
            _Watched(evaluator, planned, sought.metrics, tell),
            space,
            maximise=sought.objective,
            subject_to=sought.constraints,
            minimise=sought.minimise,
            trials=trials,
            sampler=sampler,
            seed=seed,
            directory=place,
        )
        workplace.tidy(place)
        found: dict[str, object] = {
            "schema": 1,
            "original": planned.arguments[0],
            "unlearned": planned.arguments[1],
            "evaluator": evaluator.description,
            "space": {"names": space.names, "low": space.low, "high": space.high},
            "objective": {
                "metric": sought.objective,
                "direction": "minimize" if sought.minimise else "maximize",
            },
            "constraints": list(map(str, sought.constraints)),
            "trials": [_plain(trial) for trial in result.trials],
            "chosen": None,
            "reason": result.reason,
        }
        study = place / workplace.STUDY_NAME
        report = SearchReport(*result, space.names, None, None, study, found)
        if result.best is None:
            workplace.write_study(place, found)
            return report
        job = prepare(
            asked.original,
            asked.unlearned,
            planned.named,
            result.best.point.recipe,
            overwrite=asked.overwrite,
            allow_pickle=asked.allow_pickle,
            dequantize=asked.dequantize,
        )
        chosen = {**_plain(result.best), "command": job.command, "run": run_digest(job)}
        found |= {"output": str(job.output), "chosen": chosen}
        workplace.write_study(place, found)  # by which the model is known again, whenever this ends
        warnings = workplace.write_model(job, threads, progress())
    return SearchReport(*result, space.names, job.output, job.command, study, found, warnings)


def _spread(inputs: Inputs, count: int) -> tuple[int, ...]:
    """Return so many layers, from the first to the last."""
    from uipe_merge.naming import place

    found = [place(name).layer for name in inputs.pair.original.tensors]
    last = max((layer for layer in found if layer is not None), default=-1)
    if not 1 < count <= last + 1:
        raise UsageError(
            f"the model has {last + 1} layers, which make no {count} groups",
            remedy="give another --per-layer-groups, from 2 on, or leave it out",
        )
    return tuple(round(last * turn / (count - 1)) for turn in range(count))


@dataclass(frozen=True, slots=True)
class _Watched:
    """An evaluator that says what it found, and knows checkpoints by more than their names."""

    evaluator: Evaluator
    planned: Job
    metrics: list[str]
    tell: Callable[[str], None]

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others."""
        plan = self.planned.plan
        further = {"further": plan.further} if plan.further else {}
        sides = {"original": plan.original, "unlearned": plan.unlearned, **further}
        return {**self.evaluator.identity, **sides}

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Return the scores of one model."""
        try:
            scores = self.evaluator(point)
        except (EvaluationError, NumericError) as error:
            self.tell(f"{point}: {error}")
            raise
        named = {normalised(name): value for name, value in scores.items()}
        told = (f"{name} {named[name]:.4g}" for name in shown(self.metrics, named))
        self.tell(f"{point}: {', '.join(told)}")
        return named


def _plain(trial: Trial) -> dict[str, object]:
    scores = {name: value if math.isfinite(value) else None for name, value in trial.scores.items()}
    return {**trial.document(), "scores": scores}
