"""``grid.json``: which models a grid has, read as a file that may be damaged."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import strict_json
from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import CorruptInputError, UsageError
from uipe_merge.study import results

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

GRID_NAME = "grid.json"
SCHEMA = 1
FAMILIES = ("reference", "uipe", "control")
"""In the order of a table: what the others are measured by comes first."""

_MOST_BYTES = 16_000_000
_LARGEST_ALPHA = 1e300
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Variant(NamedTuple):
    """One model of a grid, as ``grid.json`` has it.

    Attributes:
        name: What it is called, and its directory of scores.
        path: Its directory below the grid, ``None`` where the model is elsewhere.
        alpha: Its α; ``None`` for the retain-only model.
        family: One of ``FAMILIES``.
        manifest_sha256: Digest of its manifest, if it was written.
    """

    name: str
    path: str | None
    alpha: float | None
    family: str
    manifest_sha256: str | None


def read_grid(grid: Path) -> tuple[dict[str, object], list[Variant]]:
    """Return the whole document of a grid, and its variants.

    Raises:
        UsageError: There is no such directory, or it is no grid.
        CorruptInputError: ``grid.json`` is damaged, or names paths outside the grid.
        OutputError: It cannot be read.
    """
    path = grid / GRID_NAME
    try:
        if not path.exists():
            raise UsageError(
                f"has no {GRID_NAME}" if grid.is_dir() else "no such directory",
                file=grid,
                remedy="name a directory written by `uipe-merge grid`",
            )
    except OSError as error:
        raise system_error(error, path) from None
    raw, _ = results.read_bounded(path, _MOST_BYTES)
    try:
        document = strict_json.loads(raw, naturals_only=False, any_path=True)
    except strict_json.StrictJsonError as error:
        raise CorruptInputError(f"is not valid: {error}", file=path) from None
    entries = document.get("variants") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(entries, list):
        raise CorruptInputError("lists no variants", file=path)
    if document.get("schema") != SCHEMA:
        raise CorruptInputError(
            f"has schema {str(document.get('schema'))[:20]}, this version reads {SCHEMA}",
            file=path,
            remedy="use the version of uipe-merge that wrote it",
        )
    variants = [_variant(entry, place, path) for place, entry in enumerate(entries, 1)]
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CorruptInputError(f"names '{twice[0]}' twice", file=path)
    return document, variants


def _variant(entry: object, place: int, file: Path) -> Variant:
    held: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    name, path, family = held.get("name"), held.get("path"), held.get("family")
    alpha, digest = held.get("alpha"), held.get("manifest_sha256")
    real = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    retain = family == "reference" and alpha is None
    if (
        not (isinstance(name, str) and _is_safe(name) and "/" not in name)
        or not (path is None or (isinstance(path, str) and _is_safe(path)))
        or not (family in FAMILIES and isinstance(family, str))
        or not (retain or (real and abs(alpha) <= _LARGEST_ALPHA))  # type: ignore[arg-type]
        or not (digest is None or (isinstance(digest, str) and _DIGEST.fullmatch(digest)))
    ):
        raise CorruptInputError(f"has a damaged entry: variant {place}", file=file)
    return Variant(name, path, None if retain else float(alpha), family, digest)  # type: ignore[arg-type]


def _is_safe(path: str) -> bool:
    """Whether a path can be one, and stays below the directory it is joined to."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return "\0" not in path and all(part not in {"", ".", ".."} for part in path.split("/"))
