"""The embedded example does what it shows: forgetting grows with α, and the models load."""

import json
from pathlib import Path

import pytest
from helpers import read_tensors, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from uipe_merge import demo
from uipe_merge.progress import Silent


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoResult:
    return demo.run(tmp_path_factory.mktemp("demo"), Silent())


def test_alpha_lengthens_forgetting(result: demo.DemoResult) -> None:
    original, unlearned, one, two = result.rows
    assert original.forget > 0.9
    assert unlearned.forget < original.forget
    assert max(one.forget, two.forget) < unlearned.forget / 2
    assert two.related < unlearned.related / 2
    # Honest about the price: what should be kept suffers too.
    assert two.retain < unlearned.retain


def test_the_merged_model_loads_and_generates(result: demo.DemoResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(result.output)
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    ids = tokenizer("bob lives in", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0])
    assert text.startswith("bob lives in")


def test_the_manifest_names_every_tensor(result: demo.DemoResult) -> None:
    manifest = json.loads((result.output / "uipe_merge.json").read_text())
    assert manifest["tensors"].keys() == read_tensors(result.output).keys()


def test_the_command_runs_twice_and_prints_a_table(tmp_path: Path) -> None:
    first = run_cli("demo", tmp_path / "demo")
    assert first.code == 0, first.err
    finished = run_cli("demo", tmp_path / "demo")
    assert finished.code == 0, finished.err
    assert "merged, α = 2" in finished.out
    assert run_cli("verify", tmp_path / "demo" / "merged-2").code == 0
