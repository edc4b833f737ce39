"""A planned grid, made: what is there already, ``grid.json``, the scripts beside the models."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import CorruptInputError, OutputError
from uipe_merge.executors import affordable_outputs
from uipe_merge.job import identity, require_room, run_digest
from uipe_merge.output.filesystem import LocalFileSystem, write_document
from uipe_merge.output.lock import hold, nothing_left, tidy
from uipe_merge.output.manifest import MANIFEST_NAME, is_whole, read_manifest
from uipe_merge.output.place import partial_directory
from uipe_merge.running import run_all

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from uipe_merge.executors import Executor
    from uipe_merge.grids import Grid, Variant
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.progress import Progress
    from uipe_merge.report import MergeReport

GRID_NAME = "grid.json"
SCORES = "scores"
"""The directory in a grid for what evaluations write, one directory for each variant."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


class GridReport(NamedTuple):
    """What a run did.

    Attributes:
        reports: By variant, of those that were made now.
        kept: The summary in the manifest of every variant that an earlier run had made.
        seconds: Wall time.
    """

    reports: dict[str, MergeReport]
    kept: dict[str, dict[str, object]]
    seconds: float


def run_grid(
    grid: Grid, executor: Executor, filesystem: FileSystem, progress: Progress
) -> GridReport:
    """Make the variants that are not there yet; the checkpoints are read once for all of them.

    Raises:
        UipeMergeError: As ``running.run``. What was published stays; the same call goes on.
    """
    filesystem.make_directory(grid.directory)
    with hold(grid.directory / ".uipe-grid"):
        made = {variant.name: _made(variant) for variant in grid.variants}
        for variant in grid.variants:
            if made[variant.name] is not None:
                tidy(partial_directory(variant.job.output))
        todo = [variant for variant in grid.variants if made[variant.name] is None]
        require_grid_room(grid)  # before the document says what there will be
        _write_grid(filesystem, grid)
        jobs = [variant.job for variant in todo]
        reports = run_all(jobs, executor, filesystem, progress) if jobs else []
        _write_grid(filesystem, grid)
    seconds = max((report.seconds for report in reports), default=0.0)
    names = [variant.name for variant in todo]
    kept = {name: summary for name, summary in made.items() if summary is not None}
    return GridReport(dict(zip(names, reports, strict=True)), kept, seconds)


def require_grid_room(grid: Grid) -> None:
    """Refuse what ``run_grid`` would refuse before it writes anything.

    Raises:
        OutputError: Something is in a variant's place, an interrupted run of another command is
            there, or the disk has too little room; or so many models cannot be open at once.
    """
    jobs = [variant.job for variant in grid.variants if _made(variant) is None]
    if len(jobs) > affordable_outputs():
        raise OutputError(
            f"{len(jobs)} models cannot be written at once, for want of open files",
            file=grid.named,
            remedy=f"raise `ulimit -n`, or make {affordable_outputs()} at a time",
        )
    require_room(*jobs)
    for job in jobs:
        staging = job.staging(LocalFileSystem())
        if not job.overwrite and staging.partial.exists():
            staging.require_own(identity(job))


def write_scripts(grid: Grid, filesystem: FileSystem, scripts: Mapping[str, str]) -> None:
    """Put scripts into the directory of a grid, in place of older ones."""
    for name, text in scripts.items():
        draft = grid.directory / f".{name}.tmp"
        write_document(filesystem, draft, text.encode("utf-8", "surrogateescape"))
        filesystem.rename(draft, grid.directory / name)


def _made(variant: Variant) -> dict[str, object] | None:
    """Return the summary of a variant that this very run made, whole and cleaned up after.

    Raises:
        CorruptInputError: Its manifest is damaged, and it may not be replaced.
        OutputError: It cannot be read.
    """
    job, output = variant.job, variant.job.output
    if not (output / MANIFEST_NAME).is_file() or not nothing_left(partial_directory(output)):
        return None
    try:
        manifest, files = read_manifest(output)
    except CorruptInputError:
        if job.overwrite:
            return None
        raise
    summary = manifest.get("summary")
    ours = manifest.get("run") == run_digest(job) and is_whole(output, files)
    return summary if ours and isinstance(summary, dict) else None


def _write_grid(filesystem: FileSystem, grid: Grid) -> None:
    """Write ``grid.json``: which variants there are to be, and the digests of those that are.

    Variants that an earlier command made, and that are still there, stay in it.
    """
    own = [
        {
            "name": variant.name,
            "path": variant.name,
            "alpha": variant.alpha,
            "family": variant.family,
            "command": variant.job.command,
            "manifest_sha256": _digest(variant.job.output),
        }
        for variant in grid.variants
    ]
    names = {variant.name for variant in grid.variants}
    earlier = [entry for entry in _entries(grid) if entry["name"] not in names]
    original, unlearned = grid.inputs.arguments
    document = {
        "schema": 1,
        "original": original,
        "unlearned": unlearned,
        "scores": SCORES,
        "command": grid.command,
        "variants": [*earlier, *own],
    }
    path = grid.directory / GRID_NAME
    draft = path.with_name(f".{GRID_NAME}.tmp")
    write_document(filesystem, draft, (json.dumps(document, indent=1) + "\n").encode())
    filesystem.rename(draft, path)
    filesystem.sync_directory(grid.directory)


def _digest(model: Path) -> str | None:
    manifest = model / MANIFEST_NAME
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def _entries(grid: Grid) -> list[dict[str, object]]:
    """Return the variants in the document that is there whose models are there as it says."""
    try:
        document = json.loads((grid.directory / GRID_NAME).read_bytes())
        found = [entry for entry in document["variants"] if isinstance(entry["name"], str)]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or nothing of ours
        return []
    safe = [entry for entry in found if _NAME.fullmatch(entry["name"])]
    return [
        entry
        for entry in safe
        if entry.get("manifest_sha256") == _digest(grid.directory / entry["name"]) is not None
    ]


def require_grid_place(grid: Grid) -> None:
    """Refuse a directory that holds something else than a grid.

    Raises:
        OutputError: It does.
    """
    if not grid.directory.is_dir() or (grid.directory / GRID_NAME).is_file():
        return
    names = {variant.name for variant in grid.variants} | {SCORES}
    strays = [
        entry.name
        for entry in sorted(grid.directory.iterdir())
        if entry.name not in names and not entry.name.startswith(".")
    ]
    if strays:
        raise OutputError(
            f"is no grid and holds '{strays[0]}'",
            file=grid.named,
            remedy="choose another directory",
        )
