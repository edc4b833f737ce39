"""FP8 checkpoints that contradict themselves, or are of another kind: what ``--dequantize`` refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from cli_tools import refuse_merge
from fp8 import FP8, NAME, SCALE, Stored, change, config, merge, write_fp8_pair
from helpers import CONFIG, assert_refused, run_here
from helpers import write_checkpoint as write_any


def test_the_refusal_names_the_flag(tmp_path: Path) -> None:
    _, new = write_fp8_pair(tmp_path)
    refuse_merge(tmp_path, 5, "quantised with fp8", "add --dequantize")
    for side in ("original", "unlearned"):  # no word of it in config.json
        shutil.rmtree(tmp_path / side)
        write_any(tmp_path / side, new)
    refuse_merge(tmp_path, 5, SCALE, "block-scaled FP8", "add --dequantize")
    merge(tmp_path, 1)


def without(tensors: Stored, name: str) -> Stored:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def test_hazard_scales_that_contradict_their_weights(tmp_path: Path) -> None:
    _, new = write_fp8_pair(tmp_path)
    flag = ("--dequantize",)
    change(tmp_path, without(new, SCALE))
    refuse_merge(tmp_path, 4, f"'{NAME}' is F8_E4M3 and has no '{SCALE}'", extra=flag)
    change(tmp_path, without(new, NAME))
    refuse_merge(tmp_path, 4, f"'{SCALE}' scales no tensor", extra=flag)
    change(tmp_path, {**new, SCALE: torch.ones(2, 1)})
    needs = "is [2, 1], [256, 130] needs [2, 2] of blocks of (128, 128)"
    refuse_merge(tmp_path, 4, f"'{SCALE}' {needs}", extra=flag)
    change(tmp_path, new, weight_block_size=[64, 128])
    refuse_merge(tmp_path, 4, SCALE, "needs [4, 2] of blocks of (64, 128)", extra=flag)
    change(tmp_path, new, weight_block_size=None)
    refuse_merge(tmp_path, 4, SCALE, "[256, 130] needs one number", extra=flag)
    vector = {"b.weight": new[NAME][0].clone(), "b.weight_scale_inv": torch.ones(2)}
    change(tmp_path, {**new, **vector})
    refuse_merge(tmp_path, 4, "'b.weight_scale_inv' is [2], [130] needs one number", extra=flag)


def test_hazard_a_nested_quantisation(tmp_path: Path) -> None:
    _, new = write_fp8_pair(tmp_path)
    nested = {**CONFIG, "text_config": {"quantization_config": FP8}}
    shutil.rmtree(tmp_path / "unlearned")
    write_any(tmp_path / "unlearned", new, config=nested)
    refuse_merge(tmp_path, 5, "config.json", "inside text_config", extra=("--dequantize",))


@pytest.mark.parametrize("size", [[128], [0, 128], [128.0, 128], [True, 128], "128", 128, {}])
def test_hazard_a_block_size_that_is_none(tmp_path: Path, size: object) -> None:
    _, new = write_fp8_pair(tmp_path)
    change(tmp_path, new, weight_block_size=size)
    refuse_merge(tmp_path, 4, "config.json", "weight_block_size", extra=("--dequantize",))


@pytest.mark.parametrize(
    ("replaced", "dtype"),
    [
        (SCALE, torch.uint8),
        (SCALE, torch.float64),
        (NAME, torch.bfloat16),
        (NAME, torch.float8_e5m2),
        (NAME, torch.int8),
    ],
)
def test_hazard_other_types(tmp_path: Path, replaced: str, dtype: torch.dtype) -> None:
    _, new = write_fp8_pair(tmp_path)
    change(tmp_path, {**new, replaced: new[replaced].float().to(dtype)})
    refuse_merge(tmp_path, 5, replaced, "F8_E4M3", extra=("--dequantize",))


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("compressed-tensors", {"weight_scale": torch.ones(1)}),
        ("bitsandbytes", {"weight.absmax": torch.ones(1).to(torch.uint8)}),
        ("gptq", {"qweight": torch.ones(2, 2, dtype=torch.int32)}),
        ("awq", {"qzeros": torch.ones(2, 2, dtype=torch.int32)}),
        ("mxfp4", {"w_blocks": torch.ones(2).byte(), "w_scales": torch.ones(2).byte()}),
        ("fbgemm_fp8", {}),
        ("fp8", {"weight_scale": torch.ones(1)}),
    ],
)
def test_hazard_other_formats_stay_refused(tmp_path: Path, method: str, tensors: Stored) -> None:
    _, new = write_fp8_pair(tmp_path)
    prefix = NAME.removesuffix("weight")
    others = {prefix + name: tensor for name, tensor in tensors.items()}
    change(tmp_path, {**new, **others}, quant_method=method)
    said = "compressed-tensors" if method == "fp8" else f"quantised with {method}"
    refuse_merge(tmp_path, 5, said, "`dequantize()`", extra=("--dequantize",))
    if others:  # and by its tensors alone
        write_any(tmp_path / "unlearned", {**without(without(new, SCALE), NAME), **others})
        if "weight_scale" not in tensors:
            refuse_merge(tmp_path, 5, prefix, "`dequantize()`", extra=("--dequantize",))


def test_hazard_values_that_are_not_finite(tmp_path: Path) -> None:
    _, new = write_fp8_pair(tmp_path)
    for value in (float("nan"), float("inf")):
        scales = new[SCALE].clone()
        scales[1, 0] = value
        change(tmp_path, {**new, SCALE: scales})
        for command in ((), ("inspect",)):
            output = () if command else ("--alpha", 1, "-o", tmp_path / "out")
            result = run_here(
                *(*command, tmp_path / "original", tmp_path / "unlearned", *output),
                "--dequantize",
            )
            assert_refused(result, 7, SCALE, "1 values", "first at index 2")
    codes = new[NAME].clone()
    codes.view(torch.uint8)[3, 4] = 0x7F
    change(tmp_path, {**new, NAME: codes})
    arguments = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 0, "--dequantize")
    result = run_here(*arguments, "-o", tmp_path / "out")
    assert_refused(result, 7, NAME, f"first at index {3 * 130 + 4}")
    change(tmp_path, {**new, SCALE: torch.full((2, 2), 1e37)})
    result = run_here(*arguments, "-o", tmp_path / "out")
    assert_refused(result, 7, NAME, "do not fit into BF16")
    assert not (tmp_path / "out").exists()


def test_hazard_more_scales_than_a_block_of_the_engine_holds(tmp_path: Path) -> None:
    codes, scales = torch.ones(1025, 1024).to(torch.float8_e4m3fn), torch.ones(1025, 1024)
    for side in ("original", "unlearned"):
        write_any(
            tmp_path / side,
            {NAME: codes, SCALE: scales},
            config=config({"weight_block_size": [1, 1]}),
        )
        scales[1000, 5] = float("nan")
    arguments = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1, "--dequantize")
    result = run_here(*arguments, "-o", tmp_path / "out")
    assert_refused(result, 7, SCALE, f"first at index {1000 * 1024 + 5}")
