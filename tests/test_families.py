"""Model families made with transformers: merged, loaded back without a complaint, and run."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits, contents, read_tensors, run_cli
from reference import assert_merged, doubles, rounded, unrounded
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

import uipe_merge

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PROMPT = torch.tensor([[1, 5, 9, 33]])


@dataclass(frozen=True)
class Family:
    """One family: how its tiny model is made and saved.

    Attributes:
        model_type: transformers' name for it.
        options: Its configuration.
        dtype: What it is stored in.
        shards: Largest shard of the original and of the unlearned checkpoint.
        tied: Whether the head is the embedding.
        alpha: The α of the merge.
    """

    model_type: str
    options: dict[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    shards: tuple[str, str] = ("5GB", "5GB")
    tied: bool = False
    alpha: float = 2.0


FAMILIES = {
    "Llama": Family("llama", shards=("5GB", "6KB"), alpha=0.3),
    "Llama, tied": Family("llama", {"tie_word_embeddings": True}, torch.float16, tied=True),
    "Qwen2": Family("qwen2", dtype=torch.float32, shards=("9KB", "6KB"), alpha=-0.5),
    "Qwen2, tied": Family("qwen2", {"tie_word_embeddings": True}, tied=True, shards=("4KB", "5GB")),
    "Qwen3": Family("qwen3", {"head_dim": 8}, torch.float32, ("6KB", "5GB")),
    "Gemma 2": Family("gemma2", {"head_dim": 8}, shards=("5GB", "5KB"), tied=True),
    "Gemma 3": Family("gemma3_text", {"head_dim": 8}, torch.float32, tied=True, alpha=10.0),
    "Phi": Family("phi", dtype=torch.float16, shards=("6KB", "6KB")),
    "Phi-3": Family("phi3", dtype=torch.float32, shards=("9KB", "5GB"), alpha=0.1),
    "Mixtral": Family("mixtral", {"num_local_experts": 4}, torch.float32, ("8KB", "16KB")),
    "Qwen2-MoE": Family(
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        shards=("5GB", "7KB"),
    ),
    "Qwen3-MoE": Family(
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
        torch.float32,
    ),
    "GPT-2": Family(
        "gpt2",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        torch.float32,
        ("5GB", "8KB"),
        tied=True,
    ),
    "GPT-NeoX": Family("gpt_neox", shards=("6KB", "9KB"), alpha=1.0),
}


def make_pair(family: Family, root: Path) -> tuple[Path, Path]:
    """Save a random model, disturb every parameter a little, save it again."""
    torch.manual_seed(0)
    sizes = {} if family.model_type == "gpt2" else SIZES
    options = {"vocab_size": 64, **sizes, **TOKENS, **family.options}
    config = AutoConfig.for_model(family.model_type, **options)
    model = AutoModelForCausalLM.from_config(config).to(family.dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7, **TOKENS)
    original, unlearned = root / "original", root / "unlearned"
    model.save_pretrained(original, max_shard_size=family.shards[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(unlearned, max_shard_size=family.shards[1])
    return original, unlearned


@contextmanager
def no_complaints() -> Iterator[None]:
    """Fail on whatever transformers or Python warns of."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = transformers_logging.get_logger("transformers")
    listener = Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(listener)
    assert said == []


def load(path: Path) -> Any:
    """Load with transformers, which must find every tensor it wants and no other."""
    with no_complaints():
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert set(report) >= {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert {kind: list(keys) for kind, keys in report.items() if keys} == {}
    return model


def assert_model(merged: Path, original: Path, unlearned: Path, alpha: float) -> Any:
    """Hold every parameter, as transformers sees it, against the reference; return the model."""
    model = load(merged)
    got, old, new = (each.state_dict() for each in (model, load(original), load(unlearned)))
    assert got.keys() == old.keys() == new.keys()
    for name, tensor in got.items():
        if tensor.dtype == torch.float32:  # float64 arithmetic on both sides: no element differs
            wanted = rounded(unrounded(old[name], new[name], alpha), torch.float32)
            assert np.array_equal(doubles(tensor), wanted), name
        assert_merged(tensor, old[name], new[name], alpha)
    stored = read_tensors(merged)
    alike = stored.keys() & got.keys()  # experts are stored one by one and loaded fused
    assert len(alike) > len(stored) / 4
    assert all(np.array_equal(bits(stored[name]), bits(got[name])) for name in alike)
    return model


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_loads_equals_the_reference_and_generates(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    original, unlearned = make_pair(family, tmp_path)
    merged = tmp_path / "merged"
    report = uipe_merge.merge(original, unlearned, merged, alpha=family.alpha, progress=False)
    model = assert_model(merged, original, unlearned, family.alpha)

    assert {parameter.dtype for parameter in model.parameters()} == {family.dtype}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == family.tied
    assert report.summary.tensors.keys() == {"extrapolate"}
    assert [text for text in report.warnings if "effective α" not in text] == []

    assert model.generation_config.max_new_tokens == 7
    with no_complaints():
        tokens = model.generate(PROMPT, do_sample=False)
    assert tokens[:, : PROMPT.shape[1]].equal(PROMPT)
    assert PROMPT.shape[1] < tokens.shape[1] <= PROMPT.shape[1] + 7
    assert torch.isfinite(model(PROMPT).logits).all()

    # The layout, and every file beside the weights, is the unlearned checkpoint's.
    before, after = contents(unlearned), contents(merged)
    assert after.keys() == before.keys() | {"README.md", "uipe_merge.json"}
    for file in ("config.json", "generation_config.json"):
        assert after[file] == before[file]
    if family.shards[1] != "5GB":
        index = "model.safetensors.index.json"
        assert json.loads(after[index])["weight_map"] == json.loads(before[index])["weight_map"]


def test_through_the_command_line_with_another_dtype_and_layout(tmp_path: Path) -> None:
    original, unlearned = make_pair(FAMILIES["Llama"], tmp_path)
    merged = tmp_path / "merged"
    options = ("--dtype", "float32", "--max-shard-size", "12kB", "--threads", 2)
    result = run_cli(original, unlearned, "--alpha", 0.3, "-o", merged, *options)
    assert result.code == 0, result.err
    assert len(list(merged.glob("*.safetensors"))) > 1
    model = assert_model(merged, original, unlearned, 0.3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generate(PROMPT, do_sample=False).shape[1] > PROMPT.shape[1]
    assert run_cli("verify", merged).code == 0


@pytest.mark.parametrize(("alpha", "kept"), [(0, "unlearned"), (-1, "original")])
@pytest.mark.parametrize("name", ["Gemma 2", "Mixtral"])
def test_alpha_0_and_minus_1_load_as_one_of_the_inputs(
    name: str, alpha: float, kept: str, tmp_path: Path
) -> None:
    make_pair(FAMILIES[name], tmp_path)
    merged = tmp_path / "merged"
    uipe_merge.merge(
        tmp_path / "original", tmp_path / "unlearned", merged, alpha=alpha, progress=False
    )
    got, wanted = load(merged).state_dict(), load(tmp_path / kept).state_dict()
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(bits(got[name]), bits(wanted[name])) for name in wanted)
