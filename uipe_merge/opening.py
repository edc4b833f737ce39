"""From the two arguments to two checkpoints, whatever they name.

An argument is a directory with a model, a directory with an adapter (which is applied to
ORIGINAL), or ``MODEL+ADAPTER``: a model and an adapter on it, for either side.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.adapter import is_adapter, open_adapter
from uipe_merge.checkpoint.model import Checkpoint, open_checkpoint
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.errors import IncompatibleModelsError
from uipe_merge.reader import Pair

if TYPE_CHECKING:
    from uipe_merge.checkpoint.header import KnownHeaders
    from uipe_merge.checkpoint.storage import Folder

PathLike = str | os.PathLike[str]


def locations(argument: PathLike) -> list[str]:
    """Return the directories that an argument names: one, or a model and its adapter."""
    text = os.fspath(argument)
    if Path(text).is_dir():  # a directory may have a plus in its name
        return [text]
    for plus in re.finditer(r"\+", text):
        model, adapter = text[: plus.start()], text[plus.end() :]
        if Path(model).is_dir() and adapter:
            return [model, adapter]
    return [text]


def open_folder(location: str) -> Folder:
    """Return the folder that one location names: a directory.

    Raises:
        UsageError: There is no such directory.
    """
    return LocalFolder(location)


def open_pair(
    original: PathLike,
    unlearned: PathLike,
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Pair:
    """Open both checkpoints, sharing what their headers have in common.

    Raises:
        UsageError: A directory does not exist.
        UipeMergeError: A checkpoint cannot be read, with its exit code.
    """
    known: KnownHeaders = {}
    allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
    first = _open(original, None, known, **allowed)
    second = _open(unlearned, first, known, **allowed)
    return Pair(first, second)


def _open(
    argument: PathLike,
    base: Checkpoint | None,
    known: KnownHeaders,
    *,
    allow_pickle: bool,
    dequantize: bool,
) -> Checkpoint:
    paths = locations(argument)
    folder = open_folder(paths[0])
    if len(paths) == 1 and is_adapter(folder.names()):
        if base is None:
            raise IncompatibleModelsError(
                "is a PEFT adapter, not a whole model",
                file=folder.location,
                remedy="name the model it was trained on, or MODEL+ADAPTER for both",
            )
        return open_adapter(folder, base, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(folder, known, allow_pickle=allow_pickle, dequantize=dequantize)
    if len(paths) == 1:
        return checkpoint
    return open_adapter(open_folder(paths[1]), checkpoint, allow_pickle=allow_pickle)
