"""Block-scaled FP8 checkpoints for the tests, quantised by hand in float64 numpy."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from helpers import CONFIG, run_here
from helpers import write_checkpoint as write_any
from reference import Array

Stored = dict[str, torch.Tensor]

FP8: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
NAME = "model.layers.0.mlp.down_proj.weight"
SCALE = NAME + "_scale_inv"
SHAPES = {
    NAME: (256, 384),
    "model.layers.0.mlp.up_proj.weight": (300, 130),  # no multiples of the block
    "model.layers.1.mlp.up_proj.weight": (5, 140_000),  # a row longer than a cell
    "model.layers.1.mlp.down_proj.weight": (2050, 515),  # more than one block of the engine
    "model.layers.1.mlp.gate_proj.weight": (7, 3),  # one scale
}


def config(fields: Mapping[str, object]) -> dict[str, object]:
    return {**CONFIG, "torch_dtype": "bfloat16", "quantization_config": {**FP8, **fields}}


def quantised(
    values: Array, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as FP8 and its scales: the largest of each block becomes 448."""
    rows, columns = values.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = np.zeros(grid)
    for one in range(grid[0]):
        for two in range(grid[1]):
            part = values[one * block[0] :, two * block[1] :][: block[0], : block[1]]
            scales[one, two] = np.abs(part).max() / 448
    stored = torch.from_numpy(scales).to(dtype)
    codes = values / np.maximum(spread(stored, values.shape, block), 1e-30)
    return torch.from_numpy(np.clip(codes, -448, 448)).to(torch.float8_e4m3fn), stored


def spread(
    scales: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int] = (128, 128)
) -> Array:
    """The scale of every element, found by its own row and column."""
    rows, columns = np.indices(shape)
    return np.asarray(scales.double().numpy()[rows // block[0], columns // block[1]])


def values_of(tensors: Stored, name: str, block: tuple[int, int] = (128, 128)) -> Array:
    """θ in float64: the stored values, times the scale of their block where there is one."""
    values = np.asarray(tensors[name].double().numpy())
    scales = tensors.get(f"{name}_scale_inv")
    return values if scales is None else values * spread(scales, values.shape, block)


def matrices(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.02, shape) * 2.0 ** rng.integers(-4, 4, (shape[0], 1))
        for name, shape in shapes.items()
    }


def stored(
    values: Mapping[str, Array],
    kind: str,
    block: tuple[int, int] = (128, 128),
    scales: torch.dtype = torch.float32,
) -> Stored:
    """The tensors of a checkpoint; a norm that is not quantised lies between them."""
    tensors: Stored = {"model.norm.weight": torch.linspace(0, 1, 9).bfloat16()}
    for name, matrix in values.items():
        if kind == "bf16":
            tensors[name] = torch.from_numpy(matrix).bfloat16()
        else:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(matrix, block, scales)
    return tensors


def write(path: Path, tensors: Stored, kind: str, shards: int = 1) -> Path:
    settings = config({}) if kind == "fp8" else {**CONFIG, "dtype": "bfloat16"}
    return write_any(path, tensors, shards=shards, config=settings)


def write_fp8_pair(
    root: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Stored, Stored]:
    """A pair of two FP8 checkpoints, small if not told otherwise."""
    shapes = shapes or {NAME: (256, 130)}
    old = matrices(0, shapes)
    new = {name: each + matrices(1, shapes)[name] * 0.1 for name, each in old.items()}
    sides = stored(old, "fp8"), stored(new, "fp8")
    for side, tensors in zip(("original", "unlearned"), sides, strict=True):
        write(root / side, tensors, "fp8", shards=2)
    return sides


def change(root: Path, tensors: Stored, **fields: object) -> None:
    """Write another unlearned checkpoint."""
    shutil.rmtree(root / "unlearned")
    write_any(root / "unlearned", tensors, config=config(fields))


def merge(root: Path, alpha: float, *more: object, output: str = "out") -> Path:
    result = run_here(
        *(root / "original", root / "unlearned", "--alpha", alpha, "-o", root / output),
        *("--dequantize", *more),
    )
    assert result.code == 0, result
    return root / output
