"""The pairs of checkpoints that the cases measure; each is written in a process of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoints import Geometry, Shapes

SPARSE_SHARDS = 700
SPARSE_TENSORS = 100_100
TENSOR_WIDTH = 4096

_DOWN = re.compile(r"\.(\d+)\.mlp\.down_proj\.")
_KINDS = ("down", "gate", "up")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two checkpoint directories."""

    original: Path
    unlearned: Path

    def both(self) -> list[Path]:
        """Return the two directories."""
        return [self.original, self.unlearned]


def write_model_pair(pair: Pair, shape: Geometry, shards: int, *, few: bool = False) -> None:
    """Write both checkpoints of a model; with ``few`` only three tensors are updated."""
    shapes, config = shape.shapes(), shape.config()
    chosen = few_updated(shapes) if few else set(shapes)
    write_checkpoint(pair.original, shapes, config, shards=shards)
    moved = chosen.__contains__
    write_checkpoint(pair.unlearned, shapes, config, shards=shards, moved=moved)


def few_updated(shapes: Shapes) -> set[str]:
    """Choose what RMU would update: the ``down_proj`` of three layers in a row.

    RMU takes layers 5 to 7 of 32; these are three in the middle of any depth.
    """
    layers = {int(match[1]): name for name in shapes if (match := _DOWN.search(name))}
    first = max(0, len(layers) // 2 - 2)
    return {layers[layer] for layer in sorted(layers)[first : first + 3]}


def write_tensor_pair(pair: Pair, rows: int) -> None:
    """Write both checkpoints of a model that is one tensor of ``rows`` × ``TENSOR_WIDTH``."""
    shapes: Shapes = {"model.embed_tokens.weight": (rows, TENSOR_WIDTH)}
    config: dict[str, object] = {"model_type": "llama"}
    write_checkpoint(pair.original, shapes, config)
    write_checkpoint(pair.unlearned, shapes, config, moved=shapes.__contains__)


def write_sparse_pair(pair: Pair) -> None:
    """Write both checkpoints of a model of many shards: real headers, no payload."""
    config: dict[str, object] = {"model_type": "deepseek_v3"}
    for path in pair.both():
        write_checkpoint(path, sparse_shapes(), config, shards=SPARSE_SHARDS, holes=True)


def sparse_shapes() -> Shapes:
    """Return the names and shapes of a mixture of experts, three matrices an expert.

    The matrices are small, so that the plan fits the free disk wherever it is measured.
    """
    return {
        f"model.layers.{number // 1540}.mlp.experts.{number // 3}."
        f"{_KINDS[number % 3]}_proj.weight": (64, 64)
        for number in range(SPARSE_TENSORS)
    }
