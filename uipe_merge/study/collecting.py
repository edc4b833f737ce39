"""A grid of models and the scores that were measured of them, as one table."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import CorruptInputError, UipeMergeError, UsageError, listed
from uipe_merge.output.manifest import MANIFEST_NAME, parse_manifest
from uipe_merge.study import layouts, results
from uipe_merge.study.constraints import Row
from uipe_merge.study.gridfile import FAMILIES, GRID_NAME, SCHEMA, Variant, read_grid

if TYPE_CHECKING:
    import os

    from uipe_merge.study.results import Scores

RETAIN = "retain"
"""Directory of scores of the retain-only model, which no step of the update leads to."""

_MOST_MANIFEST = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Study:
    """A grid with its scores.

    Attributes:
        grid: Its directory.
        original: The original model, as it was named.
        unlearned: The unlearned one.
        command: What made the grid.
        rows: The models, by family and α.
        warnings: What the reader should know of the files of scores.
    """

    grid: Path
    original: str
    unlearned: str
    command: str
    rows: list[Row]
    warnings: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """The names of all scores, sorted."""
        return sorted({metric for row in self.rows for metric in row.scores})

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON, which has no NaN: ``None`` stands for it."""
        return {
            "schema": SCHEMA,
            "grid": str(self.grid),
            "original": self.original,
            "unlearned": self.unlearned,
            "command": self.command,
            "variants": [
                {
                    **row._asdict(),
                    "scores": {
                        metric: value if math.isfinite(value) else None
                        for metric, value in row.scores.items()
                    },
                }
                for row in self.rows
            ],
            "warnings": self.warnings,
        }


def collect(
    grid_dir: str | os.PathLike[str], scores_dir: str | os.PathLike[str] | None = None
) -> Study:
    """Read a grid and the scores of its models.

    Scores are looked for in ``scores/NAME`` of the grid (or below ``scores_dir``), in tables
    (CSV by variant or α) beside these directories, and in ``evals`` inside each model. What is
    missing or damaged of one model is its row's ``problem``: the others can be compared.

    Raises:
        UsageError: There is no such directory, or it is no grid.
        CorruptInputError: ``grid.json`` or a table of several models is damaged.
        OutputError: Something cannot be read.
    """
    grid = Path(grid_dir)
    document, variants = read_grid(grid)
    folder = grid / "scores" if scores_dir is None else Path(scores_dir)
    if scores_dir is not None and not folder.is_dir():
        raise UsageError("no such directory", file=folder, remedy="name the directory of scores")
    if all(variant.name != RETAIN for variant in variants):
        variants.append(Variant(RETAIN, None, None, "reference", None))
    tables, warnings = _tables(folder, variants)
    if scores_dir is None:  # a directory of one's own may hold anything
        warnings += _strangers(folder, {variant.name for variant in variants})
    rows = []
    for variant in variants:
        row, said = _row(grid, folder, variant, tables.get(variant.name, []))
        warnings += said
        if variant.alpha is not None or row.scores or said:
            rows.append(row)
    texts = [str(document.get(name) or "") for name in ("original", "unlearned", "command")]
    return Study(grid, texts[0], texts[1], texts[2], sorted(rows, key=_order), warnings)


def _order(row: Row) -> tuple[int, str, float, str]:
    place = FAMILIES.index(row.family) if row.family in FAMILIES else len(FAMILIES)
    return place, row.family, math.inf if row.alpha is None else row.alpha, row.name


def _tables(folder: Path, variants: list[Variant]) -> tuple[dict[str, list[Scores]], list[str]]:
    """Return the scores in tables of several models, by name of the variant."""
    found: dict[str, list[Scores]] = {}
    warnings = []
    paths = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    for path in paths:
        records, why, _ = results.read_records(path)
        lost = [
            record
            for record in records
            if not any(record.about(each.name, each.family, each.alpha) for each in variants)
        ]
        if not records:
            warnings.append(f"{path}: {why}; it was left out")
        elif lost:
            names = [_whose(record) for record in lost]
            warnings.append(f"{path}: rows of no variant of the grid: {listed(names)}")
        for variant in variants:
            who = (variant.name, variant.family, variant.alpha)
            if any(record.about(*who) for record in records):
                found.setdefault(variant.name, []).append(results.read_file(path, *who))
    return found, warnings


def _whose(record: layouts.Record) -> str:
    if record.anonymous:
        return "one without a variant or an α"
    return record.variant or f"α = {record.alpha:g}"


def _strangers(folder: Path, names: set[str]) -> list[str]:
    """Return a warning of scores that no variant will be given."""
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        lost = [
            path.name
            for path in entries
            if (path.is_dir() and path.name not in names)
            or (path.suffix != ".csv" and layouts.recognised(path.name) and not path.is_dir())
        ]
    except OSError as error:
        raise system_error(error, folder) from None
    if not lost:
        return []
    remedy = "scores belong in a directory with the variant's name"
    return [f"{folder}: of no variant of the grid: {listed(lost)}; {remedy}"]


def _row(grid: Path, folder: Path, variant: Variant, tables: list[Scores]) -> tuple[Row, list[str]]:
    who = (variant.name, variant.family, variant.alpha)
    problem: str | None = None
    digest, written, effective = variant.manifest_sha256, -math.inf, None
    places = [folder / variant.name]
    if variant.path is not None:
        model = grid / variant.path
        places.append(model / "evals")
        try:
            digest, written, effective = _manifest(model, variant.manifest_sha256)
        except UipeMergeError as error:
            problem = str(error)
    parts = list(tables)
    for place in places:
        found, broken = _parts(place, who)
        parts += found
        problem = problem or broken
    settled = results.settle(parts)
    scores = results.merge(settled)
    values = scores.values if scores else {}
    warnings = scores.warnings if scores else []
    if not values and problem is None:
        problem = f"{folder / variant.name}: no scores"
    stale = None if problem is not None else results.staleness(settled, digest, written)
    row = Row(variant.name, variant.family, variant.alpha, values, stale, problem, effective)
    return row, warnings


def _parts(place: Path, who: tuple[str, str, float | None]) -> tuple[list[Scores], str | None]:
    """Return the files of scores below a directory, and what is wrong with the first broken one.

    A harness that was killed leaves half a file, and the scores of the other variants as good
    as they were.
    """
    parts = []
    problem = None
    try:
        paths = results.find(place)
    except UipeMergeError as error:
        return [], str(error)
    for path in paths:
        try:
            parts.append(results.read_file(path, *who))
        except UipeMergeError as error:
            problem = problem or str(error)
    return parts, problem


def _manifest(model: Path, expected: str | None) -> tuple[str, float, float | None]:
    """Return digest and time of a model's manifest, and the effective α it tells."""
    path = model / MANIFEST_NAME
    try:
        what = None if path.exists() else f"has no {MANIFEST_NAME}: it was not finished"
        if not model.is_dir():
            what = "no such directory"
    except OSError as error:
        raise system_error(error, model) from None
    if what is not None:
        raise UsageError(what, file=model, remedy="run the grid again")
    raw, written = results.read_bounded(path, _MOST_MANIFEST)
    digest = hashlib.sha256(raw).hexdigest()
    if expected is not None and digest != expected:
        raise CorruptInputError(
            f"is not the manifest that {GRID_NAME} names",
            file=path,
            remedy="run the grid again",
        )
    document, _ = parse_manifest(raw, path)
    summary = document.get("summary")
    effective = summary.get("effective_alpha") if isinstance(summary, dict) else None
    real = isinstance(effective, int | float) and not isinstance(effective, bool)
    return digest, written, float(effective) if real else None  # type: ignore[arg-type]
