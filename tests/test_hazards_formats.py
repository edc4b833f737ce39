"""Directories that hold no plain safetensors model: one line says what each is.

Quantised checkpoints and distributed shards are rows of group C of the hazards (5).
"""

import json
from pathlib import Path

import pytest
import torch
from cli_tools import refuse_merge, tree
from helpers import CONFIG, raw_safetensors, run_here, write_checkpoint

WEIGHT = "model.layers.0.mlp.down_proj.weight"


def plain(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {WEIGHT: torch.ones(2, 2).to(dtype)}


def plain_pair(root: Path) -> None:
    for side in ("original", "unlearned"):
        write_checkpoint(root / side, plain())


@pytest.mark.parametrize(
    ("side", "method", "config"),
    [
        ("original", "gptq", {"quant_method": "gptq", "bits": 4}),
        ("unlearned", "bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("original", "fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("unlearned", "an unnamed method", {"bits": 4}),
    ],
)
def test_quantised_by_its_config(
    tmp_path: Path, side: str, method: str, config: dict[str, object]
) -> None:
    plain_pair(tmp_path)
    write_checkpoint(tmp_path / side, plain(), config={**CONFIG, "quantization_config": config})
    refuse_merge(tmp_path, 5, str(tmp_path / side), f"quantised with {method}", "dequantize")


@pytest.mark.parametrize(
    ("suffix", "dtype", "partner", "method"),
    [
        ("weight_scale_inv", torch.float32, None, "block-scaled FP8"),
        ("weight_scale", torch.float32, ("weight", torch.float8_e4m3fn), "scaled FP8 or INT8"),
        ("weight_scale", torch.bfloat16, ("weight", torch.int8), "scaled FP8 or INT8"),
        ("weight.absmax", torch.uint8, None, "bitsandbytes 4-bit"),
        ("SCB", torch.float32, None, "bitsandbytes 8-bit"),
        ("qweight", torch.int32, None, "GPTQ or AWQ"),
        ("qzeros", torch.int32, None, "GPTQ or AWQ"),
        ("weight_packed", torch.int32, None, "compressed-tensors"),
        (
            "gate_up_proj_blocks",
            torch.uint8,
            ("gate_up_proj_scales", torch.uint8),
            "MXFP4",
        ),
    ],
)
def test_quantised_by_its_tensor_names(
    tmp_path: Path,
    suffix: str,
    dtype: torch.dtype,
    partner: tuple[str, torch.dtype] | None,
    method: str,
) -> None:
    plain_pair(tmp_path)
    side = "original" if partner is None else "unlearned"
    prefix = "model.layers.0.mlp.experts."
    tensors = {**plain(), prefix + suffix: torch.ones(2, 2).to(dtype)}
    if partner is not None:
        tensors[prefix + partner[0]] = torch.ones(2, 2).to(partner[1])
    write_checkpoint(tmp_path / side, tensors)
    refuse_merge(tmp_path, 5, str(tmp_path / side), prefix + suffix, method, "dequantize")


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F4", [4], 2), ("F6_E2M3", [4], 3), ("F6_E3M2", [4], 3), ("F8_E8M0", [4], 4)],
)
def test_quantised_by_a_packed_dtype(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    plain_pair(tmp_path)
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    content = raw_safetensors({WEIGHT: entry}, bytes(nbytes))
    (tmp_path / "unlearned" / "model.safetensors").write_bytes(content)
    refuse_merge(tmp_path, 5, WEIGHT, f"packed dtype {dtype}")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight_scale",  # next to a weight that is not 8-bit
        "vision.transformer_blocks",  # not U8, without _scales
        "model.absmaximum",
        "model.prequantised",
    ],
)
def test_a_tensor_that_only_sounds_quantised_is_merged(tmp_path: Path, name: str) -> None:
    for side in ("original", "unlearned"):
        write_checkpoint(tmp_path / side, {**plain(), name: torch.ones(2, 2).bfloat16()})
    before = tree(tmp_path)
    arguments = (tmp_path / "original", tmp_path / "unlearned", "-o", tmp_path / "out")
    result = run_here(*arguments, "--alpha", 1, "--dry-run", "--json", cwd=tmp_path)
    assert result.code == 0, result
    assert json.loads(result.out)["operations"] == {"extrapolate": {"tensors": 2, "bytes": 16}}
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("side", "with_index"), [("original", False), ("unlearned", True)])
def test_torch_dcp_shards(tmp_path: Path, side: str, with_index: bool) -> None:
    plain_pair(tmp_path)
    shard = "shard-00001-model-00001-of-00002.safetensors"
    (tmp_path / side / "model.safetensors").rename(tmp_path / side / shard)
    if with_index:
        index = {"weight_map": {WEIGHT: shard}}
        (tmp_path / side / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse_merge(tmp_path, 5, shard, "torch distributed checkpoint", "consolidate")


@pytest.mark.parametrize(
    ("code", "files", "fragments"),
    [
        pytest.param(
            5,
            ["adapter_config.json", "adapter_model.safetensors"],
            ["is a PEFT adapter", "merge_and_unload"],
            id="adapter",
        ),
        pytest.param(
            5,
            ["adapter_config.json", "adapter_model.bin"],
            ["is a PEFT adapter", "merge_and_unload"],
            id="pickled adapter",
        ),
        pytest.param(
            6,
            ["config.json", "pytorch_model.bin"],
            ["pickled weights ('pytorch_model.bin')", "run code", "--allow-pickle"],
            id=".bin by default",
        ),
        pytest.param(6, ["consolidated.00.pth"], ["'consolidated.00.pth'"], id=".pth"),
        pytest.param(
            4, ["model-Q4_K_M.gguf"], ["GGUF", "model-Q4_K_M.gguf", "safetensors form"], id="GGUF"
        ),
        pytest.param(
            4,
            ["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors", "log.txt"],
            ["checkpoint-1000, checkpoint-500", "name one of these directories"],
            id="checkpoint-*",
        ),
        pytest.param(
            4,
            [
                "checkpoint-500/model.safetensors",
                "checkpoint-500/optimizer.pt",
                "training_args.bin",
            ],
            ["checkpoint-500", "name one of these directories"],
            id="checkpoint-* with the optimiser's pickles",
        ),
        pytest.param(
            4, ["training_args.bin"], ["no .safetensors file"], id="trainer's pickle only"
        ),
        pytest.param(
            4, ["config.json", "tokenizer.json"], ["no .safetensors file"], id="no weights"
        ),
        pytest.param(4, [], ["no .safetensors file", "name a checkpoint directory"], id="empty"),
        pytest.param(
            4,
            ["model/model.safetensors", "config.json"],
            ["no .safetensors file"],
            id="weights in a subdirectory only",
        ),
    ],
)
def test_directory_without_a_model(
    tmp_path: Path, code: int, files: list[str], fragments: list[str]
) -> None:
    plain_pair(tmp_path)
    directory = tmp_path / ("original" if code == 4 else "unlearned")
    weights = (directory / "model.safetensors").read_bytes()
    for entry in directory.iterdir():
        entry.unlink()
    for name in files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(weights if name.endswith(".safetensors") else b"{}")
    refuse_merge(tmp_path, code, str(directory), *fragments)


@pytest.mark.parametrize(("side", "flag"), [("original", "missing"), ("unlearned", "a file")])
def test_input_that_is_no_directory(tmp_path: Path, side: str, flag: str) -> None:
    plain_pair(tmp_path)
    for entry in (tmp_path / side).iterdir():
        entry.unlink()
    (tmp_path / side).rmdir()
    if flag == "a file":
        (tmp_path / side).write_bytes(b"")
    remedies = {"missing": "ORG/NAME", "a file": "the directory that holds the checkpoint"}
    refuse_merge(tmp_path, 2, str(tmp_path / side), remedies[flag])
