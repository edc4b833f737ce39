"""The index of a sharded checkpoint: which shard holds which tensor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import strict_json
from uipe_merge.checkpoint.storage import read_document
from uipe_merge.errors import CorruptInputError, UnsafeInputError, escape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.storage import Folder

INDEX_NAME = "model.safetensors.index.json"


class Index(NamedTuple):
    """A checked index.

    Attributes:
        weight_map: Tensor name to shard name.
        total_size: Bytes of all tensors as the index claims; ``None`` where it does not.
    """

    weight_map: dict[str, str]
    total_size: int | None


def read_index(folder: Folder, name: str, ending: str = ".safetensors") -> Index:
    """Read the index file called ``name``, whose shards end in ``ending``.

    Raises:
        CorruptInputError: It is not JSON, or has no usable ``weight_map``.
        UnsafeInputError: A shard name would leave the directory.
    """
    shown = f"{folder.location}/{name}"
    content = read_document(folder, name, strict_json.MOST_BYTES)
    try:
        document = strict_json.loads(content, naturals_only=False)
    except strict_json.StrictJsonError as error:
        raise CorruptInputError(f"is not valid: {error}", file=shown) from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptInputError("has no weight_map from tensors to shards", file=shown)
    # Far fewer shards than tensors: check each name once, with a tensor to blame.
    for shard, tensor in {_key(shard): tensor for tensor, shard in weight_map.items()}.items():
        _check_name(shard, ending, shown, tensor)
    metadata = document.get("metadata") if isinstance(document, dict) else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():  # as some writers have it
        total = int(total)
    return Index(weight_map, total if type(total) is int else None)


def _key(shard: object) -> str:
    return shard if isinstance(shard, str) else ""


def _check_name(shard: str, ending: str, shown: str, tensor: str) -> None:
    if not shard:
        raise CorruptInputError("is mapped to no file name", file=shown, tensor=tensor)
    if shard in (".", "..") or any(character in shard for character in "/\\:\0"):
        raise UnsafeInputError(
            f"its shard '{shard}' is not a plain file name",
            file=shown,
            tensor=tensor,
            remedy="an index may only name files beside it: do not trust this checkpoint",
        )
    if escape(shard) != shard:
        raise CorruptInputError(
            f"its shard '{shard}' has control characters in its name", file=shown, tensor=tensor
        )
    if not shard.endswith(ending):
        raise CorruptInputError(
            f"its shard '{shard}' is not a {ending} file", file=shown, tensor=tensor
        )


def encode_index(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> bytes:
    """Return an index as transformers and huggingface_hub write it: sorted, indented by 2."""
    document = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
