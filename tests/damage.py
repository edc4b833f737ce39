"""Ways to damage a sharded checkpoint of two shards, for the hazard tests of the index."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import random_tensors
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
SAMPLE = "model.embed_tokens.weight"  # the first tensor of the first shard

Damage = Callable[[Path], None]


def rewrite(model: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Let ``change`` edit the index in place, or return a document in its stead."""
    document = json.loads((model / INDEX).read_text())
    replaced = change(document)
    (model / INDEX).write_text(json.dumps(document if replaced is None else replaced))


def map_sample_to(shard: object) -> Damage:
    """Let the index say that a tensor is in ``shard``."""
    return lambda model: rewrite(
        model, lambda document: document["weight_map"].__setitem__(SAMPLE, shard)
    )


def put(name: str, content: str) -> Damage:
    """Write a file into the checkpoint."""

    def damage(model: Path) -> None:
        (model / name).write_text(content)

    return damage


def drop(*names: str) -> Damage:
    def damage(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return damage


def link(name: str, target: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to(target)

    return damage


def outside(model: Path) -> None:
    shutil.move(model / SECOND, model.parent / "elsewhere.safetensors")
    (model / SECOND).symlink_to("../elsewhere.safetensors")


def directory(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage


def fifo(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return damage


def edit_shard(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Let ``change`` edit the tensors of a shard."""

    def damage(model: Path) -> None:
        tensors = load_file(model / name)
        change(tensors)
        save_file(tensors, model / name, {"format": "pt"})

    return damage


def replace_map(value: object) -> Damage:
    """Put something else in place of the whole weight_map."""
    return lambda model: rewrite(model, lambda document: {**document, "weight_map": value})


def stale_single(model: Path) -> None:
    save_file(random_tensors(), model / "model.safetensors", {"format": "pt"})


def mixed_sets(model: Path) -> None:
    shutil.copy(model / SECOND, model / "model-00003-of-00003.safetensors")
    (model / INDEX).unlink()


def unnamed_weights(model: Path) -> None:
    (model / INDEX).unlink()
    (model / FIRST).rename(model / "a.safetensors")
    (model / SECOND).rename(model / "b.safetensors")
