"""Block-scaled FP8: weights in 8 bits and, beside each, one scale for every block of it.

θ = w · s, with w stored as ``NAME`` and s of its block in ``NAME_scale_inv``. Source: the
report of DeepSeek-V3, arXiv 2412.19437, section 3.3. Nothing is multiplied here: a tensor's
spec gets its scales, and the product is formed a cell at a time when the tensor is streamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uipe_merge.checkpoint.dtypes import OUTPUT_DTYPES
from uipe_merge.checkpoint.formats import FP8, SCALED
from uipe_merge.checkpoint.header import Scales
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.header import TensorSpec

DEFAULT_DTYPE = "bfloat16"
"""What scaled tensors are written as where config.json names no type."""

_WEIGHT = "F8_E4M3"
_SCALE = "_scale_inv"
_NUMBERS = ("F32", "BF16", "F16")
_DEFAULT_BLOCK = [128, 128]
_ACTIVATIONS = (".activation_scale", ".input_scale")
_AGAIN = "download the checkpoint again"


def apply_scales(
    location: str, config: Mapping[str, object], tensors: dict[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], list[str]]:
    """Give every FP8 tensor its scales, and take these out of the checkpoint's tensors.

    Scales of activations go too: they serve 8-bit arithmetic, which the output is not for.
    Where neither config.json nor a tensor's name speaks of scales, all stays as it is.

    Returns:
        The tensors in their order, and warnings that say what was done.

    Raises:
        CorruptInputError: Scales are missing or scale nothing, a shape does not fit, or
            config.json has no usable block size.
        IncompatibleModelsError: Something else than F8_E4M3 is scaled, the scales are of a
            type that is not supported, or config.json describes them where it is not read.
    """
    scaled = {
        name.removesuffix(_SCALE): spec
        for name, spec in tensors.items()
        if name.endswith(SCALED) or _is_scale(name, tensors)
    }
    quantisation = config.get("quantization_config")
    fields = quantisation if isinstance(quantisation, dict) else {}
    if not scaled and fields.get("quant_method") != FP8:
        return tensors, []
    _refuse_nested(location, config)
    block = _block_size(location, fields)
    _refuse_types(location, scaled, tensors)
    problems = [f"'{name}{_SCALE}' scales no tensor" for name in scaled if name not in tensors]
    dtype = OUTPUT_DTYPES[said_dtype(config) or DEFAULT_DTYPE]
    activations = [
        name
        for name in tensors
        if name.endswith(_ACTIVATIONS) and f"{name.rpartition('.')[0]}.weight" in scaled
    ]
    dropped = {*activations, *(f"{name}{_SCALE}" for name in scaled)}
    kept = {name: spec for name, spec in tensors.items() if name not in dropped}
    for name, spec in kept.items():
        values = scaled.get(name)
        if values is None:
            if spec.dtype.name == _WEIGHT:
                problems.append(f"'{name}' is {_WEIGHT} and has no '{name}{_SCALE}'")
            continue
        grid = None if block is None else _grid(spec.shape, block)
        if values.shape in ((), (1,)):
            kept[name] = spec._replace(scales=Scales(values, (), dtype))
        elif block is not None and values.shape == grid:
            kept[name] = spec._replace(scales=Scales(values, block, dtype))
        else:
            needs = "one number" if grid is None else f"{list(grid)} of blocks of {block}"
            problems.append(
                f"'{name}{_SCALE}' is {list(values.shape)}, {list(spec.shape)} needs {needs}"
            )
    if problems:
        raise CorruptInputError(
            f"weights and scales contradict one another: {listed(problems)}",
            file=location,
            remedy=_AGAIN,
        )
    warnings = [
        f"{location}: {len(scaled)} FP8 tensors are multiplied by their scales (--dequantize)"
    ]
    if activations:
        warnings.append(f"{location}: left out {len(activations)} scales of activations")
    return kept, warnings


def said_dtype(config: Mapping[str, object]) -> str | None:
    """Return what config.json says the values are, if it is a type that can be written."""
    for fields in (config, config.get("text_config")):
        if isinstance(fields, dict):
            for key in ("dtype", "torch_dtype"):
                said = fields.get(key)
                if isinstance(said, str) and said in OUTPUT_DTYPES:
                    return said
    return None


def _is_scale(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    """Tell the scales of experts that are stored fused, whose names do not end in weight."""
    weight = tensors.get(name.removesuffix(_SCALE)) if name.endswith(_SCALE) else None
    return weight is not None and weight.dtype.name == _WEIGHT


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...] | None:
    """Return the shape of the scales of a matrix, or of several stacked."""
    if len(shape) < 2:
        return None
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _block_size(location: str, fields: Mapping[str, object]) -> tuple[int, int] | None:
    """Return rows and columns of a block; ``None`` where config.json says there are none."""
    size = fields.get("weight_block_size", _DEFAULT_BLOCK)
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2:
        rows, columns = size
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise CorruptInputError(
        f"its weight_block_size is {size!s:.60}, not two natural numbers",
        file=f"{location}/config.json",
        remedy=_AGAIN,
    )


def _refuse_nested(location: str, config: Mapping[str, object]) -> None:
    for name, fields in config.items():
        if isinstance(fields, dict) and fields.get("quantization_config"):
            raise IncompatibleModelsError(
                f"has its quantization_config inside {name}, where it is not understood",
                file=f"{location}/config.json",
                remedy="save the model unquantised first",
            )


def _refuse_types(
    location: str, scaled: Mapping[str, TensorSpec], tensors: Mapping[str, TensorSpec]
) -> None:
    for name, values in scaled.items():
        weight = tensors.get(name)
        for spec, allowed in ((weight, (_WEIGHT,)), (values, _NUMBERS)):
            if spec is not None and spec.dtype.name not in allowed:
                raise IncompatibleModelsError(
                    f"is {spec.dtype.name}; what is dequantised is {_WEIGHT} with scales in "
                    f"{', '.join(_NUMBERS)}",
                    file=location,
                    tensor=spec.name,
                    remedy="save the model unquantised first",
                )
