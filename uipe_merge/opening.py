"""From the two arguments to two checkpoints, whatever they name.

An argument is a model, an adapter (which is applied to ORIGINAL), or ``MODEL+ADAPTER``: a
model and an adapter on it, for either side. Each is a directory, the URL of a folder in an
object store, or where there is no directory of that name the id of a repository on a hub:
``ORG/NAME`` or ``ORG/NAME@REVISION``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.arithmetic.terms import Term, Vector
from uipe_merge.checkpoint.adapter import is_adapter, open_adapter
from uipe_merge.checkpoint.hub import HubFolder, parse_id
from uipe_merge.checkpoint.model import Checkpoint, open_checkpoint
from uipe_merge.checkpoint.pair import CONFIG, match
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.checkpoint.urls import RemoteFolder, is_url, local
from uipe_merge.errors import IncompatibleModelsError, UsageError, listed
from uipe_merge.plan import Directions
from uipe_merge.planning import Further
from uipe_merge.reader import Pair
from uipe_merge.steering import ORIGINAL_ITSELF

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.header import KnownHeaders, TensorSpec
    from uipe_merge.checkpoint.hub import HubId
    from uipe_merge.checkpoint.pair import Pairing
    from uipe_merge.checkpoint.storage import Folder
    from uipe_merge.steering import Steering, Update

PathLike = str | os.PathLike[str]


def locations(argument: PathLike) -> list[str]:
    """Return the directories or ids that an argument names: one, or a model and its adapter."""
    text = os.fspath(argument)
    pluses = list(re.finditer(r"\+", text))
    if not pluses or _holds_files(text):  # a directory may have a plus in its name
        return [text]
    for plus in pluses:
        model, adapter = text[: plus.start()], text[plus.end() :]
        if adapter and (_holds_files(model) or _hub_id(model)):
            return [model, adapter]
    return [text]


def _holds_files(location: str) -> bool:
    """Tell whether a location is a directory, or the URL of something."""
    if is_url(location):
        return bool(RemoteFolder(location).names())
    return Path(local(location)).is_dir()


def is_there(argument: PathLike) -> bool:
    """Tell whether an argument names directories of this machine, or what is asked for elsewhere.

    A name without a revision may be a hub's or a directory's that is gone: that is not there.
    """
    return all(
        is_url(part) or "@" in part or Path(local(part)).is_dir() for part in locations(argument)
    )


def is_remote(argument: PathLike) -> bool:
    """Tell whether an argument names something that is read over a network."""
    return any(is_url(part) for part in re.split(r"\+(?=\w+://)", os.fspath(argument)))


def open_folder(location: str) -> Folder:
    """Return the folder that one location names: a directory, a URL, or a repository on a hub.

    Raises:
        UsageError: There is no such directory, or nothing under the URL.
        RemoteError: The store or the hub refuses or cannot be reached.
    """
    if is_url(location):
        folder = RemoteFolder(location)
        if not folder.names():
            raise UsageError(
                "holds nothing, or does not exist",
                file=folder.location,
                remedy="name the folder that holds the checkpoint",
            )
        return folder
    named = _hub_id(location)
    return LocalFolder(local(location)) if named is None else HubFolder(named)


def open_folders(*arguments: PathLike) -> list[list[Folder]]:
    """Return the folders that each argument names.

    A location is opened once, so that a repository named in two of them is one commit.

    Raises:
        UsageError: There is no such directory.
        RemoteError: The hub does not give a repository.
    """
    opened: dict[str, Folder] = {}
    for location in (each for argument in arguments for each in locations(argument)):
        if location not in opened:
            opened[location] = open_folder(location)
    return [[opened[location] for location in locations(argument)] for argument in arguments]


def open_pair(
    original: list[Folder],
    unlearned: list[Folder],
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Pair:
    """Open both checkpoints, sharing what their headers have in common.

    Args:
        original: The folders of the first argument, from ``open_folders``.
        unlearned: Those of the second.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file.
        dequantize: Read block-scaled FP8.

    Raises:
        UipeMergeError: A checkpoint cannot be read, with its exit code.
    """
    known: KnownHeaders = {}
    allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
    first = _open(original, None, known, **allowed)
    second = _open(unlearned, first, known, **allowed)
    return Pair(first, second)


def open_further(
    steering: Steering,
    folders: Mapping[str, list[Folder]],
    pair: Pair,
    named: tuple[list[Folder], list[Folder]],
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> tuple[Pair, Directions]:
    """Open the checkpoints of further updates, each once however often it is named.

    An adapter that is named alone is applied to ORIGINAL.

    Args:
        steering: The updates.
        folders: What ``open_folders`` gave for each of their checkpoints.
        pair: The two checkpoints.
        named: The folders of the two.
        allow_pickle: As for ``open_pair``.
        dequantize: As for ``open_pair``.

    Returns:
        The pair with the further ones, and the updates as differences of its sides.

    Raises:
        UipeMergeError: A checkpoint cannot be read, with its exit code.
    """
    base = _identity(named[0], ())
    sides = {base: 0}
    sides.setdefault(_identity(named[1], base), 1)
    further: list[Checkpoint] = []
    known: KnownHeaders = {}

    def side(name: str) -> int:
        key = _identity(folders[name], base)
        if key not in sides:
            allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
            further.append(_open(folders[name], pair.original, known, **allowed))
            sides[key] = 1 + len(further)
        return sides[key]

    def vector(update: Update) -> Vector:
        return Vector(side(update.new), side(update.old) if update.old else 0)

    away = None
    if steering.away_from is not None:
        itself = steering.away_from == ORIGINAL_ITSELF
        away = Vector(0, -1) if itself else vector(steering.away_from)
    directions = Directions(
        along=tuple(map(vector, steering.along)),
        away=away,
        add=tuple(Term(float(beta), *vector(update)) for update, beta in steering.add),
    )
    return pair._replace(further=tuple(further)), directions


def hold_further(pair: Pair, pairing: Pairing, directions: Directions) -> Further:
    """Hold every further checkpoint against the unlearned one.

    Raises:
        IncompatibleModelsError: One lacks a tensor that is extrapolated, or is another model;
            names all that is wrong with it.
    """
    specs: dict[int, dict[str, TensorSpec]] = {}
    warnings: list[str] = []
    for number, checkpoint in enumerate(pair.further, 2):
        found = match(checkpoint, pair.unlearned)
        names = [name for name, (_, spec) in pairing.pairs.items() if spec.dtype.computes]
        missing = names - found.pairs.keys()
        if missing or any(line.startswith(CONFIG) for line in found.mismatches):
            raise IncompatibleModelsError(
                f"does not match {pair.unlearned.location}: {listed(found.mismatches)}",
                file=checkpoint.location,
                remedy="an update needs every floating-point tensor of the two, stored alike",
            )
        specs[number] = {name: found.pairs[name][0] for name in names}
        warnings += [line for line in checkpoint.warnings if line not in warnings]
    shards = tuple(checkpoint.shards for checkpoint in pair.further)
    return Further(specs, shards, directions, warnings)


def _identity(folders: list[Folder], base: tuple[str, ...]) -> tuple[str, ...]:
    """Return what tells checkpoints apart, whatever they are called: their folders in a row."""
    own = tuple(
        os.path.realpath(folder.location) if isinstance(folder, LocalFolder) else folder.location
        for folder in folders
    )
    alone = len(folders) == 1 and is_adapter(folders[0].names())
    return (*base, *own) if alone else own


def _open(
    folders: list[Folder],
    base: Checkpoint | None,
    known: KnownHeaders,
    *,
    allow_pickle: bool,
    dequantize: bool,
) -> Checkpoint:
    folder, *adapters = folders
    if not adapters and is_adapter(folder.names()):
        if base is None:
            raise IncompatibleModelsError(
                "is a PEFT adapter, not a whole model",
                file=folder.location,
                remedy="name the model it was trained on, or MODEL+ADAPTER for both",
            )
        return open_adapter(folder, base, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(folder, known, allow_pickle=allow_pickle, dequantize=dequantize)
    for adapter in adapters:
        checkpoint = open_adapter(adapter, checkpoint, allow_pickle=allow_pickle)
    return checkpoint


def _hub_id(location: str) -> HubId | None:
    """Return the hub id that a location is, unless something of that name is here."""
    return None if os.path.lexists(location) else parse_id(location)
