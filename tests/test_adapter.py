"""PEFT adapters, held against peft's own merge of the same adapter in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_refused,
    contents,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

Make = Callable[[], Any]


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    )


def trained(model: Any, path: Path, seed: int, **options: Any) -> Path:
    """Save an adapter whose factors are both non-zero, as training leaves them."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    wrapped.save_pretrained(str(path))
    return path


def reference(kind: type, base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The weights that peft merges, in float64."""
    model = kind.from_pretrained(base, dtype=torch.float64)  # type: ignore[attr-defined]
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).to(torch.float64).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def of(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return state[name] if name in state else state[f"transformer.{name}"]


def check(
    out: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], alpha: float
) -> int:
    """Hold an output against the extrapolation in float64; return how many tensors moved."""
    moved = 0
    for name, tensor in read_tensors(out).items():
        original, unlearned = of(before, name), of(after, name)
        expected = (unlearned + alpha * (unlearned - original)).to(tensor.dtype)
        moved += not torch.equal(original, unlearned)
        differing = (expected != tensor).double().mean().item() if tensor.numel() else 0.0
        assert differing <= 1e-3, (name, differing)
        largest = torch.stack([unlearned.abs(), (alpha * (unlearned - original)).abs()]).amax(0)
        ulp = largest * torch.finfo(tensor.dtype).eps
        assert bool(((expected.double() - tensor.double()).abs() <= ulp + 1e-30).all()), name
    return moved


LINEAR = {"target_modules": ["q_proj", "down_proj"]}
KINDS = [
    pytest.param(llama, LlamaForCausalLM, LINEAR, 4, id="Linear"),
    pytest.param(
        llama,
        LlamaForCausalLM,
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 32},
        },
        4,
        id="rsLoRA with rank and alpha patterns",
    ),
    pytest.param(
        llama,
        LlamaForCausalLM,
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
        4,
        id="embedding and modules_to_save",
    ),
    pytest.param(
        gpt2,
        GPT2LMHeadModel,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        6,
        id="Conv1D",
    ),
    pytest.param(
        gpt2,
        GPT2LMHeadModel,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
        4,
        id="lora_bias",
    ),
]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "kind", "options", "tensors"), KINDS)
def test_round_trip_with_peft(
    tmp_path: Path,
    make: Make,
    kind: type,
    options: dict[str, Any],
    tensors: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = trained(model, tmp_path / "adapter", 1, **options)
    before, after = reference(kind, base), reference(kind, base, adapter)
    result = run_here(base, adapter, "--alpha", 2, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert check(tmp_path / "out", before, after, 2.0) == tensors
    assert "adapter_config.json" not in contents(tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out", output_loading_info=True)[1]  # type: ignore[attr-defined]
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tuning adapter on it, and an unlearning adapter on the two merged."""
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    llama().save_pretrained(root / "base")
    load = LlamaForCausalLM.from_pretrained
    trained(load(root / "base"), root / "tuned", 1, **LINEAR)
    merged = PeftModel.from_pretrained(load(root / "base"), str(root / "tuned")).merge_and_unload()
    trained(merged, root / "unlearned", 2, target_modules=["q_proj", "up_proj"])
    return root


def test_an_adapter_on_a_model_with_an_adapter(tmp_path: Path, family: Path) -> None:
    original = f"{family / 'base'}+{family / 'tuned'}"
    command = [original, family / "unlearned", "--alpha", 1.5, "-o", tmp_path / "out"]
    result = run_cli(*command)
    assert result.code == 0, result.err
    before = reference(LlamaForCausalLM, family / "base", family / "tuned")
    after = reference(LlamaForCausalLM, family / "base", family / "tuned", family / "unlearned")
    assert check(tmp_path / "out", before, after, 1.5) == 4
    assert original in (tmp_path / "out" / "README.md").read_text()
    # What neither adapter has comes from the base: the output is a model that loads.
    assert (tmp_path / "out" / "config.json").is_file()
    info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not info["missing_keys"]


@pytest.mark.parametrize("alpha", [0, -1])
def test_alpha_0_is_the_merged_adapter_and_minus_1_the_base(
    tmp_path: Path, family: Path, alpha: int
) -> None:
    base, tuned = family / "base", family / "tuned"
    result = run_here(base, tuned, "--alpha", alpha, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "warning" not in result.err
    before, after = reference(LlamaForCausalLM, base), reference(LlamaForCausalLM, base, tuned)
    check(tmp_path / "out", before, after, float(alpha))
    if alpha == -1:
        stored = (base / "model.safetensors").stat().st_size
        assert (tmp_path / "out" / "model.safetensors").stat().st_size in range(
            stored - 999, stored + 999
        )


@pytest.mark.found("α = −1 with an adapter on ORIGINAL alone gave the unlearned model")
def test_alpha_minus_1_is_the_original_with_its_adapter(tmp_path: Path, family: Path) -> None:
    base, tuned, whole = family / "base", family / "tuned", tmp_path / "whole"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(whole)
    result = run_here(f"{base}+{tuned}", whole, "--alpha", -1, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    before, after = reference(LlamaForCausalLM, base, tuned), reference(LlamaForCausalLM, whole)
    assert check(tmp_path / "out", before, after, -1.0) == 4


def test_threads_and_shards_change_no_byte(tmp_path: Path, family: Path) -> None:
    base, tuned = family / "base", family / "tuned"
    outputs = []
    for number, options in enumerate([["--threads", 1], ["--threads", 3]]):
        out = tmp_path / str(number)
        assert run_here(base, tuned, "--alpha", 2, "-o", out, *options).code == 0
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_inspect_measures_an_adapter(family: Path) -> None:
    result = run_here("inspect", family / "base", family / "tuned", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    before = reference(LlamaForCausalLM, family / "base")
    after = reference(LlamaForCausalLM, family / "base", family / "tuned")
    norm = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert found["total"]["norm"] == pytest.approx(norm, rel=1e-5)
    assert len(found["zero"]) == len(found["tensors"]) - 4


def adapter_with(family: Path, path: Path, **changes: object) -> Path:
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).write_bytes((family / "tuned" / name).read_bytes())
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        pytest.param({"peft_type": "IA3"}, 5, "IA3", id="peft_type is not LORA"),
        pytest.param({"use_dora": True}, 4, "no lora_magnitude_vector", id="DoRA without its m"),
        pytest.param({"layer_replication": [[0, 1]]}, 5, "layer_replication", id="replication"),
        pytest.param({"init_lora_weights": "pissa"}, 5, "init_lora_weights", id="PiSSA base"),
        pytest.param({"a_field_to_come": 1}, 5, "a_field_to_come", id="unknown non-default field"),
        pytest.param({"r": 8}, 4, "its config says 8", id="r differs from the rows of lora_A"),
        pytest.param({"r": 0}, 4, "no usable number", id="r = 0"),
        pytest.param({"lora_alpha": float("nan")}, 4, "no usable number", id="lora_alpha NaN"),
    ],
)
def test_hazard_adapter_config_is_honoured_or_refused(
    tmp_path: Path, family: Path, changes: dict[str, object], code: int, message: str
) -> None:
    adapter = adapter_with(family, tmp_path / "adapter", **changes)
    result = run_here(family / "base", adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, code, message)
    assert not (tmp_path / "out").exists()


def test_hazard_another_base_is_named_and_an_adapter_alone_is_no_original(
    tmp_path: Path, family: Path
) -> None:
    adapter = adapter_with(family, tmp_path / "adapter", base_model_name_or_path="org/other-model")
    result = run_here(family / "base", adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert result.code == 0
    assert "was trained on org/other-model" in result.err
    result = run_here(adapter, family / "base", "--alpha", 1, "-o", tmp_path / "out2")
    assert_refused(result, 5, "PEFT adapter", "MODEL+ADAPTER")


def test_hazard_target_absent_in_the_base_lists_all(tmp_path: Path, family: Path) -> None:
    torch.manual_seed(3)
    gpt2().save_pretrained(tmp_path / "other")
    result = run_here(tmp_path / "other", family / "tuned", "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, 5, "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")


def test_hazard_a_without_b(tmp_path: Path, family: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = adapter_with(family, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    result = run_here(family / "base", adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, 4, "lora_A without lora_B")


def test_factors_of_integers_are_refused(tmp_path: Path, family: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = adapter_with(family, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    result = run_here(family / "base", adapter, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, 5, name, "I8")


def test_a_pickled_adapter_needs_the_flag(tmp_path: Path, family: Path) -> None:
    from safetensors.torch import load_file

    adapter = adapter_with(family, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    command = [family / "base", adapter, "--alpha", 1, "-o", tmp_path / "out"]
    assert_refused(run_here(*command), 6, "adapter_model.bin", "--allow-pickle")
    assert run_here(*command, "--allow-pickle").code == 0
    assert (
        run_here(family / "base", family / "tuned", "--alpha", 1, "-o", tmp_path / "st").code == 0
    )
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "st")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_what_an_adapter_replaces_stays_in_its_shard(tmp_path: Path, shards: int) -> None:
    names = [*(f"model.layers.{number}.a.weight" for number in range(4)), "lm_head.weight"]
    tensors = {name: torch.ones(4, 4) * number for number, name in enumerate(names)}
    original = write_checkpoint(tmp_path / "original", tensors, shards=shards)
    model = write_checkpoint(tmp_path / "model", tensors, shards=2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {"base_model.model.lm_head.weight": torch.ones(4, 4)}, adapter / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    command = (original, f"{model}+{adapter}", "--alpha", 1, "-o", tmp_path / "out")
    result = run_here(*command)
    assert result.code == 0, result
    found = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert found == {path.name for path in model.glob("*.safetensors")}
    assert set(read_tensors(tmp_path / "out")) == set(names)
