"""Where an output may go: checks that cost nothing and fail before anything is written."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import OutputError, UsageError
from uipe_merge.output.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

_MARGIN = 16_000_000  # directories, journal and the rounding of files to blocks


class Space(NamedTuple):
    """What a run needs of the disk, and what is there.

    Attributes:
        needed: Bytes that will be written.
        free: Bytes that may be written; ``None`` where the system does not say.
        files: Files that will be made.
        free_files: Files that may be made; ``None`` where the system does not say.
    """

    needed: int
    free: int | None
    files: int
    free_files: int | None


def resolve(
    output: str | os.PathLike[str], inputs: Iterable[str], *, parent_made: bool = False
) -> Path:
    """Return the real path of the output after checking that something may be made there.

    With ``parent_made`` a parent that is missing will be made, where that is possible.

    Raises:
        UsageError: It is, lies in, contains or links to an input.
        OutputError: Its parent is missing or not writable, or its name is too long.
    """
    path = Path(os.path.realpath(output))
    for name in inputs:
        _keep_apart(path, Path(os.path.realpath(name)), output, name)
    parent = path.parent
    if parent_made and not os.path.lexists(parent):
        parent = parent.parent
    try:
        if len(os.fsencode(path.name)) > os.pathconf(parent, "PC_NAME_MAX"):
            raise OutputError("the name is too long for its file system", file=output)
        if not parent.is_dir():
            raise OutputError("is not a directory", file=parent)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                "permission denied", file=parent, remedy="choose a directory you may write to"
            )
    except FileNotFoundError:
        raise OutputError("no such directory", file=parent, remedy="create it first") from None
    except OSError as error:
        raise system_error(error, output) from None
    return path


def partial_directory(output: Path) -> Path:
    """Return the sibling in which an output is built; its name always fits."""
    name = f".{output.name}.uipe-partial"
    if len(os.fsencode(name)) > os.pathconf(existing(output.parent), "PC_NAME_MAX"):
        import hashlib

        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()}.uipe-partial"
    return output.parent / name


def existing(directory: Path) -> Path:
    """Return the directory, or the nearest one above it that exists: where the disk is measured."""
    return next(each for each in (directory, *directory.parents) if each.is_dir())


def measure(parent: Path, needed: int, files: int) -> Space:
    """Ask the file system of ``parent`` what is free."""
    try:
        status = os.statvfs(parent)
    except OSError as error:
        raise system_error(error, parent) from None
    free_files = status.f_favail if status.f_files else None
    return Space(needed, status.f_bavail * status.f_frsize, files, free_files)


def require(space: Space, parent: Path, largest: int) -> None:
    """Refuse a run that cannot end well.

    Args:
        space: From ``measure``.
        parent: The directory that was measured.
        largest: Size of the largest file, in bytes.

    Raises:
        OutputError: Too few bytes or files are free, or files may not be that large.
    """
    if space.free is not None and space.needed + _MARGIN > space.free:
        raise OutputError(
            f"needs {space.needed + _MARGIN} bytes, {space.free} are free",
            file=parent,
            remedy="free some disk space or choose another output",
        )
    if space.free_files is not None and space.files > space.free_files:
        raise OutputError(
            f"needs {space.files} files, {space.free_files} can be made",
            file=parent,
            remedy="remove files or choose another output",
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and largest > limit:
        raise OutputError(
            f"a shard has {largest} bytes, files are limited to {limit}",
            file=parent,
            remedy="raise `ulimit -f` or lower --max-shard-size",
        )


def require_replaceable(path: Path, output: object, *, overwrite: bool) -> None:
    """Refuse an output path that holds something which may not be replaced.

    Raises:
        OutputError: It is a file, a mount point, or a directory that is not empty, unless
            this tool wrote it and ``overwrite`` is true.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError("exists and is not a directory", file=output)
    if os.path.ismount(path):
        raise OutputError(
            "is a mount point and cannot be replaced",
            file=output,
            remedy="name a directory inside it",
        )
    try:
        empty, own = not any(path.iterdir()), (path / MANIFEST_NAME).is_file()
    except OSError as error:
        raise system_error(error, output) from None
    if empty:
        return
    if not overwrite:
        raise OutputError(
            "exists and is not empty",
            file=output,
            remedy="choose another output, or --overwrite a model written by this tool",
        )
    if not own:
        raise OutputError(
            f"has no {MANIFEST_NAME}, so it was not written by this tool and is not replaced",
            file=output,
            remedy="remove it yourself or choose another output",
        )


def _keep_apart(path: Path, source: Path, output: object, name: str) -> None:
    if _same(path, source):
        raise UsageError("is an input", file=output, remedy="choose another output")
    if any(_same(parent, source) for parent in path.parents):
        raise UsageError(f"lies in the input {name}", file=output, remedy="choose another output")
    if any(_same(parent, path) for parent in source.parents):
        raise UsageError(f"contains the input {name}", file=output, remedy="choose another output")


def _same(one: Path, two: Path) -> bool:
    """Tell whether two real paths are one directory, which a bind mount can give two names."""
    try:
        return one == two or one.samefile(two)
    except OSError:  # one of them is missing, or cannot be looked at
        return False
