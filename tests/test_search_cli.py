"""``uipe-merge search``: a real command that evaluates, the winner, kills, and refusals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Result, assert_refused, contents, run_here, write_pair

from uipe_merge.cli import app as program
from uipe_merge.cli.search import search
from uipe_merge.output.lock import hold

# α as the weights of the model say it, by the projection of its step on the update.
EVALUATOR = """
import json, os, struct, sys, time
root, model, out, *how = sys.argv[1:]

def norm(directory):
    with open(directory + "/model.safetensors", "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(size))["model.norm.weight"]
        start, end = entry["data_offsets"]
        file.seek(8 + size + start)
        raw = file.read(end - start)
    form, low = ("<e", b"") if entry["dtype"] == "F16" else ("<f", b"\\0\\0")
    return [struct.unpack(form, low + raw[at:at + 2])[0] for at in range(0, len(raw), 2)]

calls = root + "/calls"
with open(calls, "a") as file:
    file.write("x")
if "die" in how and os.path.getsize(calls) == 4:
    os.kill(os.getppid(), 9)
if "hang" in how:
    with open(root + "/pid.tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename(root + "/pid.tmp", root + "/pid")
    time.sleep(600)
if "fail" in how:
    sys.exit("error: no GPU")
original, unlearned, moved = map(norm, (root + "/original", root + "/unlearned", model))
update = [u - o for u, o in zip(unlearned, original)]
step = [m - u for m, u in zip(moved, unlearned)]
alpha = sum(s * v for s, v in zip(step, update)) / sum(v * v for v in update)
scores = {"quality": -(alpha - 1.2) ** 2, "utility": 1 - alpha / 4}
if "null" in how and alpha > 3:
    scores["quality"] = None
with open(out + "/scores.json", "w") as file:
    json.dump({"all": scores}, file)
"""

RUNNER = """
import sys
from uipe_merge.cli import app
from uipe_merge.cli.search import search
app.app.command("search")(search)
app.main()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pair, an evaluator, and a program that has the command."""
    write_pair(tmp_path)
    (tmp_path / "evaluate.py").write_text(EVALUATOR)
    monkeypatch.chdir(tmp_path)
    before = list(program.app.registered_commands)
    program.app.command("search")(search)
    yield tmp_path
    program.app.registered_commands[:] = before


def words(root: Path, *extra: object, how: str = "", trials: int = 9) -> list[str]:
    command = shlex.join([sys.executable, "-I", "-S", str(root / "evaluate.py"), str(root)])
    options = ["--score", "scores.json:all.quality", "--score", "Kept=scores.json:all.utility"]
    pair = [str(root / "original"), str(root / "unlearned"), "-o", str(root / "best")]
    asked = ["--eval", f"{command} {{model}} {{out}} {how}", "--trials", str(trials)]
    return ["search", *pair, *asked, *options, *map(str, extra)]


KEEPING = ("--maximize", "quality", "--subject-to", "kept>=0.75")


def run(root: Path, *extra: object, how: str = "", trials: int = 9) -> Result:
    return run_here(*words(root, *extra, how=how, trials=trials))


def calls(root: Path) -> int:
    path = root / "calls"
    return path.stat().st_size if path.exists() else 0


def study(root: Path) -> dict[str, Any]:
    found = json.loads((root / "best.search" / "study.json").read_text())
    assert isinstance(found, dict)
    return found


def merged(root: Path, *options: object) -> dict[str, bytes]:
    """What merge writes at the same place; the winner is there again afterwards."""
    (root / "best").rename(root / "aside")
    done = run_here(*options)
    assert done.code == 0, done
    found = contents(root / "best")
    (root / "best").rename(root / "merged")
    (root / "aside").rename(root / "best")
    return found


def test_the_winner_is_what_merge_writes_and_nothing_is_done_twice(root: Path) -> None:
    done = run(root, *KEEPING)
    assert done.code == 0, done
    found = study(root)
    [alpha] = found["chosen"]["alphas"]
    assert alpha == 1.0  # the constraint holds up to there
    best = contents(root / "best")
    pair = (root / "original", root / "unlearned", "-o", root / "best")
    assert best == merged(root, *pair, "--alpha", alpha)
    assert best.keys() <= json.loads(best["uipe_merge.json"])["files"].keys() | {"uipe_merge.json"}
    assert run_here("verify", root / "best").code == 0
    assert found["objective"] == {"metric": "quality", "direction": "maximize"}
    assert found["constraints"] == ["kept>=0.75"]
    assert len(found["trials"]) == calls(root) == 9
    lines = done.out.splitlines()
    assert lines[0].split() == ["trial", "α", "quality", "kept"]
    [mark] = [line for line in lines if line.endswith("→")]
    assert mark.split()[1] == "1"
    assert found["reason"] in lines
    assert found["reason"].startswith("α = 1 has the highest quality, ")
    assert found["reason"].endswith(" that keep kept>=0.75")
    assert done.err.count("quality") == 9
    assert sorted(each.name for each in (root / "best.search").iterdir()) == [
        "study.json",
        "trials.jsonl",
    ]

    times = [each.stat().st_mtime_ns for each in sorted((root / "best").iterdir())]
    again = run(root, *KEEPING)
    assert (again.code, again.out) == (0, done.out)
    assert calls(root) == 9
    assert times == [each.stat().st_mtime_ns for each in sorted((root / "best").iterdir())]
    assert run(root, *KEEPING, trials=11).code == 0  # the same model is the best
    assert calls(root) == 11


def test_a_killed_search_goes_on_with_the_same_command(root: Path) -> None:
    arguments = words(root, *KEEPING, how="die")
    killed = subprocess.run(
        [sys.executable, "-c", RUNNER, *arguments], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (root / "best").exists()
    assert len(list((root / "best.search" / "models").iterdir())) == 1
    assert len((root / "best.search" / "trials.jsonl").read_text().splitlines()) == 1 + 3
    done = run_here(*arguments)
    assert done.code == 0, done
    assert calls(root) == 9 + 1  # the one that died was made again, and no other
    assert not (root / "best.search" / "models").exists()
    kept, best = study(root), contents(root / "best")
    (root / "best.search").rename(root / "first")
    (root / "best").rename(root / "other")
    assert run_here(*arguments).code == 0
    assert (study(root), contents(root / "best")) == (kept, best)


DYING = """
import os
from uipe_merge.output.staging import Staging
real = Staging.{step}
def dying(self, *arguments, **options):
    if self.output.name == "best":
        os.kill(os.getpid(), 9)
    return real(self, *arguments, **options)
Staging.{step} = dying
"""


@pytest.mark.parametrize("step", ["publish", "settle"])
def test_a_run_killed_while_the_winner_was_written_goes_on(step: str, root: Path) -> None:
    arguments = words(root, *KEEPING, trials=5)
    killed = subprocess.run(
        [sys.executable, "-c", DYING.format(step=step) + RUNNER, *arguments],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (root / "best").exists() == (step == "settle")
    assert (root / ".best.uipe-partial").exists()
    done = run_here(*arguments)
    assert done.code == 0, done
    assert calls(root) == 5
    assert not list(root.glob(".*"))
    pair = (root / "original", root / "unlearned", "-o", root / "best")
    assert contents(root / "best") == merged(root, *pair, "--alpha", 1)


def test_a_signal_ends_the_command_too_and_leaves_no_model(root: Path) -> None:
    arguments = words(root, *KEEPING, how="hang")
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (root / "pid").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            process.terminate()
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((root / "pid").read_text()), 0)
    assert list((root / "best.search" / "models").iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--per-layer-groups", 2, "--seed", 3, "--sampler", "nsga2", "--alphas", "0:2"),
        ("--rounding", "stochastic", "--seed", 7, "--dtype", "float16", "--threads", 1),
    ],
    ids=["layers", "chance"],
)
def test_options_of_the_merge_and_several_alphas(options: tuple[object, ...], root: Path) -> None:
    # What is measured lies in no layer: all are alike there, and the smallest α is taken.
    bound = "1*unlearned" if "--per-layer-groups" in options else "-1"
    subject = ("--minimize", "kept", "--subject-to", f"quality>={bound}", "--json")
    done = run(root, *options, *subject, "-q", trials=6)
    assert done.code == 0, done
    assert done.err == ""
    found = json.loads(done.out)
    assert found == study(root)
    assert found["objective"]["direction"] == "minimize"
    assert len(found["trials"]) == 6
    command = shlex.split(found["chosen"]["command"])
    assert command[0] == "uipe-merge"
    assert contents(root / "best") == merged(root, *command[1:])
    if "--per-layer-groups" in options:
        assert found["space"]["names"] == ["layer 0", "layer 1"]
        assert "--alpha-layers" in command
    else:
        assert {"--seed", "--dtype", "--rounding"} <= set(command)


def test_nobody_meets_the_constraint(root: Path) -> None:
    for quiet in ((), ("-q",)):
        done = run(root, "--maximize", "quality", "--subject-to", "kept>=7", *quiet, trials=5)
        assert done.code == 0, done
        assert "nothing was found: no model keeps kept>=7; α = 0 comes nearest" in done.out
        assert not (root / "best").exists()
        assert study(root)["chosen"] is None
        assert "→" not in done.out
    assert calls(root) == 5
    assert not list(root.glob(".*"))


def test_a_score_that_is_null_is_written_as_such(root: Path) -> None:
    done = run(root, *KEEPING, "--json", how="null", trials=5)
    assert done.code == 0, done
    assert "NaN" not in done.out
    qualities = [each["scores"]["quality"] for each in json.loads(done.out)["trials"]]
    assert qualities[-1] is None
    assert "nan" in run(root, *KEEPING, how="null", trials=5).out


@pytest.mark.parametrize(
    ("extra", "code", "fragments"),
    [
        ((), 2, ["what is looked for is one score"]),
        ((*KEEPING, "--minimize", "kept"), 2, ["give --maximize or --minimize"]),
        (("--maximize", "quality"), 2, ["nothing is searched for on quality alone"]),
        (("--maximize", "speed", "--subject-to", "kept>=1"), 2, ["no score is called 'speed'"]),
        (("--maximize", "quality", "--subject-to", "x>=1"), 2, ["no score is called 'x'"]),
        (("--maximize", "quality", "--subject-to", "kept"), 3, ["not a constraint"]),
        ((*KEEPING, "--score", "a.json:kept"), 2, ["two scores are called 'kept'"]),
        ((*KEEPING, "--score", "a.json"), 2, ["is no score"]),
        ((*KEEPING, "--alphas", "4"), 2, ["'4' is no range"]),
        ((*KEEPING, "--alphas", "4:0"), 2, ["nothing lies between"]),
        ((*KEEPING, "--per-layer-groups", 3), 2, ["has 2 layers"]),
        ((*KEEPING, "--sampler", "luck"), 2, ["luck"]),
        ((*KEEPING, "--dtype", "int8"), 2, ["unknown dtype"]),
        ((*KEEPING, "--eval", "run {out}"), 2, ["says nothing of {model}"]),
        ((*KEEPING, "--eval", "/no/such {model}"), 2, ["'/no/such' cannot be run"]),
        ((*KEEPING, "-o", "s3://bucket/best"), 2, ["on this machine"]),
        ((*KEEPING, "-o", "original"), 2, ["is an input"]),
        ((*KEEPING, "-o", "no/such/best"), 8, ["no such directory"]),
        ((*KEEPING, "--work", "unlearned/work"), 2, ["lies in the input"]),
        ((*KEEPING, "--work", "best/work"), 8, ["no such directory"]),
        ((*KEEPING, "--work", "taken"), 8, ["is of no search and holds 'mine'"]),
        ((*KEEPING, "-o", "taken"), 8, ["exists and is not empty"]),
        ((*KEEPING, "-o", "taken", "--overwrite"), 8, ["was not written by this tool"]),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_model_is_made(
    extra: tuple[object, ...], code: int, fragments: list[str], root: Path
) -> None:
    (root / "taken").mkdir()
    (root / "taken" / "mine").write_text("dear")
    before = contents(root)
    pytest.importorskip("s3fs")
    assert_refused(run(root, *extra), code, *fragments)
    assert calls(root) == 0
    after = {name: each for name, each in contents(root).items() if not name.startswith("best.s")}
    assert after == before
    if "/no/such {model}" in extra:  # known only once it is run
        assert run(root, *KEEPING, trials=1).code == 0
    else:
        assert not (root / "best.search").exists()


def test_an_evaluation_that_always_fails_and_inputs_that_are_missing(root: Path) -> None:
    done = run(root, *KEEPING, how="fail")
    assert_refused(done, 2, "every evaluation fails", "error: no GPU")
    assert calls(root) == 3
    assert run(root, *KEEPING, trials=1).code == 0  # the command was put right
    (root / "unlearned" / "model.safetensors").unlink()
    assert_refused(run(root, *KEEPING, "--work", "other"), 4, "unlearned")
    assert not (root / "other").exists()


def test_another_search_or_a_running_one_holds_the_directory(root: Path) -> None:
    assert run(root, *KEEPING, trials=2).code == 0
    other = ("--maximize", "quality", "--subject-to", "kept>=0.7")
    assert_refused(run(root, *other), 2, "holds another search")
    with hold(root / "best.search"):
        assert_refused(run(root, *KEEPING), 9)
    file = root / "unlearned" / "model.safetensors"
    os.utime(file, ns=(1, 1))  # the checkpoint may be another
    assert_refused(run(root, *KEEPING, "--overwrite"), 2, "holds another search")
    assert calls(root) == 2
    (root / "mine").mkdir()
    (root / "mine" / "trials.jsonl").write_text('{"of": "mine"}\n')
    assert_refused(run(root, *KEEPING, "--overwrite", "--work", "mine"), 2, "holds another search")
    assert contents(root / "mine") == {"trials.jsonl": b'{"of": "mine"}\n'}


def test_a_model_in_the_way_is_replaced_where_that_is_asked_for(root: Path) -> None:
    pair = (root / "original", root / "unlearned", "-o", root / "best")
    assert run_here(*pair, "--alpha", 3).code == 0
    before = contents(root / "best")
    assert_refused(run(root, *KEEPING), 8, "exists and is not empty")
    assert contents(root / "best") == before
    assert calls(root) == 0
    work = ("--work", root / "elsewhere")
    assert run(root, *KEEPING, "--overwrite", *work, trials=5).code == 0
    assert study_alpha(root / "elsewhere") == [1.0]
    assert contents(root / "best") == merged(root, *pair, "--alpha", 1)


def study_alpha(work: Path) -> object:
    return json.loads((work / "study.json").read_text())["chosen"]["alphas"]
