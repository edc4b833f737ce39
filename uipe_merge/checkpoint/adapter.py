"""PEFT LoRA adapters: an unlearned model told as its base and a low-rank update.

θᵤ = θ₀ + c·B·A for every matrix the adapter names, with c = lora_alpha/r, or lora_alpha/√r
where rank-stabilised. Source: the LoRA section of the PEFT documentation and its config
class. Nothing is merged here: a tensor's spec gets the factors, and the product is formed a
few rows at a time when the tensor is streamed.

A field of the config that changes what the adapter means and is not handled here is refused
by name, never ignored.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.checkpoint.header import Factor, TensorSpec
from uipe_merge.checkpoint.hub import unpinned
from uipe_merge.checkpoint.model import (
    PICKLED,
    SAFETENSORS,
    Checkpoint,
    Family,
    ShardInput,
)
from uipe_merge.checkpoint.storage import read_document
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, UnsafeInputError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.storage import Folder

CONFIG_NAME = "adapter_config.json"
ADAPTER = "adapter"
"""What ``TensorSpec.home`` of an adapter's tensors begins with."""

_FILES = (("adapter_model.safetensors", SAFETENSORS), ("adapter_model.bin", PICKLED))
_LARGEST_CONFIG = 2**22
_HANDLED = frozenset(
    [
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_bias",
        "bias",
        "modules_to_save",
    ]
)
# What only matters while training, or says where the adapter came from.
_HARMLESS = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "eva_config",
        "ensure_weight_tying",
    ]
)
_KEPT_BASE = (True, False, "gaussian", "eva", "orthogonal")
_KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<what>embedding_A|embedding_B|A|B|magnitude_vector)(?P<end>\.weight|\.bias)?$"
)
_PREFIX = "base_model.model."
_MERGE_FIRST = "merge it into its base with peft's `merge_and_unload` first"


class _Config(NamedTuple):
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    transposed: bool
    base: str

    def scale(self, module: str) -> tuple[int, float]:
        """Return rank and c of one module."""
        rank = _by_pattern(self.ranks, module, self.rank)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def is_adapter(names: list[str]) -> bool:
    """Tell whether a folder with these files is an adapter and not a whole model."""
    whole = (SAFETENSORS.single, SAFETENSORS.index_name, PICKLED.single, PICKLED.index_name)
    return CONFIG_NAME in names and not any(name in names for name in whole)


def open_adapter(folder: Folder, base: Checkpoint, *, allow_pickle: bool = False) -> Checkpoint:
    """Return the model that the adapter in ``folder`` makes of ``base``.

    Args:
        folder: The adapter's directory.
        base: The model it is applied to.
        allow_pickle: Read ``adapter_model.bin`` where there is no safetensors file.

    Raises:
        IncompatibleModelsError: It is no LoRA adapter, uses what is not supported, or names
            tensors that the base does not have.
        CorruptInputError: Its config or its tensors contradict one another.
        UnsafeInputError: It is pickled, and that was not allowed.
    """
    names = folder.names()
    config = _read_config(folder)
    file_name, family = _choose(folder, names, allow_pickle=allow_pickle)
    file = folder.open_file(file_name)
    try:
        header = family.read(file, file_name, None)
    finally:
        file.close()
    home = f"{ADAPTER}{len(base.folders)}"  # a base may have an adapter of its own
    stored = {spec.name: spec._replace(home=home) for spec in header.tensors}
    tensors = _apply(folder.location, stored, base, config)
    shard = ShardInput(file_name, file.stamp, header.sha256, home)
    own = [each._replace(home=each.home or "base") for each in base.shards]
    folders = {home: folder, **{home or "base": at for home, at in base.folders.items()}}
    warnings = _base_warning(folder, config.base, base)
    return Checkpoint(folder, names, [*own, shard], tensors, base.config, warnings, folders)


def _apply(
    location: str, stored: dict[str, TensorSpec], base: Checkpoint, config: _Config
) -> dict[str, TensorSpec]:
    """Give every tensor of the base its factors, or its replacement."""
    tensors = {name: spec._replace(home=spec.home or "base") for name, spec in base.tensors.items()}
    halves: dict[tuple[str, bool], dict[str, TensorSpec]] = {}
    unknown: list[str] = []
    for key, spec in stored.items():
        name = key.removeprefix(_PREFIX)
        match = _KEY.match(name)
        if match is None:
            # PEFT saves a whole embedding beside its factors, as the layer that they wrap.
            target = _resolve(name.replace(".base_layer.", "."), tensors)
            if target is None or tensors[target].shape != spec.shape:
                unknown.append(f"'{key}' replaces no tensor of the base")
            else:
                tensors[target] = spec._replace(name=target)
            continue
        if match["what"] == "magnitude_vector":
            raise IncompatibleModelsError(
                "is DoRA, which is not linear in its scale",
                file=location,
                tensor=key,
                remedy=_MERGE_FIRST,
            )
        bias = match["end"] == ".bias"
        halves.setdefault((match["module"], bias), {})[match["what"]] = spec
    for (module, bias), pair in halves.items():
        target = _resolve(f"{module}.{'bias' if bias else 'weight'}", tensors)
        if target is None:
            unknown.append(f"'{module}' is not in the base")
        else:
            where = f"{location}: module '{module}'"
            factor = _factor(where, module, pair, tensors[target], config, bias=bias)
            spec = tensors[target]
            tensors[target] = spec._replace(factors=(*spec.factors, factor))
    if unknown:
        raise IncompatibleModelsError(
            f"does not fit {base.location}: {listed(unknown)}",
            file=location,
            remedy="name the model that it was trained on as ORIGINAL",
        )
    return tensors


def _factor(
    where: str,
    module: str,
    pair: dict[str, TensorSpec],
    target: TensorSpec,
    config: _Config,
    *,
    bias: bool,
) -> Factor:
    """Check one pair of factors against the tensor they update."""
    for spec in (target, *pair.values()):
        if not spec.dtype.computes or spec.dtype.lanes > 1:
            raise IncompatibleModelsError(
                f"has the dtype {spec.dtype.name}, with which no update is formed",
                file=where,
                tensor=spec.name,
            )
    rank, scale = config.scale(module)
    if bias:
        vector = pair.get("B")
        if vector is None or vector.shape != target.shape:
            raise CorruptInputError("its lora_B bias does not fit", file=where, tensor=target.name)
        return Factor(vector, None, transposed=False, scale=scale)
    embedding = "embedding_A" in pair or "embedding_B" in pair
    first, second = (pair.get(f"embedding_{side}" if embedding else side) for side in "AB")
    if first is None or second is None:
        raise CorruptInputError("has lora_A without lora_B, or the reverse", file=where)
    if len(first.shape) != 2 or len(second.shape) != 2 or len(target.shape) != 2:
        raise IncompatibleModelsError(
            "is not a matrix (a convolution?)", file=where, tensor=target.name, remedy=_MERGE_FIRST
        )
    if not first.shape[0] == second.shape[1] == rank:
        raise CorruptInputError(
            f"has rank {first.shape[0]} and {second.shape[1]}, its config says {rank}", file=where
        )
    transposed = config.transposed or embedding
    rows, columns = second.shape[0], first.shape[1]
    if target.shape != ((columns, rows) if transposed else (rows, columns)):
        raise IncompatibleModelsError(
            f"makes an update of {[rows, columns]}, the base has {list(target.shape)}",
            file=where,
            tensor=target.name,
            remedy="name the model that it was trained on as ORIGINAL",
        )
    return Factor(second, first, transposed=transposed, scale=scale)


def _read_config(folder: Folder) -> _Config:
    where = f"{folder.location}/{CONFIG_NAME}"
    try:
        config = json.loads(read_document(folder, CONFIG_NAME, _LARGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise CorruptInputError(f"is not valid JSON: {error}", file=where) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise IncompatibleModelsError(
            f"is a PEFT adapter of type {kind}, not LORA", file=where, remedy=_MERGE_FIRST
        )
    odd = [
        name
        for name, value in config.items()
        if name not in _HANDLED | _HARMLESS | {"init_lora_weights"} and value
    ]
    if config.get("init_lora_weights", True) not in _KEPT_BASE:
        odd.append("init_lora_weights")  # PiSSA, OLoRA, … also change the base
    if odd:
        raise IncompatibleModelsError(
            f"uses {', '.join(sorted(odd))}, which is not supported",
            file=where,
            remedy=_MERGE_FIRST,
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not _usable(rank, alpha, ranks, alphas):
        raise CorruptInputError("has a rank or lora_alpha that is no usable number", file=where)
    return _Config(
        rank,
        float(alpha),
        bool(config.get("use_rslora")),
        ranks,
        alphas,
        bool(config.get("fan_in_fan_out")),
        str(config.get("base_model_name_or_path") or ""),
    )


def _usable(rank: object, alpha: object, ranks: object, alphas: object) -> bool:
    """Tell whether ranks are natural numbers and the lora_alphas finite."""
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return False
    whole = [rank, *ranks.values()]
    real = [alpha, *alphas.values()]
    return all(type(value) is int and value > 0 for value in whole) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in real
    )


def _choose(folder: Folder, names: list[str], *, allow_pickle: bool) -> tuple[str, Family]:
    for name, family in _FILES:
        if name in names:
            if family is PICKLED and not allow_pickle:
                raise UnsafeInputError(
                    f"holds a pickled adapter ('{name}'), and unpickling can run code",
                    file=folder.location,
                    remedy="add --allow-pickle to read the tensors without running any of it",
                )
            return name, family
    raise CorruptInputError("has no adapter_model.safetensors", file=folder.location)


def _base_warning(folder: Folder, named: str, base: Checkpoint) -> list[str]:
    ours = unpinned(base.location).rstrip("/")
    if not named or named.rstrip("/").split("/")[-1] == ours.split("/")[-1]:
        return []
    return [
        (
            f"{folder.location}: was trained on {named}; it is applied to {ours} (check that this "
            "is the same model)"
        )
    ]


def _resolve(name: str, tensors: Mapping[str, TensorSpec]) -> str | None:
    """Find a tensor of the base, which may be stored with or without the model's prefix."""
    if name in tensors:
        return name
    shorter = name.partition(".")[2]
    if shorter in tensors:
        return shorter
    longer = [each for each in tensors if each.endswith("." + name)]
    return longer[0] if len(longer) == 1 else None


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Look a module up as PEFT does: a key matches the whole name or its end after a dot."""
    for key, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default
