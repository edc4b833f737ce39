"""A search that holds one model in memory: its scores, its winner, kills, and what it refuses."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import Result, assert_refused, contents, read_tensors, run_here, write_checkpoint
from test_evaluate import FACTS, FORGET, RETAIN, make_llama, make_tokenizer
from test_families import FAMILIES, make_pair

import uipe_merge
from uipe_merge import NumericError, Steering, UsageError, loading
from uipe_merge.recipe import Recipe
from uipe_merge.study import evaluate as study_evaluate
from uipe_merge.study import models
from uipe_merge.study.layouts import own_scores
from uipe_merge.study.questions import Question

QUICK = ("--device", "cpu", "--max-new-tokens", 4)
CHEAP: dict[str, Any] = {"device": "cpu", "max_new_tokens": 4, "progress": False}
BUT = "model_utility>=0"  # which a model of noise keeps, and one of NaN does not


def write_questions(path: Path, questions: list[Question]) -> Path:
    path.write_text(json.dumps([each.record for each in questions]))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with tokenizers, a retain-only model, and files of questions; nobody changes them."""
    root = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer()
    for number, name in enumerate(("original", "unlearned", "retain-only")):
        model = make_llama()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for weight in model.parameters() if number else ():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, questions in {"forget": FORGET, "retain": RETAIN, "facts": FACTS}.items():
        write_questions(root / f"{name}.json", questions)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with links to what was made."""
    for each in made.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def counted() -> Iterator[list[str]]:
    """Every model that is made, and every evaluation, in their order."""
    made: list[str] = []
    real = (loading.load, models.load, study_evaluate.evaluate)

    def load(*args: Any, **options: Any) -> Any:
        made.append("load")
        return real[0](*args, **options)

    def load_stored(*args: Any) -> Any:
        made.append("stored")
        return real[1](*args)

    def evaluate(*args: Any, **options: Any) -> Any:
        made.append("evaluate")
        return real[2](*args, **options)

    with (
        patch.object(loading, "load", load),
        patch.object(models, "load", load_stored),
        patch.object(study_evaluate, "evaluate", evaluate),
    ):
        yield made


def words(*extra: object, trials: int = 4) -> list[str]:
    files = ("--forget", "forget.json", "--retain", "retain.json")
    asked = ("search", "original", "unlearned", "-o", "best", *files, *QUICK, "--trials", trials)
    return list(map(str, (*asked, *extra)))


def run(*extra: object, trials: int = 4) -> Result:
    return run_here(*words(*extra, trials=trials))


REFERENCE = ("--reference", "retain-only")
KEEPING = ("--subject-to", BUT)


def study(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "best.search" / "study.json").read_text())
    return found


def merged_by(root: Path, command: str) -> dict[str, bytes]:
    """What the command of merge writes at the same place; the winner is there again afterwards."""
    (root / "best").rename(root / "aside")
    program, *arguments = shlex.split(command)
    assert program == "uipe-merge"
    done = run_here(*arguments)
    assert done.code == 0, done
    found = contents(root / "best")
    (root / "best").rename(root / "merged")
    (root / "aside").rename(root / "best")
    return found


def test_scores_are_those_of_the_written_model_and_the_winner_is_that_of_merge(
    root: Path, counted: list[str]
) -> None:
    done = run(*REFERENCE, *KEEPING, "--real-authors", "facts.json")
    assert done.code == 0, done
    assert counted == ["stored", "load", *["evaluate"] * 4]  # the reference, and then one model
    found = study(root)
    assert found["objective"] == {"metric": "forget_quality", "direction": "maximize"}
    assert contents(root / "best") == merged_by(root, found["chosen"]["command"])
    assert len(found["trials"]) == 4
    assert len({each["scores"]["forget_probability"] for each in found["trials"]}) == 4
    for number, trial in enumerate(found["trials"]):
        [alpha] = trial["alphas"]
        model = root / f"at-{number}"
        pair = ("original", "unlearned", "--alpha", alpha, "-o", model)
        assert run_here(*pair).code == 0
        files = ("--forget", "forget.json", "--retain", "retain.json")
        more = (*REFERENCE, "--real-authors", "facts.json", "-o", f"{model}.json")
        assert run_here("evaluate", model, *files, *more, *QUICK).code == 0
        written = json.loads(Path(f"{model}.json").read_text())
        assert trial["scores"] == own_scores(written)
    assert {"forget_quality", "retain_rouge", "fluency_forget", "real_authors_probability"} <= (
        found["trials"][0]["scores"].keys()
    )
    lines = done.out.splitlines()
    assert lines[0].split()[:4] == ["trial", "α", "forget_quality", "model_utility"]
    assert any("more scores: --json and the study have them" in line for line in lines)
    assert done.err.count("forget_quality") == 4
    names = sorted(each.name for each in (root / "best.search").iterdir())
    assert names == ["reference.json", "study.json", "trials.jsonl"]

    counted.clear()
    again = run(*REFERENCE, *KEEPING, "--real-authors", "facts.json")
    assert (again.code, again.out) == (0, done.out)
    assert counted == []  # all of it is known: no model is loaded
    more_trials = run(*REFERENCE, *KEEPING, "--real-authors", "facts.json", trials=5)
    assert more_trials.code == 0
    assert counted == ["load", "evaluate"]


def test_an_alpha_by_layer(root: Path, counted: list[str]) -> None:
    done = run("--per-layer-groups", 2, "--minimize", "forget_rouge", *KEEPING, trials=5)
    assert done.code == 0, done
    assert counted == ["load", *["evaluate"] * 5]
    found = study(root)
    assert found["space"]["names"] == ["layer 0", "layer 1"]
    assert "--alpha-layers" in found["chosen"]["command"]
    assert contents(root / "best") == merged_by(root, found["chosen"]["command"])
    result = uipe_merge.evaluate(root / "best", forget=FORGET, retain=RETAIN, **CHEAP)
    assert own_scores(result.as_dict()) == found["chosen"]["scores"]


DYING = """
import os, signal
from uipe_merge.study import evaluate
real, done = evaluate.evaluate, []
def dying(*args, **options):
    found = real(*args, **options)
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
evaluate.evaluate = dying
from uipe_merge.cli.app import main
main()
"""


def test_a_killed_search_goes_on_and_comes_to_the_same(root: Path, counted: list[str]) -> None:
    arguments = words(*REFERENCE, *KEEPING, trials=5)
    killed = subprocess.run(
        [sys.executable, "-c", DYING, *arguments], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (root / "best").exists()
    assert len((root / "best.search" / "trials.jsonl").read_text().splitlines()) == 1 + 2
    done = run_here(*arguments)
    assert done.code == 0, done
    # Two trials and the reference were kept; the one that died was made again.
    assert counted == ["load", *["evaluate"] * 3]
    kept, best = study(root), contents(root / "best")
    assert best == merged_by(root, kept["chosen"]["command"])
    (root / "best.search").rename(root / "first")
    (root / "best").rename(root / "other")
    assert run_here(*arguments).code == 0
    assert (study(root), contents(root / "best")) == (kept, best)


def test_trials_of_other_questions_are_not_taken(root: Path) -> None:
    write_questions(root / "fewer.json", FORGET[:-1])
    assert run(*REFERENCE, *KEEPING, trials=1).code == 0
    for change in (
        ("--forget", "fewer.json"),
        ("--limit", 2),
        ("--max-new-tokens", 5),
        ("--template", "{q} {a}"),
        ("--reference", "original"),
        ("--world-facts", "facts.json"),
    ):
        assert_refused(run(*REFERENCE, *KEEPING, *change, trials=2), 2, "holds another search")


def test_batch_size_and_device_do_not_make_it_another_search(
    root: Path, counted: list[str]
) -> None:
    assert run(*REFERENCE, *KEEPING, trials=1).code == 0
    counted.clear()
    more = ("--batch-size", 2, "--device", "auto")
    assert run(*REFERENCE, *KEEPING, *more, trials=1).code == 0
    assert counted == []
    (root / "tokenizer").mkdir()
    for name in ("original", "unlearned"):
        copied = root / "tokenizer" / name
        copied.mkdir()
        for file in (root / name).iterdir():
            os.link(file, copied / file.name)
    other = root / "tokenizer" / "unlearned" / "tokenizer_config.json"
    text = other.read_text()
    other.unlink()
    other.write_text(text + "\n")
    pair = [str(root / "tokenizer" / name) for name in ("original", "unlearned")]
    arguments = words(*REFERENCE, *KEEPING, trials=1)
    arguments[1:3] = pair
    assert_refused(run_here(*arguments), 2, "holds another search")


def test_an_alpha_that_overflows_is_a_trial_and_the_model_is_as_before(
    made: Path, root: Path, counted: list[str]
) -> None:
    for name, size in (("half-o", 0.0), ("half-u", 20_000.0)):
        model = make_llama()
        with torch.no_grad():
            model.model.norm.weight[0] = size
        model.half().save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    arguments = words("--minimize", "forget_probability", "--subject-to", "model_utility>=-1")
    arguments[1:3] = ["half-o", "half-u"]
    moved = loading.set_alpha
    states = []

    def watched(model: Any, **options: Any) -> None:
        before = {name: each.clone() for name, each in model.state_dict().items()}
        try:
            moved(model, **options)
        except NumericError:
            same = [torch.equal(before[name], each) for name, each in model.state_dict().items()]
            states.append(all(same))
            raise

    with patch.object(loading, "set_alpha", watched):
        done = run_here(*arguments)
    assert done.code == 0, done
    assert states  # beyond α = 2 float16 ends
    assert all(states)
    problems = [trial["problem"] for trial in study(root)["trials"]]
    assert [each is not None for each in problems] == [
        trial["alphas"][0] > 2.2 for trial in study(root)["trials"]
    ]
    assert "model.norm.weight" in next(each for each in problems if each)
    assert counted.count("load") == 1
    assert done.out.count("problem") == len(states)
    assert done.err.count("α = ") == len(problems)


def test_a_model_that_must_be_untied_is_loaded_again(
    root: Path, counted: list[str], tmp_path: Path
) -> None:
    pair = make_pair(FAMILIES["Llama, tied"], tmp_path / "tied")
    for side, shift in zip(pair, (0.0, 0.25), strict=True):
        tensors = read_tensors(side)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift
        config = json.loads((side / "config.json").read_text())
        for file in side.glob("*.safetensors"):
            file.unlink()
        write_checkpoint(side, tensors, config=config)

    def head(model: Any) -> dict[str, float]:
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        return {"tied": float(tied), "u": 1.0}

    options: dict[str, Any] = {"maximise": "tied", "subject_to": "u>=1", "progress": False}
    report = uipe_merge.search(
        *pair, root / "best", evaluate=head, alphas=(-1, 1), trials=3, **options
    )
    assert [(t.point.alpha, t.scores["tied"]) for t in report.trials] == [(-1, 1), (0, 0), (1, 0)]
    assert counted == ["load", "load"]


def test_all_scores_are_nan(made: Path, root: Path) -> None:
    for name in ("wild-o", "wild-u"):
        model = make_llama()
        with torch.no_grad():
            model.lm_head.weight *= 1e38  # finite, and no logit is
        if name == "wild-u":
            with torch.no_grad():
                model.model.norm.weight += 0.5
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    arguments = words(*REFERENCE, *KEEPING, trials=3)
    arguments[1:3] = ["wild-o", "wild-u"]
    done = run_here(*arguments)
    assert done.code == 0, done
    assert "nothing was found: at α = " in done.out
    assert "is nan" in done.out
    assert not (root / "best").exists()
    [*values] = {trial["scores"]["forget_quality"] for trial in study(root)["trials"]}
    assert values == [None]
    assert "NaN" not in (root / "best.search" / "study.json").read_text()
    relative = words(*REFERENCE, "--work", "elsewhere", trials=3)
    relative[1:3] = ["wild-o", "wild-u"]
    assert_refused(run_here(*relative), 2, "model_utility>=0.95*unlearned cannot be told", "is nan")


def test_nobody_meets_the_constraint(root: Path) -> None:
    done = run(*REFERENCE, "--subject-to", "model_utility>=0.99", trials=2)
    assert done.code == 0, done
    assert "nothing was found: no model keeps model_utility>=0.99; α = " in done.out
    assert not (root / "best").exists()
    assert study(root)["chosen"] is None


def test_one_trial_and_the_constraint_by_default(root: Path, counted: list[str]) -> None:
    done = run(*REFERENCE, trials=1)
    assert done.code == 0, done
    found = study(root)
    assert found["constraints"] == ["model_utility>=0.95*unlearned"]
    assert found["chosen"]["alphas"] == [0.0]  # the bound is relative to it, and it counts
    assert "nothing else was tried" in found["reason"]
    assert counted.count("evaluate") == 1
    outside = run(*REFERENCE, "--alphas", "1:2", "-o", "other", trials=1)
    assert outside.code == 0
    assert "every trial went to what a bound is relative to" in outside.out
    assert not (root / "other").exists()


@pytest.mark.parametrize(
    ("extra", "fragments"),
    [
        (("--eval", "run {model}"), ["--forget and --eval are two ways", "--eval and --score"]),
        (("--score", "a.json:x"), ["--forget and --score are two ways"]),
        ((), ["nothing to", "forget quality", "--reference or --retain-logs", "forget_probability"]),
        (("--maximize", "Forget Quality"), ["compares with a retain-only model"]),
        (("--minimize", "forget_rouge", "--subject-to", "forget_rouge>=0"), ["on forget_rouge alone"]),
        (("--minimize", "speed"), ["no score is called 'speed'", "forget_rouge"]),
        ((*REFERENCE, "--retain-logs", "x.json"), ["exclude each other"]),
        (("--reference", "nowhere"), ["nowhere: no such directory"]),
        (("--retain-logs", "nowhere"), ["nowhere: no such file"]),
        ((*REFERENCE, "--forget", "nowhere"), ["nowhere: no such file"]),
        ((*REFERENCE, "--max-new-tokens", 1000), ["generate fewer tokens"]),
        ((*REFERENCE, "--device", "tpu"), ["--device"]),
        ((*REFERENCE, "--template", "x"), ["template 'x' cannot be used"]),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(
    extra: tuple[object, ...], fragments: list[str], root: Path
) -> None:
    wanted = [each for each in fragments if each != "nothing to"]
    assert_refused(run(*extra, trials=1), 2, *wanted)
    assert not (root / "best").exists()
    assert (
        not (root / "best.search" / "trials.jsonl").exists()
        or "--max-new-tokens" in extra
        or ("--template" in extra)
    )


def test_questions_or_a_command_but_not_neither_nor_half(root: Path) -> None:
    bare = ("search", "original", "unlearned", "-o", "best")
    for given, missing in (
        ((), "--forget and --retain"),
        (("--forget", "forget.json"), "--retain"),
        (("--limit", 3), "--forget and --retain"),
        (("--eval", "run {model}"), "--score"),
        (("--score", "a.json:x"), "--eval"),
    ):
        done = run_here(*bare, *given)
        assert_refused(
            done, 2, f"without {missing};", "--forget and --retain, or --eval and --score"
        )
    for option in ("--batch-size", "--max-new-tokens"):
        command = ("--eval", "run {model}", "--score", "a.json:x")
        assert_refused(run_here(*bare, *command, option, 3), 2, f"{option} and --eval are two ways")


# ------------------------------------------------------------------ in Python


def test_a_function_gives_the_scores(root: Path, counted: list[str]) -> None:
    seen: list[int] = []
    pair = (root / "original", root / "unlearned")
    before, after = (models.load(each)[0].model.norm.weight.detach().double() for each in pair)
    update = after - before

    def score(model: Any) -> dict[str, float]:
        seen.append(id(model))
        assert not model.training
        step = (model.model.norm.weight.detach().double() - after) @ update / (update @ update)
        return {"Quality": -((float(step) - 1.2) ** 2), "kept": 1 - float(step) / 4}

    counted.clear()
    asked: dict[str, Any] = {"maximise": "quality", "subject_to": "kept>=0.7", "trials": 12}
    report = uipe_merge.search(*pair, root / "best", evaluate=score, **asked, progress=False)
    assert report.best is not None
    assert report.best.point.alpha == pytest.approx(1.2, abs=0.1)
    assert len(set(seen)) == 1
    assert counted == ["load"]
    assert (len(seen), len(report.trials)) == (12, 12)
    assert report.output == root / "best"
    assert report.document == study(root)
    assert contents(root / "best") == merged_by(root, report.command or "")
    again = uipe_merge.search(*pair, root / "best", evaluate=score, **asked, progress=False)
    assert (again.best, len(seen)) == (report.best, 12)

    def other(_: Any) -> dict[str, float]:
        return {"quality": math.nan}

    with pytest.raises(UsageError, match="holds another search"):
        uipe_merge.search(*pair, root / "best", evaluate=other, **asked, progress=False)


def test_a_function_that_fails_is_gone_on_from(root: Path, counted: list[str]) -> None:
    class Scores:
        identity = "mine"

        def __init__(self, most: int) -> None:
            self.left = most

        def __call__(self, model: Any) -> dict[str, float]:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no GPU")
            return {"q": float(model.uipe_extrapolation.recipe.alpha), "u": 1.0}

    pair = (root / "original", root / "unlearned", root / "best")
    options: dict[str, Any] = {"maximise": "q", "subject_to": ["u>=1"], "progress": False}
    with pytest.raises(RuntimeError, match="no GPU"):
        uipe_merge.search(*pair, evaluate=Scores(2), trials=5, **options)
    rest = Scores(3)
    report = uipe_merge.search(*pair, evaluate=rest, trials=5, **options)
    assert rest.left == 0
    assert report.best is not None
    assert report.best.point.alpha == 4.0


def test_questions_and_a_recipe_in_python(root: Path, counted: list[str]) -> None:
    recipe = Recipe(0.0, steering=Steering(control="random"), seed=3)
    report = uipe_merge.search(
        root / "original",
        root / "unlearned",
        root / "best",
        forget=[each.record for each in FORGET],
        retain=RETAIN,
        reference=[1.0, 2.0, 3.0],
        subject_to=["model_utility>=0.1*unlearned", BUT],
        recipe=recipe,
        alphas=(0.5, 2),
        trials=3,
        **CHEAP,
    )
    assert counted.count("load") == 1
    assert [trial.point.recipe.steering.control for trial in report.trials] == [
        "none",  # what the bound is relative to is the unlearned model itself
        "random",
        "random",
    ]
    assert report.command is not None
    assert "--control random" in report.command
    assert contents(root / "best") == merged_by(root, report.command)


def test_evaluate_takes_paths_models_files_and_lists(root: Path, counted: list[str]) -> None:
    reference = root / "retain-only"
    files: dict[str, Any] = {"forget": root / "forget.json", "retain": str(root / "retain.json")}
    found = uipe_merge.evaluate(root / "unlearned", **files, reference=reference, **CHEAP)
    model = loading.load(root / "original", root / "unlearned", alpha=0)
    lists: dict[str, Any] = {"forget": FORGET, "retain": [each.record for each in RETAIN]}
    tokenizer = make_tokenizer()
    ratios = uipe_merge.evaluate(reference, forget=FORGET, **CHEAP).truth_ratios
    asked: dict[str, Any] = {"tokenizer": tokenizer, **lists, **CHEAP}
    here = uipe_merge.evaluate(model, reference=list(ratios), **asked)
    assert here.as_dict() == found.as_dict()
    assert found.forget_quality is not None
    facts = uipe_merge.evaluate(model, **asked | {"limit": 2}, world_facts=FACTS)
    assert [len(split.losses) for split in facts.splits.values()] == [2, 2, 2]
    names = [
        *("forget_probability", "forget_rouge", "model_utility", "fluency_forget"),
        *("fluency_retain", "fluency_world_facts"),
        *(f"{s}_{m}" for s in ("retain", "world_facts") for m in ("probability", "rouge", "truth_ratio")),
    ]  # fmt: skip
    assert sorted(own_scores(facts.as_dict())) == sorted(names)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"forget": [{"question": "?"}], "retain": RETAIN}, "forget: question 1: has no 'answer'"),
        ({"forget": FORGET, "retain": FACTS}, "retain: question 1: has no 'paraphrased_answer'"),
        ({"forget": []}, "no questions"),
        ({"forget": FORGET, "reference": [1.0, math.nan]}, "no list of finite truth ratios"),
        ({"forget": FORGET, "reference": [1.0], "retain_logs": "x"}, "exclude each other"),
    ],
)
def test_evaluate_refuses(options: dict[str, Any], text: str, root: Path) -> None:
    with pytest.raises(UsageError, match=text):
        uipe_merge.evaluate(root / "unlearned", **options, **CHEAP)


def test_a_model_without_its_tokenizer_and_a_search_without_scores(root: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer; give it"):
        uipe_merge.evaluate(make_llama(), forget=FORGET, **CHEAP)
    pair = (root / "original", root / "unlearned", root / "best")
    with pytest.raises(UsageError, match="nothing gives the scores"):
        uipe_merge.search(*pair, maximise="q", subject_to="u>=1")
    with pytest.raises(UsageError, match="two ways to evaluate"):
        uipe_merge.search(*pair, evaluate=lambda _: {}, forget=FORGET, maximise="q")
    with pytest.raises(UsageError, match="on q alone"):
        uipe_merge.search(*pair, evaluate=lambda _: {}, maximise="q")
    several: Any = (0, 1, 2)
    with pytest.raises(UsageError, match="in a range"):
        uipe_merge.search(*pair, evaluate=lambda _: {}, maximise="q", alphas=several)
    assert not (root / "best.search").exists()
