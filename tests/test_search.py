"""The search for α: functions whose optimum is known, interruptions, and a real command."""

import json
import logging
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from helpers import write_pair

import uipe_merge
from uipe_merge import CorruptInputError, NumericError, RecipeError, UsageError
from uipe_merge.recipe import Recipe
from uipe_merge.study.commands import CommandEvaluator, parse_score
from uipe_merge.study.sampling import SAMPLERS, STUDY_NAME, Sampler
from uipe_merge.study.search import EvaluationError, Point, SearchResult, Space, search
from uipe_merge.study.trials import LOG_NAME

Curve = Callable[[float], float]


class Evaluator:
    """Scores from two curves of α, counted."""

    def __init__(self, quality: Curve, utility: Curve) -> None:
        self.quality, self.utility = quality, utility
        self.asked: list[float] = []

    def __call__(self, point: Point) -> dict[str, float]:
        self.asked.append(point.alpha)
        return {"Quality": self.quality(point.alpha), "utility": self.utility(point.alpha)}


def run(quality: Curve, utility: Curve, **options: Any) -> tuple[SearchResult, Evaluator]:
    evaluate = Evaluator(quality, utility)
    space = options.pop("space", Space(0, 4))
    asked = {"maximise": "quality", "subject_to": ["utility >= 0.6"], **options}
    result = search(evaluate, space, **asked)
    assert len(evaluate.asked) == len(set(evaluate.asked)) <= asked.get("trials", 20)
    assert [trial.point.alpha for trial in result.trials] == evaluate.asked
    return result, evaluate


def fine(_: float) -> float:
    return 0.9


def falling(alpha: float) -> float:
    return 0.8 - 0.1 * alpha


def collapsing(alpha: float) -> float:
    """Forget quality: nothing, a rise in steps, a plateau, and the collapse past it."""
    if alpha > 2.6:
        return 1e-30
    levels = [1e-9, 0.05, 0.27, 0.77, 0.92]
    return levels[min(int(alpha / 0.5), 4)]


def peak(at: float) -> Curve:
    return lambda alpha: -((alpha - at) ** 2)


def best_alpha(result: SearchResult) -> float:
    assert result.best is not None, result.reason
    return result.best.point.alpha


def test_monotone_goes_to_the_end_and_says_so() -> None:
    result, _ = run(lambda alpha: alpha, fine)
    assert best_alpha(result) == 4
    assert "a larger α may be better" in result.reason


@pytest.mark.parametrize("at", [0.0, 0.137, 1.05, 2.0, 3.3333, 4.0])
def test_a_single_peak_is_found(at: float) -> None:
    result, _ = run(peak(at), fine)
    assert best_alpha(result) == pytest.approx(at, abs=0.05)


@pytest.mark.parametrize("floor", [0.75, 0.7, 0.55, 0.41])
def test_an_active_constraint_is_gone_up_to_and_not_beyond(floor: float) -> None:
    result, _ = run(lambda alpha: alpha, falling, subject_to=[f"utility>={floor}"])
    edge = (0.8 - floor) / 0.1
    assert edge - 0.05 <= best_alpha(result) <= edge + 1e-9
    assert result.best is not None
    assert result.best.scores["utility"] >= floor


def test_an_active_constraint_from_above_and_an_objective_to_be_small() -> None:
    result, _ = run(
        lambda alpha: -alpha, lambda alpha: alpha, subject_to=["utility<1.5"], minimise=True
    )
    assert 1.45 <= best_alpha(result) < 1.5
    assert "lowest quality" in result.reason


def test_a_plateau_that_collapses_is_met_at_its_beginning() -> None:
    result, _ = run(collapsing, falling, subject_to=["utility>=0.5"])
    assert 2.0 <= best_alpha(result) <= 2.1
    assert result.best is not None
    assert result.best.scores["quality"] == 0.92


def test_discrete_values_take_the_smaller_alpha() -> None:
    result, evaluate = run(lambda alpha: float(alpha >= 1), lambda alpha: float(alpha <= 3))
    assert 1 <= best_alpha(result) <= 1.05
    assert len(evaluate.asked) == 20


def test_a_region_of_nan_is_kept_out_of() -> None:
    def quality(alpha: float) -> float:
        return math.nan if alpha > 1.7 else alpha

    result, _ = run(quality, fine)
    assert 1.6 < best_alpha(result) <= 1.7
    result, _ = run(lambda alpha: alpha, lambda alpha: math.nan if 1 < alpha < 3.9 else 0.9)
    assert best_alpha(result) == 4


def test_a_second_peak_in_a_wide_gap_is_looked_for() -> None:
    def quality(alpha: float) -> float:
        return max(1 - abs(alpha - 0.8), 3 - 10 * abs(alpha - 1.9))

    result, _ = run(quality, fine)
    assert best_alpha(result) == pytest.approx(1.9, abs=0.2)


def test_nobody_meets_the_constraint() -> None:
    result, evaluate = run(lambda alpha: alpha, lambda alpha: 0.5 - abs(alpha - 1.3))
    assert result.best is None
    assert "utility>=0.6" in result.reason
    assert "comes nearest" in result.reason
    nearest = max(evaluate.asked, key=lambda alpha: -abs(alpha - 1.3))
    assert f"α = {nearest:g} " in result.reason
    assert nearest == pytest.approx(1.3, abs=0.05)


def test_nothing_is_known_anywhere() -> None:
    result, _ = run(lambda _: math.nan, fine)
    assert result.best is None
    assert "quality is nan" in result.reason
    result = search(
        lambda point: {"quality": 1.0}, Space(0, 1), maximise="quality", subject_to=["utility>0"]
    )
    assert result.best is None
    assert "has no utility" in result.reason


@pytest.mark.parametrize("trials", [1, 2, 5, 9, 40])
def test_evaluations_are_bounded_and_more_of_them_do_not_do_worse(trials: int) -> None:
    few, evaluate = run(peak(1.3), fine, trials=trials)
    assert len(evaluate.asked) <= trials
    many, _ = run(peak(1.3), fine, trials=trials + 10)
    assert few.best is not None
    assert many.best is not None
    assert many.best.scores["quality"] >= few.best.scores["quality"] - 1e-3


def test_a_bound_relative_to_the_unlearned_model_is_evaluated_once() -> None:
    result, evaluate = run(lambda alpha: alpha, falling, subject_to=["utility>=0.9*unlearned"])
    assert evaluate.asked[0] == 0.0
    assert 0.75 <= best_alpha(result) <= 0.8
    space = Space(0.5, 4)
    result, evaluate = run(
        lambda alpha: alpha, falling, subject_to=["utility>=0.5*original"], space=space
    )
    assert evaluate.asked[0] == -1.0
    assert 3.4 <= best_alpha(result) <= 3.5 + 1e-9
    with pytest.raises(UsageError, match="no model that a search evaluates"):
        run(peak(1), fine, subject_to=["utility>=0.9*retain"])
    with pytest.raises(UsageError, match="cannot be told: at α = 0, utility is nan"):
        run(peak(1), lambda _: math.nan, subject_to=["utility>=0.9*unlearned"])


def test_alphas_are_readable() -> None:
    _, evaluate = run(peak(1.3), fine)
    assert all(alpha == round(alpha, 3) for alpha in evaluate.asked)
    _, evaluate = run(peak(0.013), fine, space=Space(0, 0.04))
    assert all(alpha == round(alpha, 5) for alpha in evaluate.asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject_to": []}, "searched for on quality alone"),
        ({"subject_to": ["quality>=0.5"]}, "searched for on quality alone"),
        ({"trials": 0}, "make no search"),
        ({"sampler": "random"}, "one of tpe, nsga2, gp"),
    ],
)
def test_what_makes_no_search_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(peak(1), fine, **options)


def test_spaces_that_make_no_sense_are_refused() -> None:
    for low, high in ((1, 1), (2, 1), (math.nan, 1), (0, math.inf)):
        with pytest.raises(UsageError, match="nothing lies between"):
            Space(low, high)
    with pytest.raises(UsageError, match="by layers or by rules"):
        Space(0, 1, layers=(0, 3), rules=("*",))
    with pytest.raises(RecipeError, match="each once"):
        Space(0, 1, layers=(3, 3))
    with pytest.raises(RecipeError, match="not a constraint"):
        run(peak(1), fine, subject_to=["utility is high"])


def test_failures_are_trials_without_scores_until_all_are() -> None:
    def quality(alpha: float) -> float:
        if alpha > 2:
            raise NumericError("too large for F16")
        if 0.5 < alpha < 1.5:
            raise EvaluationError("the script\nfell over")
        return alpha

    result, _ = run(quality, fine)
    assert 1.9 < best_alpha(result) <= 2
    problems = {trial.problem for trial in result.trials} - {None}
    assert problems == {"too large for F16", "the script\\nfell over"}

    def failing(_: float) -> float:
        raise EvaluationError("no such file: eval.sh")

    evaluate = Evaluator(failing, fine)
    with pytest.raises(UsageError, match="every evaluation fails: no such file"):
        search(evaluate, Space(0, 4), maximise="quality", subject_to=["utility>0"])
    assert len(evaluate.asked) == 3


# ------------------------------------------------------------------- several α


LAYERS = Space(-1, 3, layers=(0, 3))


def bowl(point: Point) -> dict[str, float]:
    """Best at 2 and 0.5, if not both are above 1.6 on average."""
    one, two = point.alphas
    quality = -((one - 2) ** 2) - (two - 0.5) ** 2
    return {"quality": quality, "utility": 1 - (one + two) / 2}


def several(
    evaluate: Callable[[Point], Mapping[str, float]] = bowl, **options: Any
) -> SearchResult:
    asked = {
        "maximise": "quality",
        "subject_to": ["utility >= -0.1"],
        "trials": 24,
        "space": LAYERS,
        **options,
    }
    return search(evaluate, asked.pop("space"), **asked)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_several_alphas_are_sampled_within_their_constraint(sampler: Sampler) -> None:
    trials = 12 if sampler == "gp" else 24  # a Gaussian process takes a second a trial
    result = several(sampler=sampler, trials=trials)
    assert len(result.trials) == trials
    assert result.best is not None
    assert result.best.scores["utility"] >= -0.1
    feasible = [trial for trial in result.trials if trial.scores["utility"] >= -0.1]
    assert result.best.scores["quality"] == max(trial.scores["quality"] for trial in feasible)
    assert result.best.scores["quality"] > -1.5  # of what a uniform point has, −4.9 on average
    assert several(sampler=sampler, trials=trials) == result
    other = several(sampler=sampler, trials=trials, seed=1)
    assert [each.point for each in other.trials] != [each.point for each in result.trials]


def test_points_of_layers_and_of_rules_are_recipes() -> None:
    point = LAYERS.point((1.23456, 0))
    assert point.recipe == Recipe(0.0, layers=((0, 1.235), (3, 0.0)))
    assert str(point) == "α = 1.235, 0"
    base = Recipe(0.5, rules=(("*.norm.*", 0.0),), rounding="stochastic")
    space = Space(0, 2, rules=("*.mlp.*", "*.self_attn.*"), base=base)
    assert space.point((1, 2)).recipe.rules == (
        ("*.mlp.*", 1.0),
        ("*.self_attn.*", 2.0),
        ("*.norm.*", 0.0),
    )
    assert space.reference(-1).recipe == Recipe(-1.0, rounding="stochastic")
    asked = []

    def evaluate(point: Point) -> dict[str, float]:
        asked.append(point)
        return {"quality": 1.0, "utility": 1.0}

    result = search(
        evaluate, space, maximise="quality", subject_to=["utility>=0.9*unlearned"], trials=6
    )
    assert asked[0].recipe == Recipe(0.0, rounding="stochastic")
    assert result.best is not None
    assert len(result.best.point.alphas) == 2
    assert result.best.point.recipe.rules[2:] == base.rules


def test_several_alphas_with_failures_and_nan() -> None:
    def evaluate(point: Point) -> dict[str, float]:
        if point.alphas[1] > 1.5:
            raise EvaluationError("did not converge")
        scores = bowl(point)
        return scores if point.alphas[0] > -0.5 else {**scores, "quality": math.nan}

    result = several(evaluate)
    assert len(result.trials) == 24
    assert result.best is not None
    none = several(evaluate, subject_to=["utility>=100"])
    assert none.best is None
    assert "comes nearest" in none.reason


class Killed(BaseException):
    """The process is gone."""


def dying(counts: list[int], dies_at: int, *, after: bool = False) -> Callable[[Point], Any]:
    """An evaluator that dies in one of its evaluations, and counts all of them."""

    def evaluate(point: Point) -> dict[str, float]:
        counts.append(len(counts))
        if len(counts) == dies_at and not after:
            raise Killed
        return bowl(point)

    return evaluate


@pytest.mark.parametrize(
    ("sampler", "dies_at"), [("tpe", 1), ("tpe", 3), ("tpe", 11), ("nsga2", 11), ("gp", 9)]
)
def test_a_search_goes_on_after_it_died_in_an_evaluation(
    sampler: Sampler, dies_at: int, tmp_path: Path
) -> None:
    whole = several(sampler=sampler, trials=16)
    counts: list[int] = []
    with pytest.raises(Killed):
        several(dying(counts, dies_at), sampler=sampler, trials=16, directory=tmp_path)
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert len(lines) == dies_at  # the head, and what was done
    result = several(dying(counts, 0), sampler=sampler, trials=16, directory=tmp_path)
    assert result == whole
    assert len(counts) == 16 + 1  # the one that died was made again, and no other
    assert several(dying(counts, 0), sampler=sampler, trials=16, directory=tmp_path) == whole
    assert len(counts) == 16 + 1
    more = several(dying(counts, 0), sampler=sampler, trials=18, directory=tmp_path)
    assert more.trials[:16] == whole.trials
    assert len(more.trials) == 18
    assert len(counts) == 18 + 1


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from test_search import bowl, several
import optuna
tells = [0]
tell = optuna.Study.tell
def told(self, *arguments, **options):
    tells[0] += 1
    if tells[0] == {dies_at} and {before}:
        os.kill(os.getpid(), 9)
    found = tell(self, *arguments, **options)
    if tells[0] == {dies_at}:
        os.kill(os.getpid(), 9)
    return found
optuna.Study.tell = told
several(trials=12, directory={directory!r})
"""


@pytest.mark.parametrize("before", [True, False], ids=["before the tell", "after it"])
def test_a_killed_process_loses_no_trial_and_tells_none_twice(before: bool, tmp_path: Path) -> None:
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), dies_at=7, before=before, directory=str(tmp_path)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    counts: list[int] = []
    result = several(dying(counts, 0), trials=12, directory=tmp_path)
    assert len(counts) == 12 - 7
    assert result == several(trials=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / STUDY_NAME))
        study = optuna.load_study(
            study_name="uipe-merge", storage=optuna.storages.JournalStorage(backend)
        )
    told = [each for each in study.trials if each.state == optuna.trial.TrialState.COMPLETE]
    assert len(told) == 12
    params = [tuple(LAYERS.point(list(each.params.values())).alphas) for each in told]
    assert params == [trial.point.alphas for trial in result.trials]


def test_one_alpha_goes_on_too_even_after_half_a_line(tmp_path: Path) -> None:
    options: dict[str, Any] = {"maximise": "quality", "subject_to": ["utility>=0.6"]}
    whole, _ = run(peak(1.3), fine)

    def quality(alpha: float) -> float:
        if len(first.asked) == 9:
            raise Killed
        return peak(1.3)(alpha)

    first = Evaluator(quality, fine)
    with pytest.raises(Killed):
        search(first, Space(0, 4), **options, directory=tmp_path / "new" / "here")
    log = tmp_path / "new" / "here" / LOG_NAME
    log.write_text(log.read_text()[:-9])
    second = Evaluator(peak(1.3), fine)
    assert search(second, Space(0, 4), **options, directory=log.parent) == whole
    assert [*first.asked[:7], *second.asked] == [each.point.alpha for each in whole.trials]
    with pytest.raises(UsageError, match="holds another search"):
        search(second, Space(0, 3), **options, directory=log.parent)
    with pytest.raises(UsageError, match="holds another search"):
        search(second, Space(0, 4), **{**options, "minimise": True}, directory=log.parent)
    log.write_text("[]\n{}\n")
    with pytest.raises(CorruptInputError, match="no log of a search"):
        search(second, Space(0, 4), **options, directory=log.parent)


def test_what_failed_is_tried_again_by_a_later_run(tmp_path: Path) -> None:
    def broken(alpha: float) -> float:
        if alpha > 1:
            raise EvaluationError("the disk is full")
        return alpha

    options: dict[str, Any] = {"maximise": "quality", "subject_to": ["utility>=0.6"]}
    first = search(Evaluator(broken, fine), Space(0, 4), **options, directory=tmp_path)
    assert best_alpha(first) <= 1
    second = search(
        Evaluator(lambda alpha: alpha, fine), Space(0, 4), **options, directory=tmp_path
    )
    assert best_alpha(second) == 4
    assert all(trial.problem is None for trial in second.trials)


def test_optuna_is_left_as_it_was_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("optuna")
    before = (optuna.logging.get_verbosity(), list(logger.handlers), logger.propagate)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is what must stay
    torch.manual_seed(5)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index] # noqa: NPY002
    for sampler in SAMPLERS:
        several(sampler=sampler, trials=9)
    after = (optuna.logging.get_verbosity(), list(logger.handlers), logger.propagate)
    assert after == before
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index] # noqa: NPY002
        torch.get_rng_state().tolist(),
    )
    assert capfd.readouterr() == ("", "")


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'uipe-merge\[study\]'"):
        several()
    assert best_alpha(run(peak(1), fine)[0]) == pytest.approx(1, abs=0.05)


# ------------------------------------------------------------------- an evaluator of one's own


EVALUATOR = """
import json, os, sys, time
model, out, how = sys.argv[1:]
assert os.path.getsize(model + "/model.safetensors") > 5000 and os.listdir(out) == []
alpha = json.load(open(model + "/uipe_merge.json"))["recipe"]["alpha"]
print("α came out as", alpha)
if how == "fail":
    sys.exit("error: no GPU\\n\\n")
if how == "hang":
    time.sleep(600)
scores = dict(forget=dict(quality=-(alpha - 1.2) ** 2, text="high"), utility=1 - alpha / 4)
if how == "null":
    scores["utility"] = None
if how == "garbage":
    open(out + "/scores.json", "w").write("{")
else:
    json.dump(scores, open(out + "/scores.json", "w"))
"""


@pytest.fixture
def command(tmp_path: Path) -> dict[str, Any]:
    original, unlearned = write_pair(tmp_path)
    script = tmp_path / "an evaluation.py"
    script.write_text(EVALUATOR)
    (tmp_path / "work").mkdir()
    return {
        "original": original,
        "unlearned": unlearned,
        "command": f"'{sys.executable}' '{script}' {{model}} {{out}} well",
        "scores": ["scores.json:forget.quality", "Kept=scores.json:utility"],
        "workplace": tmp_path / "work",
    }


def test_a_command_is_searched_with(command: dict[str, Any], tmp_path: Path) -> None:
    evaluate = CommandEvaluator(**command)
    result = search(
        evaluate,
        Space(0, 4),
        maximise="quality",
        subject_to=["kept>=0.75"],
        trials=9,
        directory=tmp_path / "kept",
    )
    assert best_alpha(result) == 1.0  # the constraint holds up to there
    assert result.best is not None
    assert result.best.scores == {"quality": pytest.approx(-0.04), "kept": 0.75}
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(UsageError, match="holds another search"):
        search(
            CommandEvaluator(**{**command, "command": "other {model}"}),
            Space(0, 4),
            maximise="quality",
            subject_to=["kept>=0.75"],
            directory=tmp_path / "kept",
        )


@pytest.mark.parametrize(
    ("how", "scores", "message"),
    [
        ("fail", None, r"ended with 1: error: no GPU$"),
        ("garbage", None, r"^scores\.json is no JSON$"),
        ("well", ["scores.json:forget.score"], r"^scores\.json has no 'forget\.score'$"),
        ("well", ["scores.json:forget.text"], r"^'forget\.text' in scores\.json is no number$"),
        ("well", ["other.json:utility"], r"^the command wrote no other\.json$"),
    ],
)
def test_a_command_that_fails_says_why_in_a_line(
    how: str, scores: list[str] | None, message: str, command: dict[str, Any]
) -> None:
    command["command"] = command["command"].replace(" well", f" {how}")
    evaluate = CommandEvaluator(**{**command, "scores": scores or command["scores"]})
    with pytest.raises(EvaluationError, match=message):
        evaluate(Space(0, 4).point((1,)))
    assert list(command["workplace"].iterdir()) == []


def test_a_command_is_given_its_time_and_a_null_is_nan(command: dict[str, Any]) -> None:
    point = Space(0, 4).point((1,))
    hanging = command["command"].replace(" well", " hang")
    evaluate = CommandEvaluator(**{**command, "command": hanging, "timeout": 0.2})
    with pytest.raises(EvaluationError, match=r"took more than 0\.2 s"):
        evaluate(point)
    nothing = command["command"].replace(" well", " null")
    assert math.isnan(CommandEvaluator(**{**command, "command": nothing})(point)["kept"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "eval.sh {out}"}, "says nothing of {model}"),
        ({"command": "eval.sh '{model}"}, "cannot be read"),
        ({"scores": []}, "no score is read"),
        ({"scores": ["scores.json"]}, "is no score"),
        ({"scores": ["=scores.json:a"]}, "is no score"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    change: dict[str, Any], message: str, command: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=message):
        CommandEvaluator(**{**command, **change})


def test_a_command_that_is_not_there_ends_the_search(command: dict[str, Any]) -> None:
    evaluate = CommandEvaluator(**{**command, "command": "/no/such/program {model}"})
    with pytest.raises(UsageError, match="'/no/such/program' cannot be run: No such file"):
        search(evaluate, Space(0, 4), maximise="quality", subject_to=["kept>0"])


def test_what_merge_refuses_ends_the_search(command: dict[str, Any], tmp_path: Path) -> None:
    evaluate = CommandEvaluator(**{**command, "unlearned": tmp_path / "missing"})
    with pytest.raises(uipe_merge.UipeMergeError, match="missing"):
        search(evaluate, Space(0, 4), maximise="quality", subject_to=["kept>0"])


def test_names_of_scores() -> None:
    assert parse_score("a/b.json:Forget Quality") == (
        "forget_quality",
        "a/b.json",
        "Forget Quality",
    )
    assert parse_score("x=b.json:y.z") == ("x", "b.json", "y.z")
    assert parse_score("b.json:y.z").name == "z"


def test_a_trial_is_written_as_json() -> None:
    result, _ = run(peak(1.3), fine, trials=5)
    documents = json.loads(json.dumps([trial.document() for trial in result.trials]))
    assert [each["alphas"] for each in documents] == [[at] for at in (0.0, 1.0, 2.0, 3.0, 4.0)]
    assert documents[0]["recipe"]["alpha"] == "0x0.0p+0"
