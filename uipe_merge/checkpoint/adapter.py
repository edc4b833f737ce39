"""PEFT LoRA adapters: an unlearned model told as its base and a low-rank update.

θᵤ = θ₀ + c·B·A for every matrix the adapter names, with c = lora_alpha/r, or lora_alpha/√r
where rank-stabilised; with DoRA its rows are brought to the lengths the adapter says. Source:
the LoRA section of the PEFT documentation and its config class. Nothing is merged here: a
tensor's spec gets the factors (see ``factors``), and the product is formed a few rows at a
time when the tensor is streamed.

A field of the config that changes what the adapter means and is not handled here is refused
by name, never ignored.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.checkpoint import experts, strict_json
from uipe_merge.checkpoint.factors import (
    MERGE_FIRST,
    Halves,
    bias_factor,
    matrix_factor,
    parameter_factors,
)
from uipe_merge.checkpoint.hub import unpinned
from uipe_merge.checkpoint.model import (
    PICKLED,
    SAFETENSORS,
    Adapter,
    Checkpoint,
    Family,
    ShardInput,
)
from uipe_merge.checkpoint.patterns import Pattern, PatternError, compile_keys
from uipe_merge.checkpoint.storage import read_document
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, UnsafeInputError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.checkpoint.storage import Folder

CONFIG_NAME = "adapter_config.json"
ADAPTER = "adapter"
"""What ``TensorSpec.home`` of an adapter's tensors begins with."""

WEIGHTS_NAME = "adapter_model.safetensors"
_FILES = ((WEIGHTS_NAME, SAFETENSORS), ("adapter_model.bin", PICKLED))
_LARGEST_CONFIG = 2**22
_LARGEST = 2**53  # a rank or lora_alpha that is a number all the same
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
        "use_dora",
        "target_parameters",
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
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")
_EXCLUDED = {
    "use_dora": ("lora_bias",),
    "target_parameters": ("use_dora", "lora_bias", "fan_in_fan_out"),
}
"""What PEFT does not take beside a field, so that nothing says what it would mean."""


Patterns = list[tuple[Pattern, float]]
"""A number for the modules that match, in order."""


class _Config(NamedTuple):
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Patterns
    alphas: Patterns
    transposed: bool
    dora: bool
    parameters: tuple[str, ...]
    base: str
    document: dict[str, object]

    def parameters_of(self, module: str) -> list[str]:
        """Return the full names of the parameters of a module that are targets themselves."""
        pairs = ((f"{module}.{each.rpartition('.')[2]}", each) for each in self.parameters)
        return sorted({name for name, target in pairs if f".{name}".endswith(f".{target}")})

    def scale(self, module: str) -> tuple[int, float]:
        """Return rank and c of one module or parameter."""
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
    if config.parameters and (fused := experts.together(base)) is not None:
        base = base._replace(tensors=fused)  # PEFT names what the model has in memory
    tensors, adapter = _apply(folder.location, stored, base, config)
    shard = ShardInput(file_name, file.stamp, header.sha256, home)
    own = [each._replace(home=each.home or "base") for each in base.shards]
    folders = {home: folder, **{home or "base": at for home, at in base.folders.items()}}
    warnings = _base_warning(folder, config.base, base)
    return Checkpoint(
        folder, names, [*own, shard], tensors, base.config, warnings, folders, adapter
    )


def _apply(
    location: str, stored: dict[str, TensorSpec], base: Checkpoint, config: _Config
) -> tuple[dict[str, TensorSpec], Adapter]:
    """Give every tensor of the base its factors, or its replacement."""
    tensors = {name: spec.in_home(spec.home or "base") for name, spec in base.tensors.items()}
    halves: dict[tuple[str, bool], Halves] = {}
    wrapped: dict[str, list[Halves]] = {}
    replaced: dict[str, str] = {}
    places = {} if base.adapter is None else dict(base.adapter.places)
    unknown: list[str] = []
    for key, spec in stored.items():
        name = key.removeprefix(_PREFIX)
        match = _KEY.match(name)
        if match is None:
            # PEFT saves a whole embedding beside its factors, as the layer that they wrap.
            target = _resolve(_WRAPPED.sub("", name), tensors)
            if target is None or tensors[target].shape != spec.shape:
                unknown.append(f"'{key}' replaces no tensor of the base")
            else:
                places.setdefault(target, tensors[target].file)
                tensors[target] = spec._replace(name=target)
                replaced[key] = target
            continue
        bias = match["end"] == ".bias"
        halves.setdefault((match["module"], bias), {})[match["what"]] = spec
    for (wrapper, bias), pair in halves.items():
        module = _WRAPPED.sub("", wrapper)
        if _parameters(module, tensors, config):
            wrapped.setdefault(module, []).append(pair)
            continue
        target = _resolve(f"{module}.{'bias' if bias else 'weight'}", tensors)
        if target is None:
            unknown.append(_missing(module, config.parameters_of(module), tensors))
            continue
        where, spec = f"{location}: module '{module}'", tensors[target]
        rank, scale = config.scale(module)
        if bias:
            tensors[target] = bias_factor(where, pair, spec, scale)
            continue
        turned = config.transposed
        tensors[target] = matrix_factor(
            where, pair, spec, rank, scale, transposed=turned, dora=config.dora
        )
    for module, pairs in wrapped.items():
        names = _parameters(module, tensors, config)
        targets = {at: (tensors[at], *config.scale(name)) for name, at in names.items()}
        tensors |= parameter_factors(f"{location}: module '{module}'", pairs, targets)
    if unknown:
        raise IncompatibleModelsError(
            f"does not fit {base.location}: {listed(unknown)}",
            file=location,
            remedy="name the model that it was trained on as ORIGINAL",
        )
    own = {spec.home for spec in stored.values()}
    left = {
        factor.left.name: target
        for target, spec in tensors.items()
        for factor in spec.factors
        if factor.left.home in own
    }
    return tensors, Adapter(stored, left, replaced, places, config.document)


def _parameters(module: str, tensors: Mapping[str, TensorSpec], config: _Config) -> dict[str, str]:
    """Return those parameters of a module that are targets, with their names in the base."""
    names = config.parameters_of(module)
    return {name: at for name in names if (at := _resolve(name, tensors)) is not None}


def _missing(module: str, parameters: list[str], tensors: Mapping[str, TensorSpec]) -> str:
    """Say what the base lacks, and what it may have instead."""
    what = f"'{', '.join(parameters) or module}' is not in the base"
    layer = re.match(r"(.*\.)?\d+\.", module)
    if parameters and layer is not None:
        single = re.compile(rf"{re.escape(layer[0])}.*\bexperts\.\d+\.")
        for name in tensors:
            if single.match(name):
                return f"{what}, which stores its experts one by one ('{name}')"
    return what


def _read_config(folder: Folder) -> _Config:
    where = f"{folder.location}/{CONFIG_NAME}"
    try:
        config = strict_json.settings(read_document(folder, CONFIG_NAME, _LARGEST_CONFIG))
    except ValueError as error:
        raise CorruptInputError(f"is not valid JSON: {error}", file=where) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise IncompatibleModelsError(
            f"is a PEFT adapter of type {kind}, not LORA", file=where, remedy=MERGE_FIRST
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
            remedy=MERGE_FIRST,
        )
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise CorruptInputError("its target_parameters are not a list of names", file=where)
    for field, others in _EXCLUDED.items():
        mixed = [name for name in others if config.get(field) and config.get(name)]
        if mixed:
            raise CorruptInputError(
                f"says {', '.join(mixed)} beside {field}, which PEFT does not take", file=where
            )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not _usable(rank, alpha, ranks, alphas):
        raise CorruptInputError("has a rank or lora_alpha that is no usable number", file=where)
    try:
        by_rank, by_alpha = _compiled(ranks), _compiled(alphas)
    except PatternError as error:
        raise IncompatibleModelsError(f"its key {error}", file=where, remedy=MERGE_FIRST) from None
    return _Config(
        rank,
        float(alpha),
        bool(config.get("use_rslora")),
        by_rank,
        by_alpha,
        bool(config.get("fan_in_fan_out")),
        bool(config.get("use_dora")),
        tuple(parameters),
        str(config.get("base_model_name_or_path") or ""),
        config,
    )


def _usable(rank: object, alpha: object, ranks: object, alphas: object) -> bool:
    """Tell whether ranks are natural numbers and the lora_alphas finite."""
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return False
    whole = [rank, *ranks.values()]
    real = [alpha, *alphas.values()]
    return all(type(value) is int and 0 < value <= _LARGEST for value in whole) and all(
        isinstance(value, int | float) and abs(value) <= _LARGEST for value in real
    )


def _compiled(patterns: Mapping[str, float]) -> Patterns:
    compiled = compile_keys(patterns)
    return [(compiled[key], value) for key, value in patterns.items()]


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


def _by_pattern(patterns: Patterns, module: str, default: float) -> float:
    """Look a module up as PEFT does: a key matches the whole name or its end after a dot."""
    for pattern, value in patterns:
        if pattern.matches(module):
            return value
    return default
