"""Two checkpoints that do not belong together, group C of the hazards.

Refused with 5, or merged with a warning where the difference is one that can be bridged.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cli_tools import merged, refuse_merge, tree
from helpers import CONFIG, read_tensors, run_cli, run_here, write_checkpoint

Tensors = Mapping[str, torch.Tensor]

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TIED = {**CONFIG, "tie_word_embeddings": True}
UNTIED = {**CONFIG, "tie_word_embeddings": False}


def model(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {EMBEDDING: torch.ones(8, 4, dtype=dtype), Q: torch.ones(4, 4, dtype=dtype)}


def pair(
    root: Path,
    original: Tensors,
    unlearned: Tensors,
    configs: tuple[Mapping[str, object], Mapping[str, object]] = (CONFIG, CONFIG),
) -> None:
    write_checkpoint(root / "original", original, config=configs[0])
    write_checkpoint(root / "unlearned", unlearned, config=configs[1])


def planned(root: Path) -> str:
    """A dry run, which must succeed; what it says on stderr."""
    before = tree(root)
    arguments = (root / "original", root / "unlearned", "--alpha", 1, "-o", root / "out")
    result = run_here(*arguments, "--dry-run", cwd=root)
    assert result.code == 0, result
    assert tree(root) == before
    return result.err


def test_embedding_32000_against_32002_rows(tmp_path: Path) -> None:
    one, two = (torch.zeros(rows, 2, dtype=torch.bfloat16) for rows in (32000, 32002))
    pair(tmp_path, {EMBEDDING: one}, {EMBEDDING: two})
    shapes = ("[32000, 2]", "[32002, 2]")
    refuse_merge(tmp_path, 5, EMBEDDING, *shapes, "rows added", "--on-mismatch keep-unlearned")


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (24,), (1, 4, 6)])
def test_shapes_of_equal_size_are_still_different(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pair(tmp_path, {Q: torch.zeros(*shape)}, {Q: torch.zeros(2, 12)})
    result = refuse_merge(tmp_path, 5, Q, str(list(shape)), "[2, 12]")
    assert "transposed" not in result.err


def test_transposed_shape_is_called_so(tmp_path: Path) -> None:
    pair(tmp_path, {Q: torch.zeros(4, 6)}, {Q: torch.zeros(6, 4)})
    refuse_merge(tmp_path, 5, Q, "[4, 6]", "[6, 4]", "transposed")


@pytest.mark.parametrize(
    ("holder", "configs"),
    [
        ("original", (UNTIED, UNTIED)),
        ("unlearned", (UNTIED, UNTIED)),
        ("original", (TIED, UNTIED)),
        ("unlearned", (UNTIED, TIED)),
        ("unlearned", (CONFIG, TIED)),
    ],
)
def test_lm_head_in_one_only_and_not_tied_in_both(
    tmp_path: Path, holder: str, configs: tuple[dict[str, object], dict[str, object]]
) -> None:
    headed = {**model(), HEAD: torch.ones(8, 4, dtype=torch.bfloat16)}
    sides = (headed, model()) if holder == "original" else (model(), headed)
    pair(tmp_path, *sides, configs)
    refuse_merge(tmp_path, 5, f"tensor '{HEAD}' is only in {tmp_path / holder}")


def test_tied_lm_head_in_unlearned_only_moves_from_the_embedding(tmp_path: Path) -> None:
    unlearned = {**model(), HEAD: torch.full((8, 4), 1.5, dtype=torch.bfloat16)}
    pair(tmp_path, model(), unlearned, (TIED, TIED))
    result = merged(tmp_path, alpha=2)
    assert f"warning: {tmp_path / 'unlearned'}: tensor '{HEAD}' is stored though tied" in result.err
    out = read_tensors(tmp_path / "out")
    assert out.keys() == unlearned.keys()
    assert torch.equal(out[HEAD], torch.full((8, 4), 2.5, dtype=torch.bfloat16))  # 1.5 + 2·0.5


def test_tied_lm_head_in_original_only_is_left_out(tmp_path: Path) -> None:
    original = {**model(), HEAD: torch.ones(8, 4, dtype=torch.bfloat16)}
    pair(tmp_path, original, model(), (TIED, TIED))
    result = merged(tmp_path, alpha=0)
    assert f"warning: {tmp_path / 'original'}: tensor '{HEAD}' is stored though tied" in result.err
    assert read_tensors(tmp_path / "out").keys() == model().keys()


def test_tied_lm_head_of_another_shape_than_the_embedding(tmp_path: Path) -> None:
    pair(tmp_path, model(), {**model(), HEAD: torch.ones(9, 4).bfloat16()}, (TIED, TIED))
    refuse_merge(tmp_path, 5, HEAD, "[8, 4]", "[9, 4]")


def test_float32_and_bfloat16_mixed_are_upcast_and_reported(tmp_path: Path) -> None:
    original = {name: tensor - 0.1 for name, tensor in model(torch.float32).items()}
    pair(tmp_path, original, model(torch.bfloat16))
    result = merged(tmp_path)
    assert "warning: 2 tensors are F32 in ORIGINAL and BF16 in UNLEARNED" in result.err
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        expected = (1 + (1 - original[name].double())).bfloat16()  # 0.9 was not rounded first
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("one", "two"),
    [(torch.int32, torch.float32), (torch.bool, torch.bfloat16), (torch.complex64, torch.float32)],
)
def test_dtypes_without_a_common_arithmetic(
    tmp_path: Path, one: torch.dtype, two: torch.dtype
) -> None:
    pair(tmp_path, {Q: torch.ones(4).to(one)}, {Q: torch.ones(4).to(two)})
    refuse_merge(tmp_path, 5, Q, " is ", " and ")


INTEGERS = {
    "ids": torch.arange(6),
    "mask": torch.tensor([True, False]),
    "same": torch.arange(3, dtype=torch.int32),
}


def test_integer_and_bool_tensors_that_differ_are_kept_from_unlearned(tmp_path: Path) -> None:
    changed = {**INTEGERS, "ids": torch.arange(6) + 1, "mask": torch.tensor([True, True])}
    pair(tmp_path, {**model(), **INTEGERS}, {**model(), **changed})
    result = merged(tmp_path, alpha=0)
    warning = next(line for line in result.err.splitlines() if "integer tensors" in line)
    assert "the unlearned ones were kept: ids; mask" in warning
    out = read_tensors(tmp_path / "out")
    for name, tensor in changed.items():
        assert out[name].dtype == tensor.dtype
        assert torch.equal(out[name], tensor)


def test_integer_tensors_of_another_width_are_kept_with_a_warning(tmp_path: Path) -> None:
    pair(tmp_path, {**model(), "ids": torch.arange(6)}, {**model(), "ids": torch.arange(6).int()})
    result = merged(tmp_path, alpha=0)
    assert "1 tensors are I64 in ORIGINAL and I32 in UNLEARNED; they are kept" in result.err
    assert "integer tensors differ between the checkpoints" in result.err
    assert read_tensors(tmp_path / "out")["ids"].dtype == torch.int32
    inspected = run_cli("inspect", tmp_path / "original", tmp_path / "unlearned")
    assert inspected.code == 0, inspected


@pytest.mark.parametrize("holder", ["original", "unlearned"])
def test_tensor_in_one_only(tmp_path: Path, holder: str) -> None:
    more = {**model(), "model.layers.1.extra.bias": torch.ones(4, dtype=torch.bfloat16)}
    pair(tmp_path, *((more, model()) if holder == "original" else (model(), more)))
    refuse_merge(tmp_path, 5, f"'model.layers.1.extra.bias' is only in {tmp_path / holder}")


def test_all_mismatches_are_listed_at_once(tmp_path: Path) -> None:
    original = {**model(), "only.original": torch.ones(2), "kind": torch.arange(2)}
    unlearned = {**model(), "only.unlearned": torch.ones(2), "kind": torch.ones(2)}
    unlearned[Q] = torch.ones(4, 5, dtype=torch.bfloat16)
    pair(tmp_path, original, unlearned, (CONFIG, {**CONFIG, "model_type": "qwen3"}))
    names = ("only.original", "only.unlearned", "'kind' is I64", Q, "[4, 4]", "[4, 5]")
    refuse_merge(tmp_path, 5, "model_type is 'llama' and 'qwen3'", *names)


def test_a_long_list_of_mismatches_is_counted(tmp_path: Path) -> None:
    many = {f"t{number:02d}": torch.ones(1) for number in range(25)}
    pair(tmp_path, model(), {**model(), **many})
    result = refuse_merge(tmp_path, 5, "'t00'", "'t19'", "and 5 more")
    assert "t20" not in result.err


@pytest.mark.parametrize(
    ("field", "one", "two"),
    [
        ("architectures", ["LlamaForCausalLM"], ["Qwen3ForCausalLM"]),
        ("model_type", "llama", "qwen3"),
        ("rope_theta", 10000.0, 500000.0),
        ("hidden_size", 64, 128),
        ("num_hidden_layers", 2, 3),
        ("num_attention_heads", 8, 4),
        ("num_key_value_heads", 8, 4),
    ],
)
def test_different_architecture(tmp_path: Path, field: str, one: object, two: object) -> None:
    pair(tmp_path, model(), model(), ({**CONFIG, field: one}, {**CONFIG, field: two}))
    refuse_merge(tmp_path, 5, f"config.json: {field} is {one!r} and {two!r}")


@pytest.mark.parametrize(
    ("one", "two", "difference"),
    [
        ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        (
            {"rope_scaling": {"type": "linear"}},
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_type",
        ),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0}}, None),
        ({"rope_scaling": {"type": "yarn"}}, {"rope_parameters": {"rope_type": "yarn"}}, None),
        ({"rope_scaling": None}, {}, None),
        ({"vocab_size": 8, "use_cache": True}, {"vocab_size": 8, "use_cache": False}, None),
    ],
)
def test_rope_is_compared_wherever_the_config_keeps_it(
    tmp_path: Path, one: dict[str, object], two: dict[str, object], difference: str | None
) -> None:
    pair(tmp_path, model(), model(), ({**CONFIG, **one}, {**CONFIG, **two}))
    if difference is not None:
        refuse_merge(tmp_path, 5, difference)
    else:
        assert planned(tmp_path) == ""


@pytest.mark.parametrize(
    ("one", "two", "layouts"),
    [
        ("experts.0.gate_proj.weight", "experts.gate_up_proj", ("one by one", "fused")),
        ("experts.gate_up_proj", "experts.7.up_proj.weight", ("fused", "one by one")),
    ],
)
def test_fused_against_per_expert_moe_names(
    tmp_path: Path, one: str, two: str, layouts: tuple[str, str]
) -> None:
    prefix = "model.layers.0.mlp."
    pair(tmp_path, {prefix + one: torch.ones(2, 2)}, {prefix + two: torch.ones(2, 2)})
    result = refuse_merge(tmp_path, 5, prefix + one, prefix + two, "one version of transformers")
    assert f"stored {layouts[0]} (" in result.err
    assert f"and {layouts[1]} (" in result.err


def test_identical_inputs_are_merged_with_a_warning(tmp_path: Path) -> None:
    pair(tmp_path, model(), model())
    result = merged(tmp_path)
    assert "warning: the two checkpoints hold identical weights: every update is zero" in result.err
    assert torch.equal(read_tensors(tmp_path / "out")[Q], model()[Q])
