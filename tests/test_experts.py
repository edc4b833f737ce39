"""Experts fused in one checkpoint and one by one in the other, as transformers saves them."""

from pathlib import Path

import pytest
import torch
import transformers
from cli_tools import refuse_merge
from helpers import assert_refused, contents, read_tensors, run_cli, run_here
from reference import assert_merged
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=12, moe_intermediate_size=8, head_dim=8
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, num_experts=4),
}
ALPHA = 0.7


def make(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.bfloat16)
    unlearned = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.bfloat16)
    with torch.no_grad():
        for one, two in zip(original.parameters(), unlearned.parameters(), strict=True):
            two.copy_(one + torch.randn_like(one) * 0.01)
    return original, unlearned


def save(model: PreTrainedModel, path: Path, *, fused: bool) -> Path:
    model.save_pretrained(path, save_original_format=not fused)
    names = list(read_tensors(path))
    assert any(".experts.gate_up_proj" in name for name in names) == fused
    assert any(".experts.0." in name for name in names) != fused
    return path


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("fused", [False, True], ids=["unlearned-split", "unlearned-fused"])
def test_the_two_layouts_are_matched_as_transformers_does(
    tmp_path: Path, kind: str, fused: bool
) -> None:
    original, unlearned = make(kind)
    same = save(original, tmp_path / "same", fused=fused)
    other = save(original, tmp_path / "other", fused=not fused)
    theta = save(unlearned, tmp_path / "unlearned", fused=fused)
    for alpha, threads in ((ALPHA, 1), (-1, 3), (0, 2)):
        weights = []
        for base in (same, other):
            out = tmp_path / f"out-{base.name}"
            command = (base, theta, "--alpha", alpha, "-o", out, "--threads", threads)
            result = run_here(*command, "--overwrite")
            assert result.code == 0, result
            assert ("matched as transformers does" in result.err) == (base == other)
            weights.append({k: v for k, v in contents(out).items() if "safetensors" in k})
        assert weights[0] == weights[1], (alpha, threads)
    for name, tensor in read_tensors(tmp_path / "out-other").items():
        assert tensor.isfinite().all(), name


def test_the_matched_update_is_that_of_the_models(tmp_path: Path) -> None:
    original, unlearned = make("mixtral")
    save(original, tmp_path / "original", fused=False)
    save(unlearned, tmp_path / "unlearned", fused=True)
    out = tmp_path / "out"
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", ALPHA, "-o", out)
    assert run_here(*command).code == 0
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ones, twos = original.state_dict(), unlearned.state_dict()
    for name, tensor in merged.state_dict().items():
        assert_merged(tensor, ones[name], twos[name], ALPHA)


def test_inspect_sees_the_same_in_both_layouts(tmp_path: Path) -> None:
    import uipe_merge

    original, unlearned = make("mixtral")
    save(unlearned, tmp_path / "unlearned", fused=True)
    totals = []
    for fused in (True, False):
        base = save(original, tmp_path / str(fused), fused=fused)
        found = uipe_merge.inspect(base, tmp_path / "unlearned", progress=False)
        assert found.mismatches == []
        totals.append(found.total)
    assert totals[0].elements == totals[1].elements
    assert totals[0].update == pytest.approx(totals[1].update)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_the_table_does_not_know_is_refused_naming_both(
    tmp_path: Path, fused: bool
) -> None:
    original, unlearned = make("mixtral")
    save(original, tmp_path / "original", fused=not fused)
    save(unlearned, tmp_path / "unlearned", fused=fused)
    for side in ("original", "unlearned"):
        path = tmp_path / side / "config.json"
        path.write_text(path.read_text().replace('"mixtral"', '"unheard_of"'))
    refuse_merge(tmp_path, 5, "one by one", "fused", "experts.0.", "experts.", "save both with")


@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_that_is_missing_is_refused(tmp_path: Path, fused: bool) -> None:
    original, unlearned = make("mixtral")
    save(original, tmp_path / "original", fused=not fused)
    save(unlearned, tmp_path / "unlearned", fused=fused)
    split = tmp_path / ("original" if fused else "unlearned")
    tensors = read_tensors(split)
    tensors.pop(next(name for name in tensors if ".experts.3.w2" in name))
    save_file(tensors, split / "model.safetensors", metadata={"format": "pt"})
    refuse_merge(tmp_path, 5, "one by one", "fused")


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_an_expert_of_another_kind_of_numbers_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    original, unlearned = make("mixtral")
    save(original, tmp_path / "original", fused=False)
    save(unlearned, tmp_path / "unlearned", fused=True)
    tensors = read_tensors(tmp_path / "original")
    name = next(name for name in tensors if ".experts.3.w2" in name)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "original" / "model.safetensors", metadata={"format": "pt"})
    refuse_merge(tmp_path, 5, "one by one", "fused")


def test_a_value_that_is_not_finite_is_named_where_it_is_stored(tmp_path: Path) -> None:
    original, unlearned = make("mixtral")
    save(original, tmp_path / "original", fused=False)
    save(unlearned, tmp_path / "unlearned", fused=True)
    tensors = read_tensors(tmp_path / "original")
    name = next(name for name in tensors if ".1." in name and ".experts.3.w3" in name)
    tensors[name][2, 5] = torch.nan
    save_file(tensors, tmp_path / "original" / "model.safetensors", metadata={"format": "pt"})
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(run_cli(*command), 7, name, "holds 1 values", f"index {2 * 16 + 5}")
