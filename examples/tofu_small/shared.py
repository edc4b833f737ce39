"""What all scripts of this directory share, and what needs no model: settings and files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, Any]

METHODS = ("ga", "graddiff", "klmin", "npo")
SPLITS = ("forget", "retain", "real_authors", "world_facts")
SETTINGS = "settings.json"
ALPHAS = (0.0, 1.0, 2.0, 4.0)


def stop(message: str) -> NoReturn:
    """End the script with one line."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def read_records(path: Path) -> list[Record]:
    """Return the questions of a file of TOFU: a JSON list, or one JSON object a line."""
    if not path.is_file():
        stop(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        listed: list[Record] = json.loads(text)
        return listed
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def write_changed(path: Path, data: str | bytes) -> bool:
    """Write a file whole, unless it holds just that already; say whether it was written."""
    raw = data.encode() if isinstance(data, str) else data
    if path.is_file() and path.read_bytes() == raw:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(raw)
    partial.replace(path)
    return True


def longer(steps: int) -> dict[float, int]:
    """Return by α how many steps of unlearning go as far, if each goes as far as the others."""
    return {alpha: round(steps * (1 + alpha)) for alpha in ALPHAS if alpha}


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write down what a script was told; refuse to go on with something else."""
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != settings:
        stop(f"{path} tells of another run; name another directory, or delete what is there")
    write_changed(path, json.dumps(settings, indent=1) + "\n")


def settings_of(out: Path) -> dict[str, Any]:
    """Return what ``train.py`` was told when it made this directory."""
    if not (out / SETTINGS).is_file():
        stop(f"{out} has no {SETTINGS}; run train.py first")
    found: dict[str, Any] = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    return found
