"""Grids: one directory with a model for every α, the checkpoints read once for all of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from uipe_merge.checkpoint.urls import is_url
from uipe_merge.errors import OutputError, UsageError
from uipe_merge.job import plan_job, require_room, run_digest
from uipe_merge.output.filesystem import write_document
from uipe_merge.output.manifest import MANIFEST_NAME, read_manifest
from uipe_merge.running import run_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from uipe_merge.executors import Executor
    from uipe_merge.inputs import Inputs
    from uipe_merge.job import Job
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Recipe
    from uipe_merge.report import MergeReport

GRID_NAME = "grid.json"
SCORES = "scores"
"""The directory in a grid for what evaluations write, one directory for each variant."""

Family = Literal["uipe", "control", "reference"]

_MOST = 1000
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")
_DECIMALS = 12  # of a step added up: 0.1 three times is 0.3


class Variant(NamedTuple):
    """One model of a grid.

    Attributes:
        name: Of its directory: letters, digits, points and hyphens, which no shell and no
            override of Hydra reads as anything else.
        family: ``uipe``, ``control`` for a random step, ``reference`` for α = 0 and −1.
        job: What makes it.
    """

    name: str
    family: Family
    job: Job

    @property
    def alpha(self) -> float:
        """α where no rule and no layer decides."""
        return self.job.plan.recipe.alpha


class Grid(NamedTuple):
    """A grid that was planned.

    Attributes:
        directory: Where it is, a real path.
        named: The same as the user named it.
        variants: Its models.
        inputs: What they are made of.
        command: The command line that makes it.
    """

    directory: Path
    named: str
    variants: list[Variant]
    inputs: Inputs
    command: str


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


def parse_alphas(text: str) -> list[float]:
    """Return the α of ``0,0.25,0.5`` or of ``0:4:0.5``, whose end is among them.

    Raises:
        UsageError: It is neither, or too many.
    """
    wrong = UsageError(
        f"'{text}' is no list of alphas", remedy="write it like 0,0.25,0.5,1,2 or 0:4:0.5"
    )
    match = _RANGE.fullmatch(text)
    try:
        if match is None:
            return [float(part) for part in text.split(",")]
        first, last, step = map(float, match.groups())
        count = math.floor((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    if not 0 < count <= _MOST:
        raise wrong
    return [round(first + step * number, _DECIMALS) for number in range(count)]


def plan_grid(
    inputs: Inputs,
    output: str | os.PathLike[str],
    alphas: Sequence[float],
    recipe: Recipe,
    *,
    references: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Grid:
    """Decide everything about every variant; write nothing.

    Args:
        inputs: The checkpoints that the recipe names, opened.
        output: The directory of the grid, made if it is not there.
        alphas: α of each variant, in place of the recipe's own; each counts once.
        recipe: All else. With a random control every α that is not 0 gives two variants.
        references: Add the unlearned model and the original as this tool writes them, and a
            random control at the largest |α|.
        overwrite: Replace variants of another recipe.
        device: As for ``merge``.

    Raises:
        UipeMergeError: Whatever would keep it from beginning, with its exit code.
    """
    named = os.fspath(output)
    if is_url(named):
        raise UsageError(
            "a grid is made in a directory of this machine", file=named, remedy="copy it then"
        )
    if not alphas:
        raise UsageError("no alphas", remedy="give them like --alphas 0,0.25,0.5,1,2")
    asked = sorted({float(alpha) + 0.0 for alpha in alphas})  # −0 is 0
    variants = [
        Variant(
            name,
            family,
            plan_job(
                inputs,
                Path(named) / name,
                chosen,
                overwrite=overwrite,
                device=device,
                parent_made=True,
            ),
        )
        for name, family, chosen in _recipes(asked, recipe, references=references)
    ]
    words = ["uipe-merge", "grid", *inputs.arguments, f"--alphas={','.join(map(repr, asked))}"]
    words += recipe.words(lambda name: inputs.names.get(name, name))[2:]  # all but its own α
    words += [*(["--with-references"] if references else []), "-o", named]
    return Grid(Path(os.path.realpath(named)), named, variants, inputs, shlex.join(words))


def _recipes(
    alphas: list[float], recipe: Recipe, *, references: bool
) -> list[tuple[str, Family, Recipe]]:
    """Name the variants and give each its recipe."""
    control = recipe.steering.control
    plain = replace(recipe, steering=replace(recipe.steering, control="none"))
    found: list[tuple[str, Family, Recipe]] = []
    if references:
        bare = replace(plain, rules=(), layers=(), gradient=(), steering=type(recipe.steering)())
        found.append(("reference-unlearned", "reference", replace(bare, alpha=0.0)))
        if recipe.form == "model":
            found.append(("reference-original", "reference", replace(bare, alpha=-1.0)))
    for alpha in alphas:
        if references and alpha in (0.0, -1.0) and plain.rest() == found[0][2].rest():
            continue  # it would be the reference over again
        found.append((f"uipe-{_written(alpha)}", "uipe", replace(plain, alpha=alpha)))
    moving = [alpha for alpha in alphas if alpha]
    if control == "none":
        moving = [max(moving, key=abs)] if references and moving and recipe.form == "model" else []
    if moving:
        drawn = replace(recipe, steering=replace(recipe.steering, control="random"))
        found += [
            (f"control-{_written(alpha)}", "control", replace(drawn, alpha=alpha))
            for alpha in moving
        ]
    return found


def _written(alpha: float) -> str:
    return repr(alpha).removesuffix(".0").replace("-", "minus", 1 if alpha < 0 else 0)


def run_grid(
    grid: Grid, executor: Executor, filesystem: FileSystem, progress: Progress
) -> GridReport:
    """Make the variants that are not there yet; the checkpoints are read once for all of them.

    Raises:
        UipeMergeError: As ``running.run``. What was published stays; the same call goes on.
    """
    filesystem.make_directory(grid.directory)
    made = {variant.name: _made(variant) for variant in grid.variants}
    todo = [variant for variant in grid.variants if made[variant.name] is None]
    _write_grid(filesystem, grid)
    reports = run_all([each.job for each in todo], executor, filesystem, progress) if todo else []
    _write_grid(filesystem, grid)
    seconds = max((report.seconds for report in reports), default=0.0)
    names = [variant.name for variant in todo]
    kept = {name: summary for name, summary in made.items() if summary is not None}
    return GridReport(dict(zip(names, reports, strict=True)), kept, seconds)


def require_grid_room(grid: Grid) -> None:
    """Refuse what ``run_grid`` would refuse before it writes anything.

    Raises:
        OutputError: Something is in a variant's place, or the disk has too little room.
    """
    require_room(*(variant.job for variant in grid.variants if _made(variant) is None))


def write_scripts(grid: Grid, filesystem: FileSystem, scripts: Mapping[str, str]) -> None:
    """Put scripts into the directory of a grid, in place of older ones."""
    for name, text in scripts.items():
        draft = grid.directory / f".{name}.tmp"
        write_document(filesystem, draft, text.encode("utf-8", "surrogateescape"))
        filesystem.rename(draft, grid.directory / name)


def _made(variant: Variant) -> dict[str, object] | None:
    """Return the summary of a variant that is there, if this very run made it.

    Raises:
        CorruptInputError: Its manifest is damaged.
        OutputError: It cannot be read.
    """
    if not (variant.job.output / MANIFEST_NAME).is_file():
        return None
    manifest, _ = read_manifest(variant.job.output)
    summary = manifest.get("summary")
    ours = manifest.get("run") == run_digest(variant.job)
    return summary if ours and isinstance(summary, dict) else None


def _write_grid(filesystem: FileSystem, grid: Grid) -> None:
    """Write ``grid.json``: which variants there are to be, and the digests of those that are."""
    variants = []
    for variant in grid.variants:
        manifest = variant.job.output / MANIFEST_NAME
        digest = None
        if manifest.is_file():
            digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        variants.append(
            {
                "name": variant.name,
                "path": variant.name,
                "alpha": variant.alpha,
                "family": variant.family,
                "command": variant.job.command,
                "manifest_sha256": digest,
            }
        )
    original, unlearned = grid.inputs.arguments
    document = {
        "schema": 1,
        "original": original,
        "unlearned": unlearned,
        "scores": SCORES,
        "command": grid.command,
        "variants": variants,
    }
    path = grid.directory / GRID_NAME
    draft = path.with_name(f".{GRID_NAME}.tmp")
    write_document(filesystem, draft, (json.dumps(document, indent=1) + "\n").encode())
    filesystem.rename(draft, path)
    filesystem.sync_directory(grid.directory)


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
