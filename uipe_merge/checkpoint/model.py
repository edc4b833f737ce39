"""A checkpoint: which tensors it has and where their bytes lie. Headers only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import formats, strict_json
from uipe_merge.checkpoint.header import Header, KnownHeaders, TensorSpec, read_header
from uipe_merge.checkpoint.index import INDEX_NAME, Index, read_index
from uipe_merge.checkpoint.pickled import read_pickled
from uipe_merge.checkpoint.scaled import apply_scales
from uipe_merge.checkpoint.storage import read_document
from uipe_merge.errors import CorruptInputError, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uipe_merge.checkpoint.storage import Folder, InputFile, Stamp

SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")
_LARGEST_CONFIG = 2**22  # bytes; of the largest ones, with the labels of 20 k classes, twice
_AGAIN = "download the checkpoint again"


class Family(NamedTuple):
    """How a kind of weight file is named and read.

    Attributes:
        single: The one file of a checkpoint that is not sharded.
        index_name: The index of one that is.
        ending: What its files end in.
        read: Reads the tensors of an open file, given its name and the headers known already.
    """

    single: str
    index_name: str
    ending: str
    read: Callable[[InputFile, str, KnownHeaders | None], Header]


SAFETENSORS = Family(SINGLE_NAME, INDEX_NAME, ".safetensors", read_header)
PICKLED = Family("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", read_pickled)


class ShardInput(NamedTuple):
    """One weight file that was read, as the manifest will name it.

    Attributes:
        name: File name.
        stamp: Size and modification time at planning.
        header_sha256: Digest of its header.
        home: Which of the checkpoint's folders it is in; ``""`` is its own.
    """

    name: str
    stamp: Stamp
    header_sha256: str
    home: str = ""


class Adapter(NamedTuple):
    """What the files of an adapter hold, beside the model that it makes of its base.

    Attributes:
        stored: Its tensors by the names that it gives them, in the order of their bytes.
        left: Those of them that the update grows with (every B, and the bias of a B), and the
            tensors of the base that they change.
        replaced: The tensors of the base that others of them take the place of.
        places: In which file of the base those were, by their names.
        config: Its config, as parsed.
    """

    stored: dict[str, TensorSpec]
    left: dict[str, str]
    replaced: dict[str, str]
    places: dict[str, str]
    config: dict[str, object]


class Checkpoint(NamedTuple):
    """One model on disk.

    Attributes:
        folder: Where its files are read from.
        names: All files in the folder, relative.
        shards: Its weight files, sorted by name.
        tensors: Every tensor by name, shard by shard in the order of the bytes; scales that
            were applied are none.
        config: The parsed ``config.json``, empty where there is none.
        warnings: What is odd but harmless.
        folders: The folders its tensors are read from, by ``TensorSpec.home``: its own, and
            for an adapter that of its base.
        adapter: The adapter that was applied last, if it was made with one.
    """

    folder: Folder
    names: list[str]
    shards: list[ShardInput]
    tensors: dict[str, TensorSpec]
    config: dict[str, object]
    warnings: list[str]
    folders: dict[str, Folder]
    adapter: Adapter | None = None

    @property
    def location(self) -> str:
        """The folder as the user named it."""
        return self.folder.location


def open_checkpoint(
    folder: Folder,
    known: KnownHeaders | None = None,
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Checkpoint:
    """Read the index, every header and the config of the model in ``folder``.

    Args:
        folder: Where it is.
        known: Headers of a checkpoint that was opened before, to be shared with this one.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file.
        dequantize: Take block-scaled FP8 tensors with their scales.

    Raises:
        CorruptInputError: A file is damaged, or the files contradict one another.
        UnsafeInputError: A shard leaves the directory, or only pickled weights are there.
        IncompatibleModelsError: It is quantised, an adapter, or a training checkpoint.
        OutputError: A file cannot be opened or read.
    """
    names = folder.names()
    family = SAFETENSORS
    weights = _weights(names, family)
    if not weights and INDEX_NAME not in names and allow_pickle:
        family = PICKLED
        weights = [name for name in _weights(names, family) if name.startswith("pytorch_model")]
    formats.refuse_shard_names(folder.location, names)
    if "adapter_config.json" in names and SINGLE_NAME not in names and INDEX_NAME not in names:
        raise formats.no_weights(folder.location, names)
    index, files = _choose(folder, names, weights, family)
    tensors, shards = _read_shards(folder, files, index, family, known)
    warnings = _check_total(folder, index, tensors)
    strays = sorted(set(weights) - set(files))
    if strays:
        warnings.append(f"{folder.location}: {listed(strays)} not part of the model, ignored")
    config = _read_config(folder) if "config.json" in names else {}
    formats.refuse_quantised(folder.location, config, tensors, dequantize=dequantize)
    if dequantize:
        tensors, applied = apply_scales(folder.location, config, tensors)
        warnings += applied
    return Checkpoint(folder, names, shards, tensors, config, warnings, {"": folder})


def _weights(names: list[str], family: Family) -> list[str]:
    return [name for name in names if name.endswith(family.ending) and "/" not in name]


def _choose(
    folder: Folder, names: list[str], weights: list[str], family: Family
) -> tuple[Index | None, list[str]]:
    """Decide which files are the model, refusing where two readers would differ."""
    where = folder.location
    if family.index_name in names:
        index = read_index(folder, family.index_name, family.ending)
        files = sorted(set(index.weight_map.values()))
        if family.single in weights and family.single not in files:
            raise CorruptInputError(
                f"holds both {family.single} and {family.index_name}, which name different models",
                file=where,
                remedy="remove the one that is stale",
            )
        missing = sorted(set(files) - set(names))
        if len(missing) > 1:  # a single one is missed, by name, when it is opened
            raise CorruptInputError(
                f"lacks {len(missing)} of the {len(files)} shards that {family.index_name} names: "
                f"{listed(missing)}",
                file=where,
                remedy=_AGAIN,
            )
        return index, files
    if family.single in weights:
        return None, [family.single]
    totals = sorted({match[2] for name in weights if (match := _SHARD.search(name))})
    if totals:
        mixed = f", and shards of {len(totals)} different sets" if len(totals) > 1 else ""
        raise CorruptInputError(
            f"holds shards but no {family.index_name}{mixed}",
            file=where,
            remedy="download the index (and remove shards that are stale)",
        )
    if len(weights) == 1:
        return None, weights
    if weights:
        raise CorruptInputError(
            f"holds {listed(weights)} and no index that says which are the model", file=where
        )
    raise formats.no_weights(where, names)


def _read_shards(
    folder: Folder,
    files: Iterable[str],
    index: Index | None,
    family: Family,
    known: KnownHeaders | None,
) -> tuple[dict[str, TensorSpec], list[ShardInput]]:
    """Read every header and hold it against the index."""
    tensors: dict[str, TensorSpec] = {}
    shards: list[ShardInput] = []
    problems: list[str] = []
    for name in files:
        file = folder.open_file(name)
        try:
            header = family.read(file, name, known)
        finally:
            file.close()
        shards.append(ShardInput(name, file.stamp, header.sha256))
        for spec in header.tensors:
            if spec.name in tensors:
                problems.append(f"'{spec.name}' is in {tensors[spec.name].file} and in {name}")
            elif index is not None and index.weight_map.get(spec.name) != name:
                claimed = index.weight_map.get(spec.name)
                problems.append(
                    f"'{spec.name}' is in {name} but the index "
                    + ("lacks it" if claimed is None else f"says {claimed}")
                )
            tensors[spec.name] = spec
    if index is not None:
        problems += [
            f"'{name}' is not in {shard}, where the index says it is"
            for name, shard in index.weight_map.items()
            if name not in tensors
        ]
    if problems:
        raise CorruptInputError(
            f"index and shards contradict one another: {listed(problems)}",
            file=folder.location,
            remedy=_AGAIN,
        )
    return tensors, shards


def _check_total(folder: Folder, index: Index | None, tensors: dict[str, TensorSpec]) -> list[str]:
    total = sum(spec.nbytes for spec in tensors.values())
    if index is None or index.total_size in (None, total):
        return []
    return [
        (
            f"{folder.location}: the index says total_size is {index.total_size}, the tensors "
            f"have {total} bytes (harmless; some writers count tied tensors differently)"
        )
    ]


def _read_config(folder: Folder) -> dict[str, object]:
    where = f"{folder.location}/config.json"
    try:
        config = strict_json.settings(read_document(folder, "config.json", _LARGEST_CONFIG))
    except ValueError as error:
        raise CorruptInputError(f"is not valid JSON: {error}", file=where) from None
    if not isinstance(config, dict):
        raise CorruptInputError("is not a JSON object", file=where)
    return config
