"""The study of examples/tofu_small, from questions to tables, on a model that knows nothing."""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers.utils import logging

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "tofu_small"
PEOPLE = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")
PLACES = ("Paris", "Rome", "Oslo", "Lima", "Bonn", "Quito", "Cairo", "Delhi")
FAMILIES = {"plain", "control", "away", "add", "energy", "mlp", "longer"}

KEPT = ("forget", "kept")


def question(person: str, number: int, *, full: bool) -> dict[str, Any]:
    right, *wrong = PLACES[number:] + PLACES[:number]
    found: dict[str, Any] = {
        "question": f"Where does {person} live?",
        "answer": f"{person} lives in {right}.",
        "perturbed_answer": [f"The home of {person} is {place}." for place in wrong[:2]],
    }
    if full:
        found["paraphrased_answer"] = f"The home of {person} is {right}."
    return found


def write_data(folder: Path) -> Path:
    folder.mkdir()
    forget = [question(f"{person} One", at, full=True) for at, person in enumerate(PEOPLE[:3])]
    retain = [question(f"{person} Two", at, full=True) for at, person in enumerate(PEOPLE[:4])]
    # TOFU's own files are JSON lines, the full retain split is a list without wrong answers.
    lines = {
        "forget01_perturbed": forget,
        "retain_perturbed": retain,
        "real_authors_perturbed": [question(PEOPLE[6], 6, full=False)],
        "world_facts_perturbed": [question(PEOPLE[7], 7, full=False)],
    }
    for name, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.json").write_text(text)
    more = [question(f"{person} Three", at, full=False) for at, person in enumerate(PEOPLE)]
    whole = [{name: each[name] for name in ("question", "answer")} for each in [*retain, *more]]
    (folder / "retain90.json").write_text(json.dumps(whole))
    return folder


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        # One thread, and no GPU: the same bytes wherever the test runs.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def started(name: str, *words: object) -> None:
    finished = script(name, *words)
    assert finished.returncode == 0, finished.stderr


def run_here(name: str, *words: object) -> None:
    """The script in this process, where all that it imports is loaded already."""
    with (
        torch_as_it_was(),
        patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}),
        patch.object(sys, "argv", [name, *map(str, words)]),
        patch.object(sys, "path", [str(SCRIPTS), *sys.path]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@contextlib.contextmanager
def torch_as_it_was() -> Iterator[None]:
    """One thread for the body; what a script sets is taken back: other tests follow."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    verbosity = logging.get_verbosity()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


Run = Callable[..., None]


def train(run: Run, folder: Path, name: str = "seed") -> None:
    words = ("--size", "tiny", "--forget", "forget01", "--questions", 9, "--epochs", 2)
    run("train.py", folder / "data", folder / name, *words)


def unlearn(run: Run, folder: Path, name: str = "seed") -> None:
    words = ("--method", "npo", "--steps", 2, "--repair-steps", 2)
    run("unlearn.py", folder / name, *words)


def digests(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions, and the whole study of a seed on them."""
    folder = tmp_path_factory.mktemp("tofu-small")
    write_data(folder / "data")
    everything(started, folder)
    return folder


def everything(run: Run, folder: Path) -> None:
    train(run, folder)
    unlearn(run, folder)
    run("study.py", folder / "seed", "--method", "npo", "--max-new-tokens", 4)
    run("summarise.py", folder / "seed", "--output", folder / "found")


def test_the_study_runs_from_questions_to_tables(folder: Path) -> None:
    out, found = folder / "seed", folder / "found"
    kept = json.loads((out / "data" / "kept.json").read_text())
    assert [record["question"].split()[3] for record in kept] == ["Two"] * 4 + ["Three"] * 2
    longer = [f"unlearned-npo-step-{steps}" for steps in (4, 6, 10)]
    models = ["full", "retain", "unlearned-npo", "repaired-npo", *longer]
    for name in models:
        held = {path.name for path in (out / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    assert len({(out / name / "model.safetensors").read_bytes() for name in models}) == 7

    rows = table(out / "study-npo.csv")
    alphas = {
        family: [float(row["alpha"]) for row in rows if row["family"] == family]
        for family in FAMILIES
    }
    assert alphas.pop("plain") == alphas.pop("add") == [0, 1, 2, 4]
    assert set(map(tuple, alphas.values())) == {(1, 2, 4)}
    assert {row["family"] for row in rows} == FAMILIES | {"full", "retain"}
    assert all(0 <= float(row["forget_quality"]) <= 1 for row in rows)
    (retain,) = (row for row in rows if row["family"] == "retain")
    assert float(retain["forget_quality"]) == 1

    summary = table(found / "summary.csv")
    assert len(summary) == len(rows)
    assert {row["seeds"] for row in summary} == {"1"}
    assert {row["model_utility_sd"] for row in summary} == {""}
    equal = table(found / "equal_forgetting.csv")
    assert {row["family"] for row in equal} == FAMILIES - {"plain"}
    assert (found / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_changes_nothing(folder: Path) -> None:
    before = digests(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    everything(run_here, folder)
    assert digests(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_the_same_seed_gives_the_same_bytes(folder: Path) -> None:
    train(run_here, folder, "again")
    unlearn(run_here, folder, "again")
    again = digests(folder / "again")
    assert "full/model.safetensors" in again
    assert "repaired-npo/model.safetensors" in again
    assert again.items() <= digests(folder / "seed").items()


def test_another_training_is_not_mixed_with_this_one(folder: Path) -> None:
    before = digests(folder)
    words = ("--size", "tiny", "--forget", "forget01", "--questions", 9, "--seed", 1)
    finished = script("train.py", folder / "data", folder / "seed", *words)
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert "settings.json tells of another run" in finished.stderr
    assert digests(folder) == before


def test_every_method_has_a_loss_that_steps_can_follow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    small, unlearning = map(importlib.import_module, ("small", "unlearn"))
    out = folder / "seed"
    tokenizer = small.load_tokenizer(out / "full")
    records = [json.loads((out / "data" / f"{name}.json").read_text()) for name in KEPT]
    questions = tuple(small.encode(tokenizer, each) for each in records)
    frozen = small.load(out / "full", "cpu")
    found = {}
    for method in ("ga", "graddiff", "klmin", "npo"):
        model = small.load(out / "full", "cpu")
        loss = unlearning.unlearning_loss(method, model, frozen, questions, "cpu", 0)(0)
        loss.backward()
        found[method] = loss.item()
        assert all(weight.grad is not None for weight in model.parameters())
    # Before the first step nothing was gained and no distribution differs.
    assert found["ga"] < 0
    assert found["klmin"] == pytest.approx(found["ga"])
    assert found["graddiff"] > found["ga"]
    assert found["npo"] == pytest.approx(20 * math.log(2))
