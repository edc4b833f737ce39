"""Adapters on parameters (``target_parameters``), trained and merged by peft in float64."""

import copy
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
    run_here,
    shards_written,
    write_checkpoint,
)
from peft import LoraConfig, PeftModel, get_peft_model
from reference import assert_merged
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from uipe_merge.plan import BLOCK, CELL

Tensors = dict[str, torch.Tensor]


class Experts(nn.Module):
    """Stacks of matrices of every kind that peft takes, used in a way that trains all of them."""

    def __init__(self, experts: int, width: int, inner: int, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.randn(experts, 2 * inner, width), torch.randn(experts, width, inner)
        self.up = nn.Parameter((up.mT if is_transposed else up).contiguous() * 0.05)
        self.down = nn.Parameter((down.mT if is_transposed else down).contiguous() * 0.05)
        self.more = nn.Parameter(self.down.detach() * 2)
        self.mix = nn.Parameter(torch.randn(width, width + 1) * 0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = self.down + self.more
        up, down = (self.up.mT, down.mT) if self.is_transposed else (self.up, down)
        gate, inner = torch.einsum("eiw,bw->bei", up, x).tanh().chunk(2, 2)
        return torch.einsum("ewi,bei->bw", down, gate * inner) @ self.mix


class Toy(nn.Module):
    """Experts, and a linear layer beside them."""

    def __init__(self, *sizes: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.front = nn.Linear(sizes[1], sizes[1])
        self.experts = Experts(*sizes, is_transposed=is_transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.experts(self.front(x))
        return result


def train(model: nn.Module, path: Path, loss: Any, **options: Any) -> Path:
    """Train an adapter a few steps and save it."""
    torch.manual_seed(7)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": [], **options}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    optimiser = torch.optim.AdamW(
        [parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=3e-3
    )
    for _ in range(4):
        optimiser.zero_grad()
        loss(wrapped).backward()
        optimiser.step()
    wrapped.save_pretrained(str(path))
    return path


def toy(root: Path, *sizes: int, is_transposed: bool = False, **options: Any) -> tuple[Path, Path]:
    """A base in bfloat16 and an adapter on it."""
    torch.manual_seed(0)
    model = Toy(*sizes, is_transposed=is_transposed).bfloat16()
    base = write_checkpoint(root / "base", model.state_dict())
    inputs = torch.randn(16, sizes[1])
    return base, train(
        model.float(), root / "adapter", lambda net: net(inputs).square().sum(), **options
    )


def merged(base: Path, adapter: Path, model: nn.Module) -> tuple[Tensors, Tensors]:
    """What is stored, and what peft makes of it, in float64."""
    before = {name: tensor.double() for name, tensor in read_tensors(base).items()}
    model = model.double()
    model.load_state_dict(before)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    return before, wrapped.double().merge_and_unload().state_dict()


def check(root: Path, base: Path, adapter: Path, before: Tensors, after: Tensors) -> set[str]:
    """Merge at several α, hold it against peft; return what the adapter changes."""
    for alpha in (0.0, 0.5, 2.0):
        out = root / f"out{alpha}"
        result = run_here(base, adapter, "--alpha", alpha, "-o", out)
        assert result.code == 0, result.err
        found = read_tensors(out)
        assert found.keys() == before.keys()
        for name, tensor in found.items():
            assert_merged(tensor, before[name], after[name], alpha)
    assert run_here(base, adapter, "--alpha", -1, "-o", root / "back").code == 0
    stored = read_tensors(base)
    for name, tensor in read_tensors(root / "back").items():
        assert np.array_equal(bits(tensor), bits(stored[name])), name
    return {name for name in before if not torch.equal(before[name], after[name])}


ALL = {"target_parameters": ["experts.up", "experts.down", "experts.mix"]}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ALL, id="two stacks and a matrix"),
        pytest.param({"target_parameters": ["down"], "target_modules": ["front"]}, id="one"),
        pytest.param(
            {
                **ALL,
                "use_rslora": True,
                "rank_pattern": {"experts.up": 3, "mix": 5},
                "alpha_pattern": {"experts.down": 16},
            },
            id="rsLoRA with rank and alpha patterns",
        ),
        pytest.param({"target_parameters": ["front.weight"]}, id="the weight of a layer"),
    ],
)
def test_stacks_and_matrices(
    tmp_path: Path, options: dict[str, Any], *, is_transposed: bool
) -> None:
    sizes = (3, 200, 240)  # 48 000 elements an expert: cells begin and end within experts
    base, adapter = toy(tmp_path, *sizes, is_transposed=is_transposed, **options)
    before, after = merged(base, adapter, Toy(*sizes, is_transposed=is_transposed))
    changed = check(tmp_path, base, adapter, before, after)
    assert len(changed) == len(options["target_parameters"]) + len(
        options.get("target_modules", [])
    )


def test_a_model_that_stores_its_experts_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,  # one of the two stacks is square, as in the published models
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    base = tmp_path / "base"
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    tokens = torch.randint(0, 50, (3, 8))
    adapter = train(
        GptOssForCausalLM.from_pretrained(base, dtype=torch.float32),
        tmp_path / "adapter",
        lambda net: net(input_ids=tokens, labels=tokens).loss,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj"],
    )
    before, after = merged(base, adapter, GptOssForCausalLM(config))
    assert len(check(tmp_path, base, adapter, before, after)) == 3


def test_threads_and_blocks_change_no_byte(tmp_path: Path) -> None:
    pair = toy(tmp_path, 3, 600, 300, target_parameters=["up", "down"])
    assert read_tensors(pair[0])["experts.up"].numel() > BLOCK
    wanted = shards_written(pair, tmp_path / "whole", BLOCK, 1)
    for block in (CELL, 3 * CELL):
        assert shards_written(pair, tmp_path / f"{block}", block, 3) == wanted


def mixtral(root: Path) -> tuple[Path, Path]:
    """A model whose experts are saved one by one, and an adapter on them."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=12,  # in another order by name than by number
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "base")
    assert any("experts.0.w1" in name for name in read_tensors(root / "base"))
    tokens = torch.randint(0, 50, (3, 8))
    adapter = train(
        MixtralForCausalLM.from_pretrained(root / "base", dtype=torch.float32),
        root / "adapter",
        lambda net: net(input_ids=tokens, labels=tokens).loss,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj"],
    )
    return root / "base", adapter


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_experts_that_the_base_stores_one_by_one(tmp_path: Path, alpha: float) -> None:
    base, adapter = mixtral(tmp_path)
    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    after = wrapped.double().merge_and_unload().state_dict()
    outs = []
    for threads in (1, 3):
        out = tmp_path / f"out{threads}"
        result = run_here(base, adapter, "--alpha", alpha, "-o", out, "--threads", threads)
        assert result.code == 0, result.err
        assert "matched as transformers does" in result.err
        outs.append(read_tensors(out))
    found, info = MixtralForCausalLM.from_pretrained(tmp_path / "out1", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in found.state_dict().items():
        assert_merged(tensor, before[name], after[name], alpha)
        assert np.array_equal(bits(outs[0][name]), bits(outs[1][name]))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 3


def test_the_adapter_of_such_experts_is_written_too(tmp_path: Path) -> None:
    base, adapter = mixtral(tmp_path)
    command = (base, adapter, "--alpha", 2, "--as", "adapter", "-o", tmp_path / "out")
    assert run_here(*command).code == 0
    file = "adapter_model.safetensors"
    before, after = load_file(adapter / file), load_file(tmp_path / "out" / file)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] * (3 if "lora_B" in name else 1)), name


def test_experts_that_the_table_does_not_relate_are_refused(tmp_path: Path) -> None:
    base, adapter = mixtral(tmp_path)
    config = base / "config.json"
    config.write_text(config.read_text().replace('"mixtral"', '"unheard_of"'))
    result = run_here(base, adapter, "--alpha", 1, "-o", tmp_path / "out")
    fused, single = "layers.0.mlp.experts.down_proj", "experts.0.w1.weight"
    assert_refused(result, 5, fused, single, "one by one")


def test_empty_matrices_and_stacks_stay_empty(tmp_path: Path) -> None:
    shapes = {"row.weight": (0, 5), "column.weight": (5, 0), "few.stack": (0, 4, 5)}
    base = write_checkpoint(
        tmp_path / "base", {name: torch.zeros(shape) for name, shape in shapes.items()}
    )
    (adapter := tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["stack"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    halves = {"row": ((2, 5), (0, 2)), "column": ((2, 0), (5, 2)), "few": ((0, 5), (4, 0))}
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.ones(shape)
        for name, pair in halves.items()
        for side, shape in zip("AB", pair, strict=True)
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    result = run_here(base, adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert {name: tensor.shape for name, tensor in read_tensors(tmp_path / "out").items()} == shapes


# ---------------------------------------------------------------- what is refused


def test_hazard_updates_that_fit_in_two_ways(tmp_path: Path) -> None:
    base, adapter = toy(tmp_path, 3, 24, 24, target_parameters=["experts.down"])
    result = run_here(base, adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, 5, "experts.down", "more than one way", "merge_and_unload")


def test_hazard_two_parameters_of_one_shape(tmp_path: Path) -> None:
    base, adapter = toy(tmp_path, 3, 24, 32, target_parameters=["experts.more", "experts.down"])
    result = run_here(base, adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, 5, "experts.down", "experts.more", "more than one way")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        pytest.param({"r": 4}, 5, "no updates of", id="another rank"),
        pytest.param({"target_parameters": "down"}, 4, "not a list", id="no list"),
        pytest.param({"target_parameters": ["down", "up"]}, 5, "no updates of", id="one lacks"),
        pytest.param({"target_parameters": ["sideways"]}, 5, "not in the base", id="no such name"),
        pytest.param({"target_parameters": []}, 5, "'experts' is not in the base", id="none"),
        pytest.param({"use_dora": True}, 4, "beside target_parameters", id="DoRA"),
        pytest.param({"fan_in_fan_out": True}, 4, "beside target_parameters", id="fan_in_fan_out"),
    ],
)
def test_hazard_a_config_that_does_not_fit(
    tmp_path: Path, changes: dict[str, object], code: int, message: str
) -> None:
    base, adapter = toy(tmp_path, 3, 24, 32, target_parameters=["experts.down"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    result = run_here(base, adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, code, message)
    assert not (tmp_path / "out").exists()


def test_hazard_factors_that_do_not_fit(tmp_path: Path) -> None:
    base, adapter = toy(tmp_path, 3, 24, 32, target_parameters=["experts.down"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    (half,) = (name for name in tensors if "lora_B" in name)
    command = (base, adapter, "--alpha", 1, "-o", tmp_path / "out")
    save_file({**tensors, half: tensors[half][:-1].contiguous()}, file)
    assert_refused(run_here(*command), 5, "'experts'", "no updates of experts.down")
    save_file({name: tensor for name, tensor in tensors.items() if name != half}, file)
    assert_refused(run_here(*command), 4, "'experts'", "not lora_A and lora_B")
    save_file({**tensors, half: tensors[half] * float("nan")}, file)
    assert_refused(run_here(*command), 7, "adapter_model.safetensors", half, "NaN")
