"""``load``: a model at any α in memory, bit for bit what a merge would write and load back."""

import copy
import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits, contents, read_tensors, write_checkpoint
from safetensors.torch import save_file
from test_families import FAMILIES, PROMPT, Family, make_pair, no_complaints
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

import uipe_merge
from uipe_merge import IncompatibleModelsError, NumericError, Steering, Update, UsageError
from uipe_merge.loading import load, set_alpha
from uipe_merge.recipe import Recipe


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def written(root: Path, original: object, unlearned: object, **options: Any) -> Any:
    """The model that a merge writes, as transformers loads it."""
    uipe_merge.merge(
        str(original), str(unlearned), root / "merged", **options, overwrite=True, progress=False
    )
    return AutoModelForCausalLM.from_pretrained(root / "merged")


def assert_same(model: Any, wanted: Any) -> None:
    """Every parameter and every buffer, bit for bit, and the dtype and tying of each."""
    got, expected = model.state_dict(), wanted.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert np.array_equal(bits(got[name].cpu()), bits(tensor)), name
    named = [
        {name: id(each) for name, each in one.named_parameters(remove_duplicate=False)}
        for one in (model, wanted)
    ]
    names = list(named[1])
    tied = [{(a, b) for a in names for b in names if one[a] == one[b]} for one in named]
    assert tied[0] == tied[1]
    assert not model.training


# How each is stored, tied and sharded unlike, is said in FAMILIES.
@pytest.mark.parametrize(
    "name",
    ["Llama", "Llama, tied", "Qwen2", "Qwen2, tied", "Gemma 3", "GPT-2", "GPT-NeoX", "Mixtral"],
)
def test_a_loaded_model_is_the_written_one_and_moves_to_any_other(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    pair = make_pair(family, tmp_path)
    before = contents(tmp_path)
    with no_complaints():
        model = load(*pair, alpha=family.alpha)
    assert contents(tmp_path) == before
    assert_same(model, written(tmp_path, *pair, alpha=family.alpha))
    assert model.generation_config.max_new_tokens == 7
    parameters = {name: id(each) for name, each in model.named_parameters()}
    for alpha in (0.0, 1.5, -1.0, family.alpha):
        with no_complaints():
            model.set_alpha(alpha)
        assert_same(model, written(tmp_path, *pair, alpha=alpha))
        assert model.uipe_extrapolation.recipe.alpha == alpha
    assert {name: id(each) for name, each in model.named_parameters()} == parameters
    assert model.generate(PROMPT, do_sample=False).shape[1] > PROMPT.shape[1]


@pytest.mark.parametrize(("alpha", "side"), [(0.0, "unlearned"), (-1.0, "original")])
def test_alpha_0_and_minus_1_are_the_inputs(alpha: float, side: str, tmp_path: Path) -> None:
    pair = make_pair(FAMILIES["Qwen2, tied"], tmp_path)
    assert_same(load(*pair, alpha=alpha), AutoModelForCausalLM.from_pretrained(tmp_path / side))


OPTIONS: dict[str, dict[str, Any]] = {
    "rules": {"alpha": 1.0, "alpha_rules": {"*.mlp.*": 3.0, "model.embed*": 0.0}},
    "layers": {"alpha": -1.0, "alpha_layers": {0: 2.0, 1: 0.5}},
    "gradient": {"alpha": 0.0, "alpha_gradient": [1, 2]},
    "chance": {"alpha": 0.2, "rounding": "stochastic", "seed": 7},
    "wider": {"alpha": 0.2, "dtype": "float32"},
    "narrower": {"alpha": 2.0, "dtype": "float16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_those_of_merge(name: str, tmp_path: Path) -> None:
    pair = make_pair(FAMILIES["Llama"], tmp_path)
    options = OPTIONS[name]
    model = load(*pair, **options)
    assert_same(model, written(tmp_path, *pair, **options))
    rest = {key: value for key, value in options.items() if not key.startswith("alpha")}
    model.set_alpha(1.25, alpha_rules={"lm_head.*": 0.5})
    other = {"alpha": 1.25, "alpha_rules": {"lm_head.*": 0.5}, **rest}
    assert_same(model, written(tmp_path, *pair, **other))
    fields = [("rules", "alpha_rules"), ("layers", "alpha_layers"), ("gradient", "alpha_gradient")]
    back = {new: options[new] for _, new in fields if new in options}
    set_alpha(model, options["alpha"], **back)
    assert_same(model, written(tmp_path, *pair, **options))


def test_recipes_as_objects_and_as_files(tmp_path: Path) -> None:
    pair = make_pair(FAMILIES["Llama"], tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text("alpha: 0.5\nalpha_rules:\n  - {match: 'model.layers.1.*', alpha: 2}\n")
    model = load(*pair, recipe=Recipe(3.0, rounding="stochastic"))
    assert_same(model, written(tmp_path, *pair, alpha=3.0, rounding="stochastic"))
    model.set_alpha(recipe=file)
    assert_same(model, written(tmp_path, *pair, recipe=file))
    with pytest.raises(UsageError, match="other tensors"):
        model.set_alpha(recipe=Recipe(1.0, "float32"))
    with pytest.raises(UsageError, match="a recipe says all of it"):
        model.set_alpha(1.0, recipe=file)
    with pytest.raises(UsageError, match="no alpha"):
        model.set_alpha()
    assert_same(model, written(tmp_path, *pair, recipe=file))


def write_adapter(root: Path, base: Path) -> Path:
    """A LoRA adapter on two matrices of every layer."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in read_tensors(base).items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = tensor.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    root.mkdir()
    save_file(tensors, root / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def test_an_adapter_as_unlearned(tmp_path: Path) -> None:
    original, _ = make_pair(FAMILIES["Qwen3"], tmp_path)
    adapter = write_adapter(tmp_path / "adapter", original)
    model = load(original, adapter, alpha=1.5)
    assert_same(model, written(tmp_path, original, adapter, alpha=1.5))
    both = f"{original}+{adapter}"
    for alpha in (-1.0, 0.0, 1.5):
        model.set_alpha(alpha)
        assert_same(model, written(tmp_path, original, both, alpha=alpha))


@pytest.mark.parametrize("low_rank", [None, 2])
def test_steered_steps_are_measured_as_merge_measures(low_rank: int | None, tmp_path: Path) -> None:
    original, unlearned = make_pair(FAMILIES["Llama"], tmp_path)
    (tmp_path / "more").mkdir()
    related = tmp_path / "related"
    make_pair(FAMILIES["Llama"], tmp_path / "more")[1].rename(related)
    torch.manual_seed(1)
    near = {
        name: tensor + torch.randn_like(tensor) * 0.01
        for name, tensor in read_tensors(related).items()
    }
    config = json.loads((related / "config.json").read_text())
    write_checkpoint(tmp_path / "near", near, config=config)
    steering = Steering(along=(Update(str(tmp_path / "near")),), rank=low_rank)
    options: dict[str, Any] = {"alpha": 2.0, "steering": steering}
    model = load(original, unlearned, **options)
    assert_same(model, written(tmp_path, original, unlearned, **options))
    model.set_alpha(-0.5)
    assert_same(model, written(tmp_path, original, unlearned, alpha=-0.5, steering=steering))


def test_what_transformers_converts_is_moved_by_converting_again(tmp_path: Path) -> None:
    """Stored in float32 by a configuration that says bfloat16: every parameter is a copy."""
    pair = make_pair(Family("llama", {"tie_word_embeddings": True}, torch.float32), tmp_path)
    for side in pair:
        config = json.loads((side / "config.json").read_text())
        (side / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    model = load(*pair, alpha=1.0)
    assert model.dtype == torch.bfloat16
    assert not model.uipe_extrapolation.found
    for alpha in (1.0, -0.3, 0.0):
        model.set_alpha(alpha)
        assert_same(model, written(tmp_path, *pair, alpha=alpha))


def test_experts_are_converted_with_an_adapter_and_moved_in_place_without(tmp_path: Path) -> None:
    original, unlearned = make_pair(FAMILIES["Mixtral"], tmp_path)
    assert not load(original, unlearned, alpha=1).uipe_extrapolation.converted
    root = tmp_path / "adapter"
    stems = [name for name in read_tensors(original) if name.endswith("q_proj.weight")]
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight": torch.randn(shape)
        for name in stems
        for half, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    root.mkdir()
    save_file(tensors, root / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (root / "adapter_config.json").write_text(json.dumps(config))
    model = load(original, root, alpha=0.5)
    record = model.uipe_extrapolation
    assert record.found
    assert record.converted
    assert all("experts" in name for name in record.converted)
    for alpha in (0.5, 2.0):
        model.set_alpha(alpha)
        assert_same(model, written(tmp_path, original, root, alpha=alpha))


def test_a_model_keeps_its_gradients_dtype_and_threads(tmp_path: Path) -> None:
    pair = make_pair(FAMILIES["GPT-2"], tmp_path)
    threads = torch.get_num_threads()
    model = load(*pair, alpha=1.0, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model(PROMPT, labels=PROMPT).loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.double().set_alpha(0.25)
    wanted = written(tmp_path, *pair, alpha=0.25).double()
    assert_same(model, wanted)
    assert all(each.grad is not None for each in model.parameters())
    model.float()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter.grad.float(), gradients[name])
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_copies_are_moved_alone_and_nothing_keeps_a_model_alive(tmp_path: Path) -> None:
    pair = make_pair(FAMILIES["Llama, tied"], tmp_path)
    model = load(*pair, alpha=1.0)
    other = copy.deepcopy(model)
    other.set_alpha(2.0)
    assert_same(model, written(tmp_path, *pair, alpha=1.0))
    assert_same(other, written(tmp_path, *pair, alpha=2.0))
    kept = io.BytesIO()
    torch.save(other, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    with pytest.raises(UsageError, match="not loaded here"):
        loaded.set_alpha(0.5)
    set_alpha(loaded, 0.5)
    assert_same(loaded, written(tmp_path, *pair, alpha=0.5))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_move_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    original, unlearned = make_pair(FAMILIES["Llama, tied"], tmp_path)
    model = load(original, unlearned, alpha=1.0)
    was = written(tmp_path, original, unlearned, alpha=1.0)
    with pytest.raises(NumericError, match="do not fit into F16"):
        model.set_alpha(1e7)
    assert_same(model, was)
    assert model.uipe_extrapolation.recipe.alpha == 1.0
    with pytest.raises(uipe_merge.RecipeError):
        model.set_alpha(float("nan"))
    with pytest.raises(uipe_merge.RecipeError, match="matches no tensor"):
        model.set_alpha(1.0, alpha_rules={"nothing": 2.0})
    assert_same(model, was)


def test_a_head_stored_beside_its_embedding_stays_tied_or_is_refused(tmp_path: Path) -> None:
    original, unlearned = make_pair(FAMILIES["Llama, tied"], tmp_path)
    for side, shift in ((original, 0.0), (unlearned, 0.25)):
        tensors = read_tensors(side)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift
        config = json.loads((side / "config.json").read_text())
        for file in side.glob("*.safetensors"):
            file.unlink()
        write_checkpoint(side, tensors, config=config)
    model = load(original, unlearned, alpha=-1.0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    was = copy.deepcopy(model.state_dict())
    with pytest.raises(IncompatibleModelsError, match="untied"):
        model.set_alpha(1.0)
    assert all(torch.equal(each, was[name]) for name, each in model.state_dict().items())
    apart = load(original, unlearned, alpha=1.0)
    assert_same(apart, written(tmp_path, original, unlearned, alpha=1.0))
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_another_class_makes_the_model(tmp_path: Path) -> None:
    pair = make_pair(FAMILIES["Llama"], tmp_path)
    merged = written(tmp_path, *pair, alpha=1.0)
    assert_same(load(*pair, alpha=1.0, model_class=LlamaForCausalLM), merged)
    body = load(*pair, alpha=1.0, model_class=AutoModel)
    assert all(
        torch.equal(each, merged.state_dict()[f"model.{name}"])
        for name, each in body.state_dict().items()
    )
    body.set_alpha(0.0)
    unlearned = AutoModelForCausalLM.from_pretrained(pair[1]).state_dict()
    assert all(
        torch.equal(each, unlearned[f"model.{name}"]) for name, each in body.state_dict().items()
    )
    with pytest.raises(IncompatibleModelsError, match=r"lack parameters.*score\.weight"):
        load(*pair, alpha=1.0, model_class=AutoModelForSequenceClassification)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    original, unlearned = make_pair(FAMILIES["Llama"], tmp_path)
    with pytest.raises(UsageError, match="no alpha"):
        load(original, unlearned)
    refused: dict[str, Any]
    for option in ("device_map", "state_dict", "trust_remote_code", "quantization_config"):
        refused = {option: None}
        with pytest.raises(UsageError, match=f"takes no {option}"):
            load(original, unlearned, alpha=1.0, **refused)
    with pytest.raises(UsageError, match="as a model"):
        load(original, unlearned, recipe=Recipe(1.0, form="adapter"))
    with pytest.raises(UsageError, match="not loaded here"):
        set_alpha(AutoModelForCausalLM.from_pretrained(unlearned), 1.0)
    model = load(original, unlearned, alpha=1.0)
    model.lm_head = torch.nn.Linear(16, 60, bias=False)
    with pytest.raises(UsageError, match=r"changed since.*lm_head\.weight"):
        model.set_alpha(0.0)
    for side in (original, unlearned):
        config = json.loads((side / "config.json").read_text())
        (side / "config.json").write_text(json.dumps({**config, "model_type": "no such"}))
    with pytest.raises(IncompatibleModelsError, match="transformers cannot make"):
        load(original, unlearned, alpha=1.0)
    for side in (original, unlearned):
        (side / "config.json").unlink()
    with pytest.raises(IncompatibleModelsError, match=r"no config\.json"):
        load(original, unlearned, alpha=1.0)


def write_models(root: Path) -> tuple[Path, Path]:
    """A pair whose update is so small that bfloat16 rounds most of a small step away."""
    original, unlearned = make_pair(FAMILIES["Llama"], root)
    config = json.loads((original / "config.json").read_text())
    near = {name: each * (1 + 2**-8) for name, each in read_tensors(original).items()}
    for file in unlearned.glob("*.safetensors*"):
        file.unlink()
    return original, write_checkpoint(unlearned, near, config=config)


def test_it_says_what_merge_would_warn_of(tmp_path: Path) -> None:
    pair = write_models(tmp_path)
    model = load(*pair, alpha=0.3)
    report = uipe_merge.merge(*pair, tmp_path / "out", alpha=0.3, progress=False)
    assert report.warnings
    assert model.uipe_extrapolation.warnings == report.warnings
    model.set_alpha(0.0)
    assert model.uipe_extrapolation.warnings == []


def test_another_working_directory_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(FAMILIES["Llama"], tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load("original", "unlearned", alpha=1.0, threads=1)
    monkeypatch.chdir("/")
    model.set_alpha(2.0)
    assert_same(model, written(tmp_path, *pair, alpha=2.0))
