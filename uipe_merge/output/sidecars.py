"""The files beside the weights: which are carried over, and the one that may change.

Everything of the unlearned checkpoint goes into the output verbatim (tokenizer, chat
template, generation config, custom code as data that is never imported), and what it lacks
is filled from the original. Left out are weights in any format, what trainers leave behind,
and results of evaluations: a harness that finds the scores of the unlearned model beside the
merged one would take them for the merged one's.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.output.card import CARD_NAME
from uipe_merge.output.manifest import MANIFEST_NAME, FileRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.checkpoint.storage import Folder, InputFile
    from uipe_merge.output.filesystem import FileSystem

KEPT_CARD = "README.unlearned.md"
"""Where the unlearned checkpoint's own model card is kept; README.md is the merged one's."""

_PIECE = 4 * 2**20

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|npz|pkl|tflite|ot)$"
    r"|\.(safetensors|bin|msgpack|h5)\.index\.json$"
    r"|^adapter_config\.json$"  # beside it, transformers would load the adapter's base instead
)
_TRAINING = re.compile(
    r"^(trainer_state|trainer_log|train_results|eval_results|all_results)\.jsonl?$"
    r"|^(global_step\d+|checkpoint-\d+|runs|wandb|logs|evals?|\.hydra)/"
    r"|(^|/)events\.out\.tfevents"
    r"|^(latest|zero_to_fp32\.py)$"
)
_RESULTS = re.compile(r"(^|/)(\w+_(EVAL|SUMMARY)\.json|results_.*\.json|eval_log.*\.json)$")


class Edits(NamedTuple):
    """What ``config.json`` must say other than the checkpoint's, because the weights do.

    Attributes:
        dtype: The output dtype; ``None`` where it is the checkpoint's.
        fields: Top-level fields to set.
        removed: Top-level fields to leave out.
    """

    dtype: str | None = None
    fields: Mapping[str, object] = {}
    removed: tuple[str, ...] = ()


class Sidecar(NamedTuple):
    """One file to carry over.

    Attributes:
        name: Its relative name in the output.
        source: Its relative name in ``folder``.
        folder: Where it is read from.
        size: Bytes, at planning.
    """

    name: str
    source: str
    folder: Folder
    size: int


def plan_sidecars(original: Checkpoint, unlearned: Checkpoint) -> list[Sidecar]:
    """Choose the files, opening each once so that an unsafe one is refused now.

    Raises:
        UnsafeInputError: One is a link that leaves its checkpoint.
        CorruptInputError: One is not a regular file.
        OutputError: One may not be read.
    """
    chosen = {
        KEPT_CARD if name == CARD_NAME else name: (name, unlearned.folder)
        for name in unlearned.names
        if carried(name)
    }
    # An adapter lacks what its base has: its own files come first, then those of its folders.
    bases = [at for at in unlearned.folders.values() if at is not unlearned.folder]
    for folder in [*bases, *original.folders.values()]:
        directories = {parent for name in chosen for parent in _parents(name)}
        for name in folder.names():
            # What is a file in one and a directory in the other stays what it was.
            clashes = name in directories or not chosen.keys().isdisjoint(_parents(name))
            if carried(name) and name != CARD_NAME and not clashes:
                chosen.setdefault(name, (name, folder))
    sidecars = []
    for target, (name, folder) in sorted(chosen.items()):
        file = folder.open_file(name)
        sidecars.append(Sidecar(target, name, folder, file.stamp.size))
        file.close()
    return sidecars


def _parents(name: str) -> list[str]:
    """Return the directories on the way to a file, relative like its name."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def carried(name: str) -> bool:
    """Tell whether a file of a checkpoint belongs into the output."""
    return name not in (MANIFEST_NAME, KEPT_CARD) and not any(
        pattern.search(name) for pattern in (_WEIGHTS, _TRAINING, _RESULTS)
    )


def copy_sidecar(filesystem: FileSystem, sidecar: Sidecar, model: Path, edits: Edits) -> FileRecord:
    """Write one sidecar durably into ``model`` and return its size and hash.

    Args:
        filesystem: Where it is written.
        sidecar: The file.
        model: The directory of the output being built.
        edits: What changes in ``config.json``; where there is nothing, it is copied verbatim.
    """
    directories = [model / parent for parent in _parents(sidecar.name)]
    for directory in directories:
        filesystem.make_directory(directory)
    file = sidecar.folder.open_file(sidecar.source)
    try:
        pieces: Iterable[bytes] = (
            _read(file, start, min(_PIECE, file.stamp.size - start))
            for start in range(0, file.stamp.size, _PIECE)
        )
        if sidecar.name == "config.json" and any(edits):
            pieces = [edited(b"".join(pieces), edits)]
        record = _write(filesystem, model / sidecar.name, pieces)
    finally:
        file.close()
    for directory in directories:  # the model's own is synced when all of it is there
        filesystem.sync_directory(directory)
    return record


def edited(config: bytes, edits: Edits) -> bytes:
    """Return ``config.json`` with its dtype and some fields changed, and nothing else."""
    dtype = edits.dtype

    def change(value: dict[str, object]) -> dict[str, object]:
        changed = dict(value)
        for key, inner in value.items():
            if key in ("dtype", "torch_dtype") and isinstance(inner, str):
                changed[key] = dtype
            elif key.endswith("_config") and isinstance(inner, dict):  # text_config, …
                changed[key] = change(inner)
        return changed

    document = json.loads(config)
    changed = change(document) if dtype is not None else document
    if dtype is not None and not {"dtype", "torch_dtype"} & changed.keys():
        changed["dtype"] = dtype
    changed.update(edits.fields)
    for field in edits.removed:
        changed.pop(field, None)
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _read(file: InputFile, start: int, length: int) -> bytes:
    piece = bytearray(length)
    file.read_into(memoryview(piece), start)
    return bytes(piece)


def _write(filesystem: FileSystem, path: Path, pieces: Iterable[bytes]) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    output = filesystem.create(path)
    try:
        for piece in pieces:
            output.write_at(piece, size)
            digest.update(piece)
            size += len(piece)
        output.sync()
    finally:
        output.close()
    return FileRecord(size, digest.hexdigest())
