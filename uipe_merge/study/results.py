"""The scores of one model, found below directories and put together from many files."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import CorruptInputError, UsageError
from uipe_merge.study import layouts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MOST_BYTES = 64_000_000
"""Of one file of scores. A log of every answer may be larger; its summary is what is read."""

DEEPEST = 12
"""Directories below the one that was named; harnesses make four."""

MOST_ENTRIES = 50_000
"""Names looked at below one directory: more means that the wrong one was named."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Numbers of one model.

    Attributes:
        values: Normalised metric name → number, which may be NaN or infinite.
        files: Where they come from.
        modified: When the oldest of these was written, in seconds since the epoch.
        manifest_sha256: Digest of the manifest of the model they are of, where a file says it.
        warnings: What the reader should know of the files, each named.
    """

    values: dict[str, float]
    files: list[Path]
    modified: float
    manifest_sha256: str | None = None
    warnings: list[str] = field(default_factory=list)


def find(directory: Path) -> list[Path]:
    """Return the files of scores below a directory, by name, in a fixed order.

    Links to directories are not followed: they may lead in a circle. A log is left out where
    its summary stands beside it.

    Raises:
        UsageError: There is more below it than results of evaluations ever are.
        OutputError: It cannot be read.
    """
    found = []
    for seen, path in enumerate(_walk(directory, DEEPEST)):
        if seen == MOST_ENTRIES:
            raise UsageError(
                f"has more than {MOST_ENTRIES} files below it",
                file=directory,
                remedy="name the directory that holds the scores",
            )
        if layouts.recognised(path.name) and not path.is_dir():
            found.append(path)
    held = set(found)
    return [
        path
        for path in found
        if not ((summary := layouts.summary_of(path.name)) and path.with_name(summary) in held)
    ]


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(directory.iterdir()) if directory.is_dir() else []
        kinds = [path.is_dir() for path in entries]
    except OSError as error:
        raise system_error(error, directory) from None
    for path, is_directory in zip(entries, kinds, strict=True):
        if not is_directory:
            yield path
        elif depth and not path.is_symlink():
            yield path  # to be counted
            yield from _walk(path, depth - 1)


def read_records(path: Path) -> tuple[list[layouts.Record], str, float]:
    """Return what one file holds (or why nothing), and when it was written.

    A harness told not to overwrite makes a new summary of its old log, and the scores are as
    old as that: the log's time counts where one stands beside the summary.

    Raises:
        CorruptInputError: It is not what its name promises, or too large.
        OutputError: It cannot be read.
    """
    raw, modified = read_bounded(path, MOST_BYTES)
    log = layouts.log_of(path.name)
    if log is not None:
        try:
            modified = min(modified, path.with_name(log).stat().st_mtime)
        except OSError:
            log = None  # no log beside it
    return *layouts.parse(raw, path), modified


def read_bounded(path: Path, limit: int) -> tuple[bytes, float]:
    """Return the content of a regular file of at most ``limit`` bytes, and its time.

    Raises:
        CorruptInputError: It is larger, or no regular file.
        OutputError: It cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a FIFO would never end
            raise CorruptInputError("is not a regular file", file=path)
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise system_error(error, path) from None
    if len(raw) > limit:
        raise CorruptInputError(
            f"is larger than the {limit} bytes such a file may have",
            file=path,
            remedy="keep its summary only",
        )
    return raw, status.st_mtime


def read_file(path: Path, name: str = "", family: str = "", alpha: float | None = None) -> Scores:
    """Return the scores in one file, of the variant that is named where it holds several.

    Raises:
        CorruptInputError: It is not what its name promises, or too large.
        OutputError: It cannot be read.
    """
    records, why, modified = read_records(path)
    mine = [record for record in records if record.about(name, family, alpha)]
    if not mine and len(records) == 1 and (records[0].anonymous or not name):
        mine = records
    warnings = []
    if not mine:
        what = "holds no row that says it is this variant's" if records else why
        warnings.append(f"{path}: {what}; it was left out")
    if len(mine) > 1:
        warnings.append(f"{path}: has {len(mine)} rows for {name}; the last one counts")
    values: dict[str, float] = {}
    for record in mine:
        values |= record.values
    digest = mine[-1].manifest_sha256 if mine else None
    return Scores(values, [path], modified, digest, warnings)


def read(directory: Path) -> Scores | None:
    """Return the scores of the one model that a directory is about, or ``None``.

    Raises:
        CorruptInputError: A file is not what its name promises, or too large.
        UsageError: There is more below it than results of evaluations ever are.
        OutputError: Something cannot be read.
    """
    return merge(settle([read_file(path) for path in find(directory)]))


def settle(parts: Iterable[Scores]) -> list[Scores]:
    """Leave every metric in the newest file that has it, and files that keep none out.

    A value that differs from one in an older file is reported with both. What remains is what
    staleness is judged by: an old file whose every number was measured again does no harm.
    """
    kept: list[Scores] = []
    source: dict[str, tuple[float, Path]] = {}
    warnings: list[str] = []
    # Of two files of the same time the later name counts, as dates are written.
    for part in sorted(parts, key=lambda part: (part.modified, part.files[0]), reverse=True):
        warnings += part.warnings
        mine = {}
        for metric, value in part.values.items():
            newer = source.setdefault(metric, (value, part.files[0]))
            if newer[1] == part.files[0]:
                mine[metric] = value
            elif not _same(newer[0], value):
                warnings.append(
                    f"{metric} is {value:.6g} in {part.files[0]} and {newer[0]:.6g} in "
                    f"{newer[1]}, which is newer and counts"
                )
        if mine:
            kept.append(replace(part, values=mine, warnings=[]))
    if kept:
        kept[0] = replace(kept[0], warnings=warnings)
    elif warnings:  # files, but no scores: what is wrong with them must not be lost
        kept = [Scores({}, [], math.inf, None, warnings)]
    return kept


def merge(parts: Iterable[Scores]) -> Scores | None:
    """Return the settled scores of several files as one, or ``None`` where there are none."""
    held = list(parts)
    values: dict[str, float] = {}
    for part in held:
        values |= part.values
    if not held:
        return None
    return Scores(
        dict(sorted(values.items())),
        sorted({file for part in held for file in part.files}),
        min(part.modified for part in held),
        next((part.manifest_sha256 for part in held if part.manifest_sha256), None),
        [warning for part in held for warning in part.warnings],
    )


def staleness(parts: Iterable[Scores], digest: str | None, written: float) -> str | None:
    """Return why settled scores are not those of the model as it is now, or ``None``.

    Args:
        parts: The scores by file.
        digest: SHA-256 of the model's manifest, if it is known.
        written: When the manifest was written. Where a file of scores names a digest, that
            says more than times, which a copy changes.
    """
    for part in parts:
        if part.manifest_sha256 is not None and digest is not None:
            if part.manifest_sha256 != digest:
                return f"{part.files[0]} is of another model; evaluate this one"
        elif part.modified < written:
            return f"{part.files[0]} is older than the model; evaluate again"
    return None


def _same(first: float, second: float) -> bool:
    both_nan = math.isnan(first) and math.isnan(second)
    # Harnesses sum in different orders.
    return both_nan or math.isclose(first, second, rel_tol=1e-9)
