"""A search for several α at once, by a sampler of Optuna (Akiba et al., KDD 2019).

Optuna is asked and told trial by trial, its journal kept beside the log of the search; it is told
of the constraints as violations.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import optuna

    from uipe_merge.study.judging import Judge
    from uipe_merge.study.trials import Bench, Space

Sampler = Literal["tpe", "nsga2", "gp"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

STUDY_NAME = "optuna.journal"
"""File of a search that goes on: what Optuna remembers."""


def require_optuna() -> None:
    """Refuse where Optuna is not installed.

    Raises:
        UsageError: It is not.
    """
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


def sampled(bench: Bench, judge: Judge, kind: Sampler, seed: int, directory: Path | None) -> None:
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
