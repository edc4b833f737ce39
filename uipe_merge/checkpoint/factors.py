"""The factors of a PEFT adapter, checked against the tensors that they update.

Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; for the layout on disk, the LoRA
layers of PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uipe_merge.checkpoint.header import Factor, TensorSpec
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError

if TYPE_CHECKING:
    from collections.abc import Mapping

Halves = dict[str, TensorSpec]
"""What an adapter stores for one module: ``A`` and ``B``, or ``embedding_A`` and
``embedding_B``; with DoRA ``magnitude_vector`` too."""

MERGE_FIRST = "merge it into its base with peft's `merge_and_unload` first"
_ANOTHER_BASE = "name the model that it was trained on as ORIGINAL"


def bias_factor(where: str, halves: Halves, target: TensorSpec, scale: float) -> TensorSpec:
    """Return a bias with what the adapter adds to it.

    Raises:
        IncompatibleModelsError: A tensor has a type with which no update is formed.
        CorruptInputError: The vector is missing or does not fit.
    """
    _check_dtypes(where, target, halves)
    vector = halves.get("B")
    if vector is None or vector.shape != target.shape:
        raise CorruptInputError("its lora_B bias does not fit", file=where, tensor=target.name)
    return _with(target, Factor(vector, None, transposed=False, scale=scale))


def matrix_factor(
    where: str,
    halves: Halves,
    target: TensorSpec,
    rank: int,
    scale: float,
    *,
    transposed: bool,
    dora: bool,
) -> TensorSpec:
    """Return the weight of a module with what the adapter makes of it.

    Args:
        where: The module, for messages.
        halves: What the adapter stores for it.
        target: The weight.
        rank: The rank that the config says.
        scale: c.
        transposed: Whether the weight is stored with its inputs as rows.
        dora: Whether the adapter has magnitudes.

    Raises:
        IncompatibleModelsError: The update has another shape than the weight, which is not
            a matrix or of a type with which no update is formed.
        CorruptInputError: A part of the update is missing or contradicts the others.
    """
    _check_dtypes(where, target, halves)
    embedding = "embedding_A" in halves or "embedding_B" in halves
    first, second = (halves.get(f"embedding_{side}" if embedding else side) for side in "AB")
    magnitude = halves.get("magnitude_vector")
    if first is None and second is None:
        raise CorruptInputError("has lora_magnitude_vector without lora_A and lora_B", file=where)
    if first is None or second is None:
        raise CorruptInputError("has lora_A without lora_B, or the reverse", file=where)
    if (magnitude is not None) != dora:
        raise CorruptInputError(
            f"has {'no ' if dora else ''}lora_magnitude_vector, its config says "
            f"use_dora {str(dora).lower()}",
            file=where,
        )
    if len(first.shape) != 2 or len(second.shape) != 2 or len(target.shape) != 2:
        raise IncompatibleModelsError(
            "is not a matrix (a convolution?)", file=where, tensor=target.name, remedy=MERGE_FIRST
        )
    if not first.shape[0] == second.shape[1] == rank:
        raise CorruptInputError(
            f"has rank {first.shape[0]} and {second.shape[1]}, its config says {rank}", file=where
        )
    transposed = transposed or embedding
    rows, columns = second.shape[0], first.shape[1]
    if target.shape != ((columns, rows) if transposed else (rows, columns)):
        raise IncompatibleModelsError(
            f"makes an update of {[rows, columns]}, the base has {list(target.shape)}",
            file=where,
            tensor=target.name,
            remedy=_ANOTHER_BASE,
        )
    if magnitude is not None and target.scales is not None:
        raise IncompatibleModelsError(
            "is DoRA on an FP8 weight, whose norms are those of the dequantised one",
            file=where,
            tensor=target.name,
            remedy="write the base dequantised first (--alpha 0 --dequantize)",
        )
    if magnitude is not None and magnitude.shape != (rows,):
        raise CorruptInputError(
            f"its lora_magnitude_vector has the shape {list(magnitude.shape)}, not {[rows]}",
            file=where,
        )
    return _with(target, Factor(second, first, transposed, scale, magnitude=magnitude))


def parameter_factors(
    where: str, wrapped: list[Halves], targets: Mapping[str, tuple[TensorSpec, int, float]]
) -> dict[str, TensorSpec]:
    """Return the parameters of one module with what the adapter adds to them.

    PEFT wraps the module once for each parameter and stores neither which wrapper is whose nor
    whether a stack of matrices has its inputs as rows (the module's class says so, for all its
    parameters alike). Both follow from the shapes, and where they do not, nothing is guessed.

    Args:
        where: The module, for messages.
        wrapped: What the adapter stores for each of its wrappers.
        targets: The parameters by name, with the rank that the config says and c.

    Raises:
        IncompatibleModelsError: The updates have other shapes than the parameters, or could
            belong to them in two ways, or a type is one with which no update is formed.
        CorruptInputError: A part of an update is missing.
    """
    for halves in wrapped:
        for spec, _, _ in targets.values():
            _check_dtypes(where, spec, halves)
        if halves.keys() != {"A", "B"}:
            raise CorruptInputError(
                f"has {', '.join(sorted(halves))} for a parameter, not lora_A and lora_B",
                file=where,
            )
    ways = [_assign(wrapped, targets, transposed=transposed) for transposed in (False, True)]
    found = [way for way in ways if way is not None]
    names = ", ".join(targets)
    if not found:
        updates = [[list(halves[side].shape) for side in "AB"] for halves in wrapped]
        have = [list(spec.shape) for spec, _, _ in targets.values()]
        raise IncompatibleModelsError(
            f"has lora_A and lora_B of {updates}, which are no updates of {names} of {have} with "
            "the rank that its config says",
            file=where,
            remedy=_ANOTHER_BASE,
        )
    if {} in found or found[0] != found[-1]:
        raise IncompatibleModelsError(
            f"has updates that fit {names} in more than one way", file=where, remedy=MERGE_FIRST
        )
    return found[0]


def _assign(
    wrapped: list[Halves],
    targets: Mapping[str, tuple[TensorSpec, int, float]],
    *,
    transposed: bool,
) -> dict[str, TensorSpec] | None:
    """Give each parameter its wrapper, by shape; ``None`` if one stays over, empty if two fit."""
    result: dict[str, TensorSpec] = {}
    stored = [(halves["A"].shape, halves["B"].shape) for halves in wrapped]
    expected = []
    for name, (spec, rank, scale) in targets.items():
        if len(spec.shape) not in (2, 3):
            return None
        experts, rows, columns = spec.shape if len(spec.shape) == 3 else (1, *spec.shape)
        # PEFT adds B·A as it is to a single matrix, whatever the module's class says.
        turned = transposed and experts > 1
        if turned:
            rows, columns = columns, rows
        shapes = ((experts * rank, columns), (rows, rank * experts))
        expected.append(shapes)
        if shapes in stored:
            halves = wrapped[stored.index(shapes)]
            result[name] = _with(spec, Factor(halves["B"], halves["A"], turned, scale, experts))
    if sorted(stored) != sorted(expected):
        return None
    return result if len(set(stored)) == len(stored) else {}


def _check_dtypes(where: str, target: TensorSpec, halves: Halves) -> None:
    for spec in (target, *halves.values()):
        if not spec.dtype.computes or spec.dtype.lanes > 1:
            raise IncompatibleModelsError(
                f"has the dtype {spec.dtype.name}, with which no update is formed",
                file=where,
                tensor=spec.name,
            )


def _with(target: TensorSpec, factor: Factor) -> TensorSpec:
    return target._replace(factors=(*target.factors, factor))
