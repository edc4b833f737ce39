"""DoRA adapters, trained and merged by peft in float64: the merged weight is what counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    assert_refused,
    bits,
    read_tensors,
    run_cli,
    run_here,
    shards_written,
    write_checkpoint,
)
from peft import LoraConfig, PeftModel, get_peft_model
from reference import assert_merged
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from uipe_merge.plan import BLOCK, CELL

VOCABULARY = 100
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, **heads, **options}))


def gpt2() -> Any:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **sizes)
    )


def trained(model: Any, path: Path, seed: int, **options: Any) -> Path:
    """Train an adapter a few steps and save it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, **options}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    optimiser = torch.optim.AdamW(
        [parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=3e-3
    )
    tokens = torch.randint(0, VOCABULARY, (4, 12))
    for _ in range(5):
        optimiser.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
    wrapped.save_pretrained(str(path))
    return path


def weights(kind: Any, base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """What peft makes of a base and adapters in float64, by the names of the stored tensors."""
    model = kind.from_pretrained(base, dtype=torch.float64)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).to(torch.float64).merge_and_unload()
    state = model.state_dict()
    stored = read_tensors(base)
    return {name: state.get(name, state.get(f"transformer.{name}")) for name in stored}


def assert_extrapolated(
    out: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], alpha: float
) -> None:
    found = read_tensors(out)
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert_merged(tensor, before[name], after[name], alpha)


KINDS = [
    pytest.param(
        llama, LlamaForCausalLM, {"target_modules": ["q_proj", "down_proj"]}, 2, id="Linear"
    ),
    pytest.param(
        llama,
        LlamaForCausalLM,
        {
            "target_modules": ["v_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
        },
        2,
        id="rsLoRA",
    ),
    pytest.param(
        llama, LlamaForCausalLM, {"target_modules": ["embed_tokens", "k_proj"]}, 2, id="Embedding"
    ),
    pytest.param(
        gpt2,
        GPT2LMHeadModel,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        3,
        id="Conv1D",
    ),
]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "kind", "options", "moved"), KINDS)
def test_merged_weight_is_pefts(
    tmp_path: Path, make: Any, kind: Any, options: dict[str, Any], moved: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    make().to(dtype).save_pretrained(base)
    adapter = trained(kind.from_pretrained(base, dtype=dtype), tmp_path / "a", 1, **options)
    before, after = weights(kind, base), weights(kind, base, adapter)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == moved
    for alpha in (0.0, 0.5, 2.0):
        out = tmp_path / f"out{alpha}"
        result = run_here(base, adapter, "--alpha", alpha, "-o", out)
        assert result.code == 0, result.err
        assert_extrapolated(out, before, after, alpha)
    result = run_here(base, adapter, "--alpha", -1, "-o", tmp_path / "back")
    assert result.code == 0, result.err
    stored = read_tensors(base)
    for name, tensor in read_tensors(tmp_path / "back").items():
        assert np.array_equal(bits(tensor), bits(stored[name])), name


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter on it, and an adapter on the two merged; both DoRA."""
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    llama().to(torch.bfloat16).save_pretrained(root / "base")
    load = LlamaForCausalLM.from_pretrained
    first = load(root / "base", dtype=torch.float32)
    trained(first, root / "tuned", 1, target_modules=["q_proj", "o_proj"])
    second = load(root / "base", dtype=torch.float32)
    second = PeftModel.from_pretrained(second, str(root / "tuned")).merge_and_unload()
    trained(second, root / "unlearned", 2, target_modules=["q_proj", "up_proj"])
    return root


def test_an_adapter_on_a_model_with_an_adapter(tmp_path: Path, family: Path) -> None:
    original = f"{family / 'base'}+{family / 'tuned'}"
    command = [original, family / "unlearned", "--alpha", 1.5, "-o", tmp_path / "out"]
    result = run_cli(*command)
    assert result.code == 0, result.err
    paths = family / "base", family / "tuned", family / "unlearned"
    before, after = weights(LlamaForCausalLM, *paths[:2]), weights(LlamaForCausalLM, *paths)
    assert_extrapolated(tmp_path / "out", before, after, 1.5)


def test_inspect_measures_the_merged_weight(family: Path) -> None:
    result = run_here("inspect", family / "base", family / "tuned", "--json")
    assert result.code == 0, result.err
    before = weights(LlamaForCausalLM, family / "base")
    after = weights(LlamaForCausalLM, family / "base", family / "tuned")
    norm = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert json.loads(result.out)["total"]["norm"] == pytest.approx(norm, rel=1e-5)


class Layers(nn.Module):
    """A layer of several blocks, whose rows are no multiple of a cell, and smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1100, 1000)
        self.more = nn.ModuleList(nn.Linear(1100, 4) for _ in range(40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.wide(x) + sum(
            layer(x).sum(1, keepdim=True) for layer in self.more
        )
        return result


def test_threads_and_blocks_change_no_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers()
    base = write_checkpoint(tmp_path / "base", model.bfloat16().state_dict(), shards=2)
    assert model.wide.weight.numel() > BLOCK
    targets = ["wide", *(f"more.{number}" for number in range(40))]
    options = LoraConfig(r=2, use_dora=True, target_modules=targets)
    wrapped = get_peft_model(model.float(), options)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    pair = base, tmp_path / "adapter"
    wanted = shards_written(pair, tmp_path / "whole", BLOCK, 1)
    for block in (CELL, 3 * CELL):
        for width in (1, 4):
            assert shards_written(pair, tmp_path / f"{block} {width}", block, width) == wanted


# ---------------------------------------------------------------- what is refused


def adapter_with(
    family: Path, path: Path, tensors: dict[str, torch.Tensor | None], **changes: object
) -> Path:
    """The adapter ``tuned`` with other fields and other tensors; ``None`` takes one away."""
    path.mkdir()
    config = json.loads((family / "tuned" / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    stored: dict[str, Any] = load_file(family / "tuned" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in (stored | tensors).items() if tensor is not None}
    save_file(kept, path / "adapter_model.safetensors")
    return path


VECTOR, FIRST, SECOND = (
    f"{Q_PROJ}.lora_{part}" for part in ("magnitude_vector", "A.weight", "B.weight")
)


def test_the_vector_goes_by_two_names(tmp_path: Path, family: Path) -> None:
    vector = load_file(family / "tuned" / "adapter_model.safetensors")[VECTOR]
    other = adapter_with(family, tmp_path / "other", {VECTOR: None, f"{VECTOR}.weight": vector})
    for adapter in (family / "tuned", other):
        command = [family / "base", adapter, "--alpha", 1, "-o", tmp_path / f"{adapter.name}-out"]
        assert run_here(*command).code == 0
    one, two = (tmp_path / f"{name}-out" / "model.safetensors" for name in ("tuned", "other"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("tensors", "changes", "code", "message"),
    [
        pytest.param({VECTOR: None}, {}, 4, "q_proj': has no lora_magnitude_vector", id="missing"),
        pytest.param({}, {"use_dora": False}, 4, "use_dora false", id="not in the config"),
        pytest.param(
            {FIRST: None, SECOND: None},
            {},
            4,
            "q_proj': has lora_magnitude_vector without",
            id="alone",
        ),
        pytest.param({SECOND: None}, {}, 4, "lora_A without lora_B", id="no lora_B"),
        pytest.param({VECTOR: torch.ones(63)}, {}, 4, "[63], not [64]", id="short"),
        pytest.param({VECTOR: torch.ones(64, 1)}, {}, 4, "[64, 1], not [64]", id="two dimensions"),
        pytest.param({VECTOR: torch.ones(64).int()}, {}, 5, "I32", id="integers"),
        pytest.param({}, {"lora_bias": True}, 4, "lora_bias beside use_dora", id="lora_bias"),
        pytest.param(
            {VECTOR: torch.full((64,), torch.nan)}, {}, 7, "64 values that are NaN", id="NaN"
        ),
        pytest.param(
            {VECTOR: torch.full((64,), torch.inf)}, {}, 7, "64 values that are NaN", id="infinite"
        ),
    ],
)
def test_hazard_magnitude_vector(
    tmp_path: Path,
    family: Path,
    tensors: dict[str, torch.Tensor | None],
    changes: dict[str, object],
    code: int,
    message: str,
) -> None:
    adapter = adapter_with(family, tmp_path / "adapter", tensors, **changes)
    result = run_here(family / "base", adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, code, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_hazard_a_norm_of_zero(tmp_path: Path, family: Path, threads: int) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = read_tensors(family / "base")
    weights[name][[5, 9]] = 0
    config = json.loads((family / "base" / "config.json").read_text())
    base = write_checkpoint(tmp_path / "base", weights, config=config)
    half = load_file(family / "tuned" / "adapter_model.safetensors")[SECOND]
    half[[5, 9]] = 0
    adapter = adapter_with(family, tmp_path / "adapter", {SECOND: half})
    command = [base, adapter, "--alpha", 1, "-o", tmp_path / "out", "--threads", threads]
    result = run_here(*command)
    assert_refused(result, 7, "base/model.safetensors", name, "2 of 64 outputs", "index 5")
    assert not (tmp_path / "out").exists()


def test_hazard_overflow_is_found_in_the_merged_weight(tmp_path: Path, family: Path) -> None:
    halves = {name: tensor.half() for name, tensor in read_tensors(family / "base").items()}
    config = json.loads((family / "base" / "config.json").read_text())
    base = write_checkpoint(tmp_path / "base", halves, config=config)
    command = [base, family / "tuned", "--alpha", 1e7, "-o", tmp_path / "out"]
    assert_refused(run_here(*command), 7, "do not fit into F16", "choose a smaller alpha")
