"""From the two arguments to two checkpoints, whatever they name.

An argument is a directory with a model, a directory with an adapter (which is applied to
ORIGINAL), or ``MODEL+ADAPTER``: a model and an adapter on it, for either side. Each of them may
be the URL of a folder in an object store instead.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.adapter import is_adapter, open_adapter
from uipe_merge.checkpoint.model import Checkpoint, open_checkpoint
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.checkpoint.urls import RemoteFolder, is_url, local
from uipe_merge.errors import IncompatibleModelsError, UsageError
from uipe_merge.reader import Pair

if TYPE_CHECKING:
    from uipe_merge.checkpoint.header import KnownHeaders
    from uipe_merge.checkpoint.storage import Folder

PathLike = str | os.PathLike[str]


def locations(argument: PathLike) -> list[str]:
    """Return the directories that an argument names: one, or a model and its adapter."""
    text = os.fspath(argument)
    pluses = list(re.finditer(r"\+", text))
    if not pluses or _holds_files(text):  # a directory may have a plus in its name
        return [text]
    for plus in pluses:
        model, adapter = text[: plus.start()], text[plus.end() :]
        if adapter and _holds_files(model):
            return [model, adapter]
    return [text]


def _holds_files(location: str) -> bool:
    """Tell whether a location is a directory, or the URL of something."""
    if is_url(location):
        return bool(RemoteFolder(location).names())
    return Path(local(location)).is_dir()


def is_remote(argument: PathLike) -> bool:
    """Tell whether an argument names something that is read over a network."""
    return any(is_url(part) for part in re.split(r"\+(?=\w+://)", os.fspath(argument)))


def open_folder(location: str) -> Folder:
    """Return the folder that one location names: a directory, or a URL.

    Raises:
        UsageError: There is no such directory, or nothing under the URL.
        RemoteError: The store refuses or cannot be reached.
    """
    if not is_url(location):
        return LocalFolder(local(location))
    folder = RemoteFolder(location)
    if not folder.names():
        raise UsageError(
            "holds nothing, or does not exist",
            file=folder.location,
            remedy="name the folder that holds the checkpoint",
        )
    return folder


def open_pair(original: PathLike, unlearned: PathLike, *, allow_pickle: bool = False) -> Pair:
    """Open both checkpoints, sharing what their headers have in common.

    Raises:
        UsageError: A directory does not exist.
        UipeMergeError: A checkpoint cannot be read, with its exit code.
    """
    known: KnownHeaders = {}
    first = _open(original, None, known, allow_pickle=allow_pickle)
    second = _open(unlearned, first, known, allow_pickle=allow_pickle)
    return Pair(first, second)


def _open(
    argument: PathLike, base: Checkpoint | None, known: KnownHeaders, *, allow_pickle: bool
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
    checkpoint = open_checkpoint(folder, known, allow_pickle=allow_pickle)
    if len(paths) == 1:
        return checkpoint
    return open_adapter(open_folder(paths[1]), checkpoint, allow_pickle=allow_pickle)
