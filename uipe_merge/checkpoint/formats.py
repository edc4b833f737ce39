"""Checkpoints that are not plain safetensors models: recognised, and refused by name.

A quantised tensor is not θ but a code for it, and the difference of two codes is not an
update. Better one clear line before anything is written than a model of noise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.dtypes import PACKED
from uipe_merge.errors import (
    CorruptInputError,
    IncompatibleModelsError,
    UipeMergeError,
    UnsafeInputError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from uipe_merge.checkpoint.header import TensorSpec

FP8 = "fp8"
"""The ``quant_method`` of a block-scaled FP8 checkpoint."""

SCALED = ".weight_scale_inv"
"""What the names of such a checkpoint's scales end in."""

_DCP_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TRAINER_PICKLES = re.compile(r"(?:^|/)(?:training_args|optimizer|scheduler|rng_state.*|scaler)\.")
_CODE_SUFFIXES = {
    SCALED: "block-scaled FP8",
    ".weight_scale": "scaled FP8 or INT8 (compressed-tensors)",
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4",
}
_DEQUANTISE = "load it with transformers, `dequantize()` it and save it unquantised first"
_FLAG = "add --dequantize to multiply its scales in while streaming"


def refuse_shard_names(location: str, names: Iterable[str]) -> None:
    """Refuse torch distributed-checkpoint shards, which hold slices of tensors.

    Raises:
        IncompatibleModelsError: One of the names is such a shard.
    """
    for name in names:
        if _DCP_SHARD.search(name):
            raise IncompatibleModelsError(
                f"'{name}' is a shard of a torch distributed checkpoint (slices of tensors)",
                file=location,
                remedy="consolidate it first (torch.distributed.checkpoint's "
                "consolidate_safetensors_files_on_every_rank)",
            )


def no_weights(location: str, names: list[str]) -> UipeMergeError:
    """Return the error for a directory without safetensors files, saying what it holds."""
    present = set(names)
    if "adapter_config.json" in present:
        return IncompatibleModelsError(
            "is a PEFT adapter, not a whole model",
            file=location,
            remedy="merge it into its base first (peft's `merge_and_unload`)",
        )
    for name in names:
        if name.endswith(".gguf"):
            return CorruptInputError(
                f"holds a GGUF model ('{name}')",
                file=location,
                remedy="use the safetensors form of the model",
            )
    for name in names:
        if name.endswith(_PICKLES) and not _TRAINER_PICKLES.search(name):
            return UnsafeInputError(
                f"holds pickled weights ('{name}'), and unpickling can run code",
                file=location,
                remedy="add --allow-pickle to read the tensors without running any of it, or save "
                "the model as safetensors",
            )
    checkpoints = sorted(
        {name.split("/")[0] for name in names if re.match(r"checkpoint-\d+/", name)}
    )
    if checkpoints:
        return CorruptInputError(
            f"holds no model of its own, but {', '.join(checkpoints)}",
            file=location,
            remedy="name one of these directories",
        )
    return CorruptInputError(
        "holds no .safetensors file", file=location, remedy="name a checkpoint directory"
    )


def refuse_quantised(
    location: str,
    config: Mapping[str, object],
    tensors: Mapping[str, TensorSpec],
    *,
    dequantize: bool = False,
) -> None:
    """Refuse a quantised checkpoint, told by its config or by its tensors.

    With ``dequantize`` block-scaled FP8 passes, which ``scaled`` takes care of.

    Raises:
        IncompatibleModelsError: It is one; the message names the format.
    """
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict) and quantisation:
        method = quantisation.get("quant_method", "an unnamed method")
        if not (dequantize and method == FP8):
            raise IncompatibleModelsError(
                f"is quantised with {method} (quantization_config in config.json)",
                file=location,
                remedy=_FLAG if method == FP8 else _DEQUANTISE,
            )
    endings = tuple(suffix for suffix in _CODE_SUFFIXES if not (dequantize and suffix == SCALED))
    for name, spec in tensors.items():
        if name.endswith(endings):
            suffix = next(ending for ending in endings if name.endswith(ending))
            if _is_code(name, suffix, spec, tensors):
                raise IncompatibleModelsError(
                    f"marks a checkpoint quantised as {_CODE_SUFFIXES[suffix]}",
                    file=location,
                    tensor=name,
                    remedy=_FLAG if suffix == SCALED else _DEQUANTISE,
                )
        if spec.dtype.name in PACKED:
            raise IncompatibleModelsError(
                f"has the packed dtype {spec.dtype.name} of a quantised checkpoint",
                file=location,
                tensor=name,
                remedy=_DEQUANTISE,
            )


def _is_code(name: str, suffix: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> bool:
    """Tell a quantiser's tensor from one that merely has such a name."""
    if suffix == "_blocks":
        return spec.dtype.name == "U8" and name.removesuffix(suffix) + "_scales" in tensors
    if suffix == ".weight_scale":
        weight = tensors.get(name.removesuffix("_scale"))
        return weight is not None and weight.dtype.bits == 8
    return True
