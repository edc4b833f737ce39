"""Recipes of mergekit's run here, ours printed for it, and uipe in it: held against the real one."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Result, bits, contents, moved, read_tensors, run_cli, run_here, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uipe_merge import native
from uipe_merge.mergekit_file import read_config
from uipe_merge.mergekit_recipe import alpha_of, single, weight_of

LAYERS = 4
WIDTH, ROWS = 16, 32
Document = dict[str, Any]

pytest.importorskip("mergekit", reason="the extra mergekit is not installed")


def config(kind: str, *, tied: bool) -> Document:
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "vocab_size": ROWS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    said = {"model_type": kind, "architectures": [architecture], "tie_word_embeddings": tied}
    return {**said, **sizes, **heads, "num_hidden_layers": LAYERS}


def tensors(kind: str, dtype: torch.dtype, *, tied: bool) -> dict[str, torch.Tensor]:
    """A small model with zeros of both signs, subnormal numbers and large ones in it."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH)}
    for layer in range(LAYERS):
        here = f"model.layers.{layer}."
        for name, rows in (("q", WIDTH), ("k", 8), ("v", 8)):
            shapes[f"{here}self_attn.{name}_proj.weight"] = (rows, WIDTH)
            if kind == "qwen2":
                shapes[f"{here}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{here}self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        for name in ("up", "gate"):
            shapes[f"{here}mlp.{name}_proj.weight"] = (24, WIDTH)
        shapes[f"{here}mlp.down_proj.weight"] = (WIDTH, 24)
        for name in ("input", "post_attention"):
            shapes[f"{here}{name}_layernorm.weight"] = (WIDTH,)
    shapes["model.norm.weight"] = (WIDTH,)
    if not tied:
        shapes["lm_head.weight"] = (ROWS, WIDTH)
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    for tensor in found.values():
        flat = tensor.view(-1)
        flat[:6] = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 300.0, -0.0])
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def write_models(
    root: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, *, tied: bool = False
) -> Path:
    before = tensors(kind, dtype, tied=tied)
    after = moved(before)
    for name, tensor in after.items():  # v = 0, and θᵤ = −0 where θ₀ is 0
        tensor.view(-1)[:3] = before[name].view(-1)[:3]
        tensor.view(-1)[0] = -0.0
    for name, made in (("base", before), ("unlearned", after)):
        write_checkpoint(root / name, made, shards=2, config=config(kind, tied=tied))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": write_models(root / "llama"),
        "tied": write_models(root / "tied", tied=True),
        "qwen2": write_models(root / "qwen2", "qwen2", torch.float32, tied=True),
        "half": write_models(root / "half", dtype=torch.float16),
    }


@pytest.fixture(scope="module")
def by_mergekit() -> Callable[[str, Path], dict[str, torch.Tensor]]:
    """Run mergekit in this process, with uipe among its methods."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    from uipe_merge.integrations.mergekit import register

    register()
    register()

    def run(text: str, output: Path) -> dict[str, torch.Tensor]:
        asked = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(asked, str(output), MergeOptions(copy_tokenizer=False, quiet=True))
        return read_tensors(output)

    return run


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(
    root: Path,
    setting: Any,
    method: str = "task_arithmetic",
    dtype: str = "float32",
    out: str | None = "bfloat16",
) -> Document:
    word = "weight" if method == "task_arithmetic" else "alpha"
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "unlearned"), "parameters": {word: setting}}],
        "dtype": dtype,
        **({} if out is None else {"out_dtype": out}),
    }


def sliced(document: Document, cuts: list[tuple[int, int, Any]]) -> Document:
    """The same with a slice for every (first, last, setting)."""
    [model] = document.pop("models")
    [word] = model["parameters"]
    models = (document["base_model"], model["model"])
    document["slices"] = [
        {
            "sources": [{"model": name, "layer_range": [first, last]} for name in models],
            "parameters": {word: setting},
        }
        for first, last, setting in cuts
    ]
    return document


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert (bits(tensor) == bits(two[name])).all(), name


def here(*arguments: object) -> Result:
    result = run_here(*arguments)
    assert result.code == 0, result
    return result


KINDS: dict[str, Any] = {
    "scalar": 1.3,
    "gradient": [0.3, 4.7, -0.1],
    "with zeros": [0, 0.5, 0, 1],
    "nearly zero": 1e-20,
    "filters": [
        {"filter": "mlp", "value": [1.3, 2.7]},
        {"filter": "self_attn", "value": 0.7},
        {"filter": "layers.2", "value": 0},
        {"value": 1.1},
    ],
}


@pytest.mark.parametrize("method", ["task_arithmetic", "uipe"])
@pytest.mark.parametrize(
    ("kind", "model", "out"),
    [
        *((kind, "llama", "bfloat16") for kind in (*KINDS, "slices")),
        *((kind, "qwen2", None) for kind in ("filters", "slices")),
        ("filters", "tied", "bfloat16"),
        ("scalar", "half", "float16"),
    ],
)
def test_the_same_bits_in_both_programs(
    work: Path,
    models: dict[str, Path],
    by_mergekit: Callable[..., Any],
    model: str,
    out: str | None,
    kind: str,
    method: str,
) -> None:
    """Where −0, or a number that 1 + α has not, would show it too."""
    document = recipe(models[model], KINDS.get(kind), method, out=out)
    if kind == "slices":
        cuts: list[tuple[int, int, Any]] = [(0, 1, 1.7), (1, 3, [1.3, 2]), (3, 4, KINDS["filters"])]
        document = sliced(document, cuts)
    text = yaml.safe_dump(document)
    (work / "c.yml").write_text(text)
    here("c.yml", "-o", "ours", "--threads", 2)
    same(read_tensors(work / "ours"), by_mergekit(text, work / "theirs"))


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_torch_gives_the_bits_of_the_compiled_arithmetic(
    work: Path, models: dict[str, Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.COMPILED:
        pytest.skip("built without a compiler")
    for method in ("task_arithmetic", "uipe"):
        out = {"llama": "bfloat16", "qwen2": "float32"}[model]
        text = yaml.safe_dump(recipe(models[model], KINDS["filters"], method, out=out))
        (work / f"{method}.yml").write_text(text)
        here(f"{method}.yml", "-o", f"{method}-c")
        with monkeypatch.context() as patch:
            patch.setattr(native, "COMPILED", False)
            here(f"{method}.yml", "-o", f"{method}-torch", "--threads", 1)
        same(read_tensors(work / f"{method}-c"), read_tensors(work / f"{method}-torch"))


OPTIONS: dict[str, tuple[object, ...]] = {
    "scalar": ("--alpha", 0.3),
    "zero": ("--alpha", 0),
    "original": ("--alpha", -1),
    "gradient": ("--alpha", 0.7, "--alpha-gradient", "0,2.3,0.3"),
    "layers": ("--alpha", 0.3, "--alpha-layers", "0=0,2=1.7"),
    "rules": ("--alpha", 0.3, "--alpha-rule", "*.mlp.*=2.7", "--alpha-rule", "*norm*=-0.9"),
    "both": (
        *("--alpha", 0.3, "--alpha-rule", "*.layers.1.mlp.*=3", "--alpha-rule", "*q_proj*=0"),
        *("--alpha-layers", "1=0,3=1"),
    ),
}


@pytest.mark.parametrize("method", ["task_arithmetic", "uipe"])
@pytest.mark.parametrize(
    ("name", "model", "out"),
    [
        *((name, "llama", ()) for name in OPTIONS),
        ("gradient", "qwen2", ("--dtype", "bfloat16")),
    ],
)
def test_a_printed_recipe_gives_the_same_bits_in_both_programs(
    work: Path,
    models: dict[str, Path],
    by_mergekit: Callable[..., Any],
    name: str,
    model: str,
    out: tuple[str, ...],
    method: str,
) -> None:
    command = (models[model] / "base", models[model] / "unlearned", *OPTIONS[name], *out)
    printed = here(*command, "--print-mergekit", "--mergekit-method", method)
    assert printed.err == ""
    (work / "c.yml").write_text(printed.out)
    theirs = by_mergekit(printed.out, work / "theirs")
    here("c.yml", "-o", "ours")
    same(read_tensors(work / "ours"), theirs)
    if method == "uipe":  # to the last bit what the command itself makes
        here(*command, "-o", "direct")
        same(read_tensors(work / "direct"), theirs)


def test_a_float32_model_printed_for_uipe_is_computed_in_float64(
    work: Path, models: dict[str, Path], by_mergekit: Callable[..., Any]
) -> None:
    command = (models["qwen2"] / "base", models["qwen2"] / "unlearned", "--alpha", 0.3)
    printed = here(*command, "--print-mergekit", "--mergekit-method", "uipe").out
    assert yaml.safe_load(printed)["dtype"] == "float64"
    (work / "c.yml").write_text(printed)
    here("c.yml", "-o", "ours")
    here(*command, "-o", "direct")
    theirs = by_mergekit(printed, work / "theirs")
    same(read_tensors(work / "ours"), theirs)
    same(read_tensors(work / "direct"), theirs)


def test_uipe_sums_the_updates_of_several_models(
    work: Path, models: dict[str, Path], by_mergekit: Callable[..., Any]
) -> None:
    root = models["llama"]
    second = write_checkpoint(
        work / "second",
        moved(read_tensors(root / "base"), seed=7),
        config=config("llama", tied=False),
    )
    document = recipe(root, 0.5, "uipe", out=None)
    document["models"].append({"model": str(second), "parameters": {"alpha": -0.25}})
    theirs = by_mergekit(yaml.safe_dump(document), work / "theirs")
    base, one, two = (read_tensors(path) for path in (root / "base", root / "unlearned", second))
    for name, tensor in theirs.items():
        o = base[name].double()
        expected = o + 1.5 * (one[name].double() - o) + 0.75 * (two[name].double() - o)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


NUMBERS = st.one_of(st.floats(-3, 5, width=32), st.sampled_from([0, 1, 1.3, 2]))
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5))
TEXTS = ["mlp", "self_attn", "layers.1", "q_proj.weight", "norm", "lm_head", "*", "absent"]
FILTERS = st.builds(
    lambda entries, last: [*({"filter": text, "value": v} for text, v in entries), {"value": last}],
    st.lists(st.tuples(st.sampled_from(TEXTS), VALUES), max_size=3),
    VALUES,
)
SETTINGS = st.one_of(VALUES, FILTERS)
CUTS = st.sampled_from([[0, 4], [0, 1, 4], [0, 2, 3, 4], [0, 3, 4]])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_tensor_gets_the_value_that_mergekit_gives_it(
    models: dict[str, Path],
    by_mergekit: Callable[..., Any],
    tmp_path: Path,
    data: st.DataObject,
) -> None:
    document = recipe(models["llama"], data.draw(SETTINGS))
    if data.draw(st.booleans()):
        cuts = data.draw(CUTS)
        pairs = list(itertools.pairwise(cuts))
        document = sliced(document, [(*pair, data.draw(SETTINGS)) for pair in pairs])
        if data.draw(st.booleans()):  # the innermost decides
            source = document["slices"][-1]["sources"][1]
            source["parameters"] = {"weight": data.draw(st.one_of(NUMBERS, FILTERS))}
    path = tmp_path / "c.yml"
    path.write_text(yaml.safe_dump(document))
    found = read_config(path).recipe.mergekit
    assert found is not None
    expected = dict(planned(document))
    assert found.values(list(expected)) == expected
    for name, alpha in found.alphas(list(expected)).items():
        assert alpha == pytest.approx(expected[name] - 1, rel=1e-12)


def planned(document: Document) -> Iterator[tuple[str, float]]:
    """The weight that mergekit plans for every tensor."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions
    from mergekit.plan import MergePlanner

    asked = MergeConfiguration.model_validate(document)
    options = MergeOptions()
    planner = MergePlanner(
        asked,
        get_architecture_info(asked, options),
        options=options,
        out_model_config=asked.base_model.config(),
    )
    planner._plan()
    for info, task in planner._tensors:
        [values] = [
            dict(values.items())
            for model, values in task.input_parameters.items()
            if model != asked.base_model
        ]
        yield info.name, values["weight"]


@given(alpha=st.one_of(st.floats(-(2**23), 2**23), st.floats(-2, 2)))
def test_a_weight_is_one_plus_alpha_in_float32(alpha: float) -> None:
    weight = weight_of(alpha)
    assert single(weight) == single(1 + alpha)
    assert alpha_of(weight) == pytest.approx(alpha, rel=1e-9, abs=1e-9)


def refused(work: Path, document: Document | str, code: int, *fragments: str) -> str:
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    (work / "c.yml").write_text(text)
    result = run_here("c.yml", "-o", "out")
    assert result.code == code, result
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("error: c.yml: ")
    for fragment in fragments:
        assert fragment in result.err
    assert not (work / "out").exists()
    return result.err


def test_all_that_is_not_done_here_is_named_at_once(work: Path, models: dict[str, Path]) -> None:
    document = recipe(models["llama"], 2)
    document |= {
        "merge_method": "ties",
        "tokenizer_source": "union",
        "chat_template": "auto",
        "dtype": "float64",
        "mystery": 1,
    }
    document["models"].append({"model": "third", "parameters": {"weight": 1}})
    document["parameters"] = {"normalize": True, "lambda": 0.5, "gamma": 1, "density": 0.5}
    refused(
        work,
        document,
        3,
        *("merge_method: ties", "tokenizer_source", "chat_template", "dtype: float64", "mystery"),
        *("2 models besides the base", "parameters.normalize", "parameters.lambda", "gamma"),
        "uipe-merge mergekit CONFIG OUT",
    )
    assert "density" not in (work / "c.yml").with_name("missing").name


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("merge_method: &a task_arithmetic\nbase_model: *a\n", ["anchor"]),
        ("merge_method: uipe\nmerge_method: uipe\n", ["'merge_method' twice"]),
        ("merge_method: !!python/object:os.system x\n", ["tag"]),
        ("[" * 3000, ["nested too deeply"]),
        ("- 1\n", ["not a mapping"]),
        ("merge_method: uipe\n", ["base_model"]),
        ("merge_method: uipe\nbase_model: b\n", ["not just one of models and slices"]),
        ("merge_method: uipe\nbase_model: b\nmodels: []\n", ["models is not a list"]),
        ("\x00", ["malformed"]),
    ],
)
def test_hostile_and_malformed_files(work: Path, text: str, fragments: list[str]) -> None:
    refused(work, text, 3, *fragments)


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        (True, "True, not a number"),
        ("much", "'much', not a number"),
        (float("nan"), "nan"),
        ([], "an empty list"),
        ([1, "x"], "'x', not a number"),
        ([{"filter": "mlp"}], "not just value and filter"),
        ([{"filter": 3, "value": 1}], "not a text"),
    ],
)
def test_values_that_are_none(
    work: Path, models: dict[str, Path], setting: Any, fragment: str
) -> None:
    refused(work, recipe(models["llama"], setting), 3, fragment)


def test_a_weight_that_is_too_large(work: Path, models: dict[str, Path]) -> None:
    (work / "c.yml").write_text(yaml.safe_dump(recipe(models["llama"], 2.0**24)))
    assert run_here("c.yml", "-o", "out").code == 7


def test_layers_and_tensors_that_nothing_decides_about(work: Path, models: dict[str, Path]) -> None:
    root = models["llama"]
    two = [(0, 2, 1), (2, 3, 1)]
    (work / "c.yml").write_text(yaml.safe_dump(sliced(recipe(root, 1), [*two])))
    result = run_here("c.yml", "-o", "out")
    assert (result.code, "slices of 3 layers, and the model has 4" in result.err) == (3, True)
    (work / "c.yml").write_text(yaml.safe_dump(recipe(root, [{"filter": "mlp", "value": 1}])))
    result = run_here("c.yml", "-o", "out")
    assert (result.code, "c.yml: has no weight for " in result.err) == (3, True)
    assert "model.embed_tokens.weight" in result.err
    refused(work, sliced(recipe(root, 1), [(0, 2, 1), (1, 4, 1)]), 3, "slices[1] beginning")


def test_other_types_are_said_to_be_computed_in_float32(
    work: Path, models: dict[str, Path], by_mergekit: Callable[..., Any]
) -> None:
    exact = yaml.safe_dump(recipe(models["llama"], 1.3))
    (work / "c.yml").write_text(
        yaml.safe_dump(recipe(models["llama"], 1.3, dtype="bfloat16", out=None))
    )
    result = here("c.yml", "-o", "ours")
    assert "warning: c.yml: dtype: bfloat16: mergekit rounds to it" in result.err
    same(read_tensors(work / "ours"), by_mergekit(exact, work / "theirs"))


def test_what_has_no_effect_in_mergekit_has_none_here(work: Path, models: dict[str, Path]) -> None:
    document = recipe(models["llama"], "13e-1")
    document["parameters"] = {"int8_mask": True, "density": 0.5, "normalize": False, "lambda": 1}
    document["models"].insert(
        0,
        {"model": document["base_model"], "parameters": {"weight": [{"filter": "x", "value": 1}]}},
    )
    (work / "c.yml").write_text(yaml.safe_dump(document))
    result = here("c.yml", "-o", "odd")
    for said in (
        "int8_mask: without effect",
        "density: without",
        "models[0].parameters: of the base",
    ):
        assert said in result.err
    (work / "d.yml").write_text(yaml.safe_dump(recipe(models["llama"], 1.3)))
    here("d.yml", "-o", "plain")
    same(read_tensors(work / "odd"), read_tensors(work / "plain"))


def test_a_record_is_computed_again_and_slices_are_finished(
    work: Path, models: dict[str, Path]
) -> None:
    (work / "c.yml").write_text(yaml.safe_dump(recipe(models["llama"], [1, 3])))
    here("c.yml", "-o", "whole", "--max-shard-size", "8kB")
    here("verify", "whole", "--deep", "--sample", 1)
    parts = ["c.yml", "-o", "parts", "--max-shard-size", "8kB", "--slice"]
    here(*parts, "1/2")
    assert run_here("finish", "parts").code == 8
    here(*parts, "2/2")
    same(read_tensors(work / "whole"), read_tensors(work / "parts"))
    here("verify", "parts", "--deep", "--sample", 1)


def test_the_record_names_the_recipe_and_holds_it(work: Path, models: dict[str, Path]) -> None:
    text = yaml.safe_dump(recipe(models["llama"], [1, 3])) + "# ``` no fence ends here\n"
    (work / "c.yml").write_text(text)
    planned_only = json.loads(here("c.yml", "-o", "out", "--dry-run", "--json").out)
    assert not (work / "out").exists()
    assert {entry["alpha"] for entry in planned_only["alphas"]} >= {0.0, 2.0}
    here("c.yml", "-o", "out", "--max-shard-size", "20kB")
    manifest = json.loads((work / "out" / "uipe_merge.json").read_text())
    assert manifest["command"] == "uipe-merge c.yml --max-shard-size 20000 -o out"
    assert manifest["recipe"]["mergekit"]["config"] == text
    assert manifest["rule"].startswith("theta_0 + (1 + alpha)")
    card = (work / "out" / "README.md").read_text()
    assert "    merge_method: task_arithmetic\n" in card
    assert "uipe-merge c.yml" in card
    assert here("verify", "out").code == 0
    before = contents(work / "out")
    here("c.yml", "-o", "out", "--max-shard-size", "20kB", "--overwrite", "--threads", 1)
    assert contents(work / "out") == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("c.yml", "-o", "out", "--alpha", 2), "--alpha"),
        (("c.yml", "-o", "out", "--dtype", "float32", "--along", "x"), "--along, --dtype"),
        (("c.yml", "-o", "out", "--alpha-rule", "a=1"), "--alpha-rule"),
        (("c.yml", "-o", "out", "--recipe", "r.yml"), "--recipe"),
        (("c.yml", "--print-mergekit"), "--print-mergekit"),
        (("base", "-o", "out", "--alpha", 2), "UNLEARNED"),
        (("c.yml",), "--output"),
        (("base", "unlearned", "--alpha", 2), "--output"),
        (("a", "b", "--alpha", 2, "-o", "c", "--mergekit-method", "uipe"), "--mergekit-method"),
    ],
)
def test_options_that_do_not_go_together(
    work: Path, models: dict[str, Path], arguments: tuple[object, ...], named: str
) -> None:
    (work / "c.yml").write_text(yaml.safe_dump(recipe(models["llama"], 1)))
    result = run_here(*arguments)
    assert (result.code, result.out) == (2, ""), result
    for each in named.split(", "):
        assert each in result.err
    assert not (work / "out").exists()


def test_what_mergekit_has_no_word_for(work: Path, models: dict[str, Path]) -> None:
    root = models["llama"]
    options = ("--rounding", "stochastic", "--control", "random", "--max-shard-size", "1GB")
    command = (root / "base", root / "unlearned", "--alpha", 1, *options, "--print-mergekit")
    result = run_here(*command)
    assert (result.code, result.out) == (3, "")
    for word in ("--control", "--rounding", "--max-shard-size", "--out-shard-size"):
        assert word in result.err


def test_the_command_hands_over_to_mergekit(work: Path, models: dict[str, Path]) -> None:
    text = yaml.safe_dump(recipe(models["llama"], [0, 2.3], "uipe"))
    (work / "c.yml").write_text(text)
    options = ("--no-copy-tokenizer", "--out-shard-size", "20k", "--quiet")
    done = run_cli("mergekit", "c.yml", "theirs", *options, cwd=work)
    assert done.code == 0, done
    assert (work / "theirs" / "mergekit_config.yml").read_text() == text
    here("c.yml", "-o", "ours")
    same(read_tensors(work / "ours"), read_tensors(work / "theirs"))


def test_how_mergekit_ends_is_how_the_command_ends(work: Path, models: dict[str, Path]) -> None:
    (work / "c.yml").write_text(yaml.safe_dump(recipe(models["llama"], 1)))
    result = run_here("mergekit", "c.yml", "out", "--no-such-option")
    assert (result.code, "--no-such-option" in result.err) == (2, True)
    result = run_here("mergekit", "missing.yml", "out")
    assert result.code == 1
    assert "mergekit failed with FileNotFoundError" in result.err
    assert "bug in uipe-merge" not in result.err


def test_without_mergekit_the_command_says_what_to_install(work: Path) -> None:
    code = (
        "import sys; sys.modules['mergekit'] = None; sys.argv[1:] = ['mergekit', 'c.yml', 'out']\n"
        "import importlib.metadata as m; found = m.version\n"
        "def version(name):\n"
        "    if name == 'mergekit': raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
        "from uipe_merge.cli.app import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ,
        cwd=work,
    )
    assert done.returncode == 2
    assert done.stderr == ("error: mergekit is not installed; pip install 'uipe-merge[mergekit]'\n")
