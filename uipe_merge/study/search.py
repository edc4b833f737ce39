"""A search for α: the best of an objective among the models that keep what must be kept.

One α is bracketed on an even grid and refined by golden sections, with a look into the widest
gap now and then, since forget quality is not monotone in α and collapses past its peak. Several
(by layer, by kind of module) are left to Optuna (Akiba et al., KDD 2019), which is told of the
constraints as violations. Every evaluation is kept by what it is of, on the disk if there is a
directory, so that an interrupted search goes on where it was and evaluates nothing twice.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from uipe_merge.errors import CorruptInputError, NumericError, UsageError, escape
from uipe_merge.recipe import Recipe
from uipe_merge.study.constraints import Constraint, Row, lack, parse_constraint
from uipe_merge.study.layouts import normalised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import IO

    import optuna

TRIALS = 20
"""Evaluations by default: each is a whole evaluation of a model."""

Sampler = Literal["tpe", "nsga2", "gp"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

LOG_NAME, STUDY_NAME = "trials.jsonl", "optuna.journal"
"""Files of a search that goes on: all evaluations, and what Optuna remembers."""

_GOLDEN = (3 - math.sqrt(5)) / 2
_EXPLORE = 4  # every fourth refinement looks into the widest gap instead
_FINEST = 1 / 1000  # of the range: finer is below what a merge to bfloat16 realises
_HOPELESS = 3  # evaluations that fail before one has succeeded
_REFERENCES = {"unlearned": 0.0, "original": -1.0}


class EvaluationError(Exception):
    """One model could not be evaluated; the search goes on without it. One line."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model that may be evaluated.

    Attributes:
        alphas: The α that are searched for, in the order of the space's names.
        recipe: The recipe of the model, for ``merge``, ``load`` and ``set_alpha``.
    """

    alphas: tuple[float, ...]
    recipe: Recipe

    @property
    def alpha(self) -> float:
        """α, where it is the only one; else that of what no rule and no layer decides."""
        return self.alphas[0] if len(self.alphas) == 1 else self.recipe.alpha

    @property
    def key(self) -> str:
        """The same for two points that are one model."""
        return json.dumps(self.recipe.canonical(), sort_keys=True)

    def __str__(self) -> str:
        return "α = " + ", ".join(f"{alpha:g}" for alpha in self.alphas)


@dataclass(frozen=True, slots=True)
class Space:
    """Which α are searched for: one; one at each of some layers; or one for each pattern.

    Attributes:
        low: The least α.
        high: The largest.
        layers: Layers that have an α each, linear between them.
        rules: Patterns of tensors' names that have an α each; before the rules of ``base``.
        base: What else the recipe says, and α of what the layers and rules leave.

    Raises:
        UsageError: There is no range, or there are both layers and rules.
    """

    low: float
    high: float
    layers: tuple[int, ...] = ()
    rules: tuple[str, ...] = ()
    base: Recipe = field(default_factory=lambda: Recipe(0.0))

    def __post_init__(self) -> None:
        """Check every field."""
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(
                f"nothing lies between {self.low:g} and {self.high:g}",
                remedy="give the least and the largest α, for example 0 and 4",
            )
        if self.layers and self.rules:
            raise UsageError("α is searched by layers or by rules", remedy="leave out one of them")
        self.point((self.low,) * len(self.names))

    @property
    def names(self) -> list[str]:
        """What each α is of."""
        return [f"layer {layer}" for layer in self.layers] or list(self.rules) or ["alpha"]

    def point(self, alphas: Sequence[float]) -> Point:
        """Return the model with these α."""
        values = tuple(map(self._readable, alphas))
        if self.layers:
            knots = tuple(sorted(zip(self.layers, values, strict=True)))
            return Point(values, replace(self.base, layers=knots, gradient=()))
        if self.rules:
            rules = (*zip(self.rules, values, strict=True), *self.base.rules)
            return Point(values, replace(self.base, rules=rules))
        return Point(values, replace(self.base, alpha=values[0]))

    def reference(self, alpha: float) -> Point:
        """Return the model with one α everywhere."""
        recipe = replace(self.base, alpha=alpha, rules=(), layers=(), gradient=())
        return Point((alpha,) * len(self.names), recipe)

    def holds(self, point: Point) -> bool:
        """Whether a point is one of the space."""
        inside = all(self.low <= alpha <= self.high for alpha in point.alphas)
        return inside and self.point(point.alphas).key == point.key

    def _readable(self, alpha: float) -> float:
        """Round to a thousandth or so of the range, but never out of it."""
        digits = 3 - math.floor(math.log10(self.high - self.low))
        return min(max(round(float(alpha), digits), self.low), self.high)


class Trial(NamedTuple):
    """One evaluation.

    Attributes:
        point: What was evaluated.
        scores: Metric, normalised → number.
        problem: Why there are none.
    """

    point: Point
    scores: Mapping[str, float]
    problem: str | None = None

    @property
    def row(self) -> Row:
        """The same for the functions that choose among models."""
        alphas = set(self.point.alphas)
        alpha = alphas.pop() if len(alphas) == 1 else math.nan
        return Row(str(self.point), "uipe", alpha, self.scores, None, self.problem)

    def document(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "alphas": list(self.point.alphas),
            "scores": dict(self.scores),
            "problem": self.problem,
            "recipe": self.point.recipe.canonical(),
        }


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        best: The best trial that meets every constraint, or ``None``.
        reason: Why this one, or why none.
        trials: All evaluations, in their order.
    """

    best: Trial | None
    reason: str
    trials: list[Trial]


def search(  # noqa: PLR0913 - one keyword-only argument a choice of the search
    evaluate: Callable[[Point], Mapping[str, float]],
    space: Space,
    *,
    maximise: str,
    subject_to: Sequence[Constraint | str],
    minimise: bool = False,
    trials: int = TRIALS,
    sampler: Sampler = "tpe",
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search for the α with the best objective among those that meet every constraint.

    Args:
        evaluate: Returns the scores of a model, by metric; NaN where there is none. May raise
            ``EvaluationError``, and a ``NumericError`` of the merge counts as that.
        space: Which α, and between what.
        maximise: The objective, for example ``forget_quality``.
        subject_to: What the model has to keep: ``model_utility>=0.95*unlearned``. One at least
            on another metric than the objective. A bound by ``unlearned`` or ``original`` costs
            an evaluation of that one.
        minimise: The objective is better where it is smaller.
        trials: Evaluations at most, those of earlier runs included.
        sampler: How several α are searched for: ``tpe``, ``nsga2`` or ``gp``.
        seed: Of that; the same seed gives the same trials, interrupted or not.
        directory: Where evaluations are kept; made where it is missing. The same call with the
            same directory goes on.

    Raises:
        UsageError: There is no constraint, a bound cannot be told, Optuna is not installed, the
            directory is of another search, or every evaluation fails.
        RecipeError: A constraint cannot be understood, or an α cannot be used.
        CorruptInputError: What an earlier run kept is damaged.
    """
    asked = [
        each if isinstance(each, Constraint) else parse_constraint(each) for each in subject_to
    ]
    objective = normalised(maximise)
    if all(each.metric == objective for each in asked):
        raise UsageError(
            f"nothing is searched for on {objective} alone: a model that talks gibberish can "
            "score high",
            remedy="give a constraint on what must be kept: 'model_utility>=0.95*unlearned'",
        )
    if trials < 1 or sampler not in SAMPLERS:
        raise UsageError(
            f"{trials} trials by '{sampler}' make no search",
            remedy=f"choose 1 or more, and one of {', '.join(SAMPLERS)}",
        )
    several = len(space.names) > 1
    if several:
        _require_optuna()
    own = {
        "names": space.names,
        "range": [space.low, space.high],
        "base": space.base.canonical(),
        "objective": [objective, minimise],
        "constraints": list(map(str, asked)),
        "sampler": [sampler, seed] if several else None,
        "evaluator": getattr(evaluate, "identity", None),
    }
    root = None if directory is None else Path(directory)
    with _Bench.opened(evaluate, space, trials, own, root) as bench:
        judge = _judge(bench, objective, asked, minimise=minimise)
        if several:
            _sampled(bench, judge, sampler, seed, root)
        else:
            _refined(bench, judge)
        return judge.result(bench)


# ------------------------------------------------------------------- what is evaluated, and kept


class _Bench:
    """Evaluates points, each once, and writes down what came of it."""

    def __init__(
        self,
        evaluate: Callable[[Point], Mapping[str, float]],
        space: Space,
        most: int,
        log: IO[str] | None,
    ) -> None:
        self._evaluate = evaluate
        self.space = space
        self._most = most
        self._log = log
        self._failures = 0
        self.trials: dict[str, Trial] = {}

    @classmethod
    @contextmanager
    def opened(
        cls,
        evaluate: Callable[[Point], Mapping[str, float]],
        space: Space,
        most: int,
        own: dict[str, object],
        directory: Path | None,
    ) -> Iterator[_Bench]:
        """Open the log of a search, with what earlier runs of it have found."""
        if directory is None:
            yield cls(evaluate, space, most, None)
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / LOG_NAME
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # one may have been cut off
        own = json.loads(json.dumps(own))  # as it comes back: lists for tuples
        try:
            head, *rows = [json.loads(line) for line in whole] or [own]
            if head != own and isinstance(head, dict):
                raise UsageError(
                    "holds another search: other α, metrics, constraints, seed or evaluator",
                    file=directory,
                    remedy="choose another directory, or give what it was begun with",
                )
            kept = [_recalled(space, row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptInputError(
                f"is no log of a search ({error})", file=path, remedy="choose another directory"
            ) from None
        with path.open("w" if not whole else "r+", encoding="utf-8") as log:
            log.truncate(sum(len(line.encode()) for line in whole))
            log.seek(0, os.SEEK_END)
            bench = cls(evaluate, space, most, log)
            if not whole:
                bench.write(own)
            # What failed is tried again: its reason may be gone.
            bench.trials = {each.point.key: each for each in kept if each.problem is None}
            yield bench

    @property
    def spent(self) -> bool:
        """Whether no further model may be evaluated."""
        return len(self.trials) >= self._most

    @property
    def most(self) -> int:
        """Evaluations at most."""
        return self._most

    def __call__(self, point: Point) -> Trial:
        """Return the trial of a point."""
        if point.key not in self.trials:
            trial = self._tried(point)
            self.trials[point.key] = trial
            self.write(trial.document() | {"alphas": [alpha.hex() for alpha in point.alphas]})
        return self.trials[point.key]

    def write(self, document: dict[str, Any]) -> None:
        """Put one line on the disk."""
        if self._log is not None:
            self._log.write(json.dumps(document) + "\n")
            self._log.flush()
            os.fsync(self._log.fileno())

    def _tried(self, point: Point) -> Trial:
        try:
            found = self._evaluate(point)
        except NumericError as error:  # α is too large for the output's type: an answer
            return Trial(point, {}, str(error))
        except EvaluationError as error:
            self._failures += 1
            if self._failures == len(self.trials) + 1 == _HOPELESS:
                raise UsageError(f"every evaluation fails: {error}") from None
            return Trial(point, {}, escape(str(error)))
        return Trial(point, {normalised(name): float(value) for name, value in found.items()})


def _recalled(space: Space, row: dict[str, Any]) -> Trial:
    alphas = tuple(map(float.fromhex, row["alphas"]))
    for point in (space.point(alphas), space.reference(alphas[0])):
        if point.recipe.canonical() == row["recipe"]:
            return Trial(
                point, {name: float(at) for name, at in row["scores"].items()}, row["problem"]
            )
    raise ValueError("a recipe of another space")


# ------------------------------------------------------------------- what is better


class _Judge(NamedTuple):
    """Says which trials are better, by an objective and constraints with their bounds."""

    objective: str
    sign: int
    bounds: list[tuple[Constraint, float]]

    def violations(self, trial: Trial) -> list[float]:
        """Return by how much it misses each bound; NaN where that is not known."""
        missed = []
        for constraint, bound in self.bounds:
            value = trial.row.score(constraint.metric)
            if constraint.holds(value, bound):
                missed.append(0.0)
            else:
                missed.append(max(constraint.shortfall(value, bound), 1e-12) + value * 0)
        return missed

    def merit(self, trial: Trial) -> tuple[int, float]:
        """Return what a better trial has more of: meeting the constraints goes before all."""
        missed, value = self.violations(trial), trial.row.score(self.objective)
        if any(map(math.isnan, missed)):
            return 0, 0.0
        if any(missed):
            return 1, -max(missed)
        return (0, 0.0) if math.isnan(value) else (2, self.sign * value)

    def result(self, bench: _Bench) -> SearchResult:
        """Choose; of equals the one with the smaller α."""
        everything = list(bench.trials.values())
        inside = [trial for trial in everything if bench.space.holds(trial.point)]
        ordered = sorted(inside, key=lambda trial: (self.merit(trial), -_size(trial.point)))
        kept = " and ".join(f"{constraint}" for constraint, _ in self.bounds)
        if not ordered or self.merit(ordered[-1])[0] < 1:
            why = _first_lack(
                everything, [self.objective, *(each.metric for each, _ in self.bounds)]
            )
            return SearchResult(None, f"nothing was found: {why}", everything)
        best = ordered[-1]
        if self.merit(best)[0] == 1:
            misses = [
                f"{constraint.metric} {best.row.score(constraint.metric):.4g} where "
                f"{constraint.operator} {bound:.4g} is asked"
                for (constraint, bound), miss in zip(
                    self.bounds, self.violations(best), strict=True
                )
                if miss
            ]
            reason = f"no model keeps {kept}; {best.point} comes nearest, with {', '.join(misses)}"
            return SearchResult(None, f"nothing was found: {reason}", everything)
        word = "highest" if self.sign > 0 else "lowest"
        meeting = sum(self.merit(trial)[0] == 2 for trial in inside)
        reason = (
            f"{best.point} has the {word} {self.objective}, {best.row.score(self.objective):.4g}, "
            f"of the {meeting} of {len(inside)} that keep {kept}"
        )
        if bench.space.high in best.point.alphas:
            reason += "; it lies at the end of the range: a larger α may be better"
        return SearchResult(best, reason, everything)


def _judge(
    bench: _Bench, objective: str, constraints: Sequence[Constraint], *, minimise: bool
) -> _Judge:
    """Find the number that every bound comes to, evaluating what it is relative to."""
    bounds = []
    for constraint in constraints:
        bound = constraint.factor
        if constraint.reference is not None:
            alpha = _REFERENCES.get(constraint.reference)
            if alpha is None:
                raise UsageError(
                    f"{constraint}: '{constraint.reference}' is no model that a search evaluates",
                    remedy="write its score as a number",
                )
            point = bench.space.reference(alpha)
            same = bench.space.point(point.alphas)
            row = bench(same if same.key == point.key else point).row
            bound *= row.score(constraint.metric)
            if math.isnan(bound):
                why = row.problem or lack(row, constraint.metric)
                raise UsageError(f"{constraint} cannot be told: at α = {alpha:g}, {why}")
        bounds.append((constraint, bound))
    return _Judge(objective, -1 if minimise else 1, bounds)


def _first_lack(trials: Sequence[Trial], needed: Sequence[str]) -> str:
    for trial in reversed(trials):
        if trial.problem is not None:
            return f"at {trial.point}, {trial.problem}"
        for metric in needed:
            if math.isnan(trial.row.score(metric)):
                return f"at {trial.point}, {lack(trial.row, metric)}"
    return "there was no trial"


def _size(point: Point) -> float:
    return max(map(abs, point.alphas))


# ------------------------------------------------------------------- one α


def _refined(bench: _Bench, judge: _Judge) -> None:
    """Evaluate an even grid, then go on from its best."""
    space = bench.space
    count = min(max(bench.most // 3, 5), bench.most)
    gap = (space.high - space.low) / max(count - 1, 1)
    grid = [space.low + gap * number for number in range(count)]
    tried: dict[float, Trial] = {}
    if space.low < 0 < space.high:
        grid.append(0.0)
    for number, alpha in enumerate([*grid, *([math.nan] * bench.most)]):
        at = alpha if number < len(grid) else _next(tried, judge, space, number - len(grid))
        if at is None:
            return
        point = space.point((at,))
        if bench.spent and point.key not in bench.trials:
            return
        tried[point.alpha] = bench(point)


def _next(tried: dict[float, Trial], judge: _Judge, space: Space, turn: int) -> float | None:
    """Return the next α: in a gap beside the best, or at times in the widest of all."""
    alphas = sorted(tried)
    gaps = list(pairwise(alphas))
    fine = [gap for gap in gaps if gap[1] - gap[0] > (space.high - space.low) * _FINEST * 2]
    if not fine:
        return None
    best = max(alphas, key=lambda alpha: (judge.merit(tried[alpha]), -abs(alpha)))
    beside = [gap for gap in fine if best in gap]
    explore = turn % _EXPLORE == _EXPLORE - 1 or not beside
    low, high = max(fine if explore else beside, key=lambda gap: gap[1] - gap[0])
    if explore:
        return (low + high) / 2
    part = (high - low) * _GOLDEN
    return low + part if best == low else high - part


# ------------------------------------------------------------------- several α


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401 - to see whether it is there
    except ImportError:
        raise UsageError(
            "a search for several α needs Optuna", remedy="pip install 'uipe-merge[study]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from talking; what it says by default is left as it was."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it calls experimental
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _sampled(
    bench: _Bench, judge: _Judge, kind: Sampler, seed: int, directory: Path | None
) -> None:
    """Ask, evaluate, tell; what was asked and not told by a run that died comes first."""
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    space, names = bench.space, bench.space.names

    def violations(trial: optuna.trial.FrozenTrial) -> list[float]:
        return judge.violations(bench.trials[space.point([trial.params[n] for n in names]).key])

    with _quiet():
        storage = None
        if directory is not None:
            backend = JournalFileBackend(str(directory / STUDY_NAME))
            storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(
            storage=storage,
            study_name="uipe-merge",
            direction="maximize",
            load_if_exists=True,
        )
        if not study.trials:
            for share in (0.5, 0.25, 1.0):  # the same α everywhere, to begin with
                alpha = space.low + share * (space.high - space.low)
                study.enqueue_trial(dict.fromkeys(names, alpha))
    for _ in range(4 * bench.most):  # a sampler may come to the same point again
        with _quiet():
            # Seeded by the trial's number: what comes next does not depend on interruptions.
            states = [trial.state for trial in study.trials]
            waiting = states.count(TrialState.WAITING)
            study.sampler = _sampler(kind, seed + len(states) - waiting, violations, len(names))
            number, alphas = _asked(study, space)
        if alphas is None:
            with _quiet():
                study.tell(number, state=TrialState.FAIL)
            continue
        point = space.point(alphas)
        if bench.spent and point.key not in bench.trials:
            return
        trial = bench(point)
        value = trial.row.score(judge.objective)
        with _quiet():
            if math.isnan(value) or any(map(math.isnan, judge.violations(trial))):
                study.tell(number, state=TrialState.FAIL)
            else:
                study.tell(number, judge.sign * value)


def _asked(study: optuna.Study, space: Space) -> tuple[int, list[float] | None]:
    """Return a trial's number and α: one that nobody told of, or a new one."""
    from optuna.trial import TrialState

    for old in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        whole = all(name in old.params for name in space.names)
        return old.number, [old.params[name] for name in space.names] if whole else None
    trial = study.ask()
    return trial.number, [trial.suggest_float(name, space.low, space.high) for name in space.names]


def _sampler(
    kind: Sampler,
    seed: int,
    violations: Callable[[optuna.trial.FrozenTrial], list[float]],
    dimensions: int,
) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    seed %= 2**32
    start = 2 * dimensions + 2
    if kind == "nsga2":  # a generation must be small, where trials are few
        return samplers.NSGAIISampler(population_size=8, seed=seed, constraints_func=violations)
    made = samplers.GPSampler if kind == "gp" else samplers.TPESampler
    return made(n_startup_trials=start, seed=seed, constraints_func=violations)


# ------------------------------------------------------------------- an evaluator of one's own


class Score(NamedTuple):
    """Where a number is found: ``NAME=FILE:KEY``, or ``FILE:KEY`` for the last part of the key.

    Attributes:
        name: What it is called.
        file: JSON file, relative to the output directory of the command.
        key: Its key there; with dots, one inside another.
    """

    name: str
    file: str
    key: str


def parse_score(text: str) -> Score:
    """Return what ``quality=scores.json:forget.quality`` means.

    Raises:
        UsageError: It is not of that form.
    """
    name, _, rest = text.rpartition("=")
    file, _, key = rest.rpartition(":")
    if not (file and key) or ("=" in text and not name):
        raise UsageError(
            f"'{text:.200}' is no score", remedy="write FILE:KEY or NAME=FILE:KEY, FILE in JSON"
        )
    return Score(normalised(name or key.rpartition(".")[2]), file, key)


@dataclass(frozen=True, slots=True)
class CommandEvaluator:
    """Merges a model into a temporary directory and runs a command on it.

    Attributes:
        original: θ₀.
        unlearned: θᵤ.
        command: The command with ``{model}`` and ``{out}``, two directories, in its words. It is
            run without a shell.
        scores: What is read of what it wrote; see ``Score``.
        timeout: Seconds that it may take; ``None`` for any.
        workplace: Where the directory is made; by default where temporary files go.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
        threads: Of the merge.

    Raises:
        UsageError: The command does not name the model, cannot be split into words, or cannot be
            started; or a score is not of its form.
    """

    original: str | os.PathLike[str]
    unlearned: str | os.PathLike[str]
    command: str
    scores: Sequence[str]
    timeout: float | None = None
    workplace: str | os.PathLike[str] | None = None
    allow_pickle: bool = False
    dequantize: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a model is made."""
        if not any("{model}" in word for word in self._words()):
            raise UsageError(
                "the command says nothing of {model}",
                remedy="write it like 'eval.sh {model} {out}'",
            )
        if not self.scores:
            raise UsageError("no score is read", remedy="give FILE:KEY of what the command writes")
        for text in self.scores:
            parse_score(text)

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others."""
        sides = (os.fspath(self.original), os.fspath(self.unlearned))
        return {"models": sides, "command": self.command, "scores": list(self.scores)}

    def __call__(self, point: Point) -> dict[str, float]:
        """Return the scores of one model.

        Raises:
            EvaluationError: The command failed, took too long, or did not write a score.
            UipeMergeError: Whatever ``merge`` would refuse.
        """
        from uipe_merge.executors import make_executor
        from uipe_merge.job import prepare
        from uipe_merge.output.filesystem import LocalFileSystem
        from uipe_merge.progress import Silent
        from uipe_merge.running import run

        with TemporaryDirectory(prefix="uipe-search-", dir=self.workplace) as root:
            model, out = Path(root) / "model", Path(root) / "out"
            out.mkdir()
            job = prepare(
                self.original,
                self.unlearned,
                model,
                point.recipe,
                allow_pickle=self.allow_pickle,
                dequantize=self.dequantize,
            )
            executor = make_executor(self.threads, remote=job.remote)
            run(job, executor, LocalFileSystem(), Silent())
            self._run(model, out)
            wanted = [parse_score(text) for text in self.scores]
            return {score.name: _read_score(out, score) for score in wanted}

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise UsageError(f"the command cannot be read: {error}") from None

    def _run(self, model: Path, out: Path) -> None:
        words = [
            word.replace("{model}", str(model)).replace("{out}", str(out)) for word in self._words()
        ]
        with TemporaryFile() as said:
            try:
                process = subprocess.Popen(  # noqa: S603 - the user's command, no shell
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UsageError(f"'{words[0]}' cannot be run: {error.strerror}") from None
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise EvaluationError(f"'{words[0]}' took more than {self.timeout:g} s") from None
            finally:
                if process.poll() is None:  # with all that it started
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                said.seek(max(said.seek(0, os.SEEK_END) - 4096, 0))
                lines = said.read().decode("utf-8", "replace").split("\n")
                last = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
                raise EvaluationError(f"'{words[0]}' ended with {code}: {last:.300}")


def _read_score(out: Path, score: Score) -> float:
    path = out / score.file
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise EvaluationError(f"the command wrote no {score.file}") from None
    except (ValueError, RecursionError):
        raise EvaluationError(f"{score.file} is no JSON") from None
    parts = [score.key] if isinstance(found, dict) and score.key in found else score.key.split(".")
    for part in parts:
        if not isinstance(found, dict) or part not in found:
            raise EvaluationError(f"{score.file} has no '{score.key}'")
        found = found[part]
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise EvaluationError(f"'{score.key}' in {score.file} is no number")
    return float(found)
