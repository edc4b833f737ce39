"""The working directory of a search whose best model is written.

It holds the log of trials, the models that are being tried, and ``study.json``, by which the
model that was written is known again. The model's own directory holds nothing of the search.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.errors import OutputError, UsageError
from uipe_merge.executors import make_executor
from uipe_merge.job import require_room, run_digest
from uipe_merge.output import place
from uipe_merge.output.filesystem import LocalFileSystem, write_document
from uipe_merge.output.manifest import MANIFEST_NAME, read_manifest
from uipe_merge.running import run
from uipe_merge.study import sampling
from uipe_merge.study.trials import LOG_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from uipe_merge.inputs import Inputs
    from uipe_merge.job import Job
    from uipe_merge.progress import Progress

STUDY_NAME = "study.json"
REFERENCE_NAME = "reference.json"
"""File of the truth ratios of the retain-only model, which is asked once."""
MODELS = "models"
"""The directory of models being evaluated; each is gone once it has been."""


def choose(work: str | None, planned: Job, inputs: Inputs) -> Path:
    """Return the working directory: of this search, or one that may become it.

    Raises:
        UsageError: It is not apart from the output and the inputs.
        OutputError: It holds something else, or cannot be made.
    """
    if planned.folder is not None:
        raise UsageError(
            "a search is made on this machine", file=planned.named, remedy="copy its model then"
        )
    named = work or f"{planned.output}.search"
    folders = [each.location for each in inputs.folders if isinstance(each, LocalFolder)]
    found = place.resolve(named, folders)
    if found == planned.output or found in planned.output.parents:
        raise UsageError("holds the output", file=named, remedy="choose another --work")
    if planned.output in found.parents:
        raise UsageError("lies in the output", file=named, remedy="choose another --work")
    if found.exists() and not (found / LOG_NAME).exists():
        known = {MODELS, STUDY_NAME, REFERENCE_NAME, sampling.STUDY_NAME}
        names = sorted(each.name for each in found.iterdir() if each.name.split(".")[0] != "lock")
        if strays := [name for name in names if name not in known]:
            raise OutputError(
                f"is of no search and holds '{strays[0]}'",
                file=named,
                remedy="choose another --work",
            )
    return found


def require_replaceable(planned: Job, workplace: Path) -> None:
    """Refuse an output that is in the way, but for the model that this search has written.

    Raises:
        OutputError: It is, or the disk has too little room.
        CorruptInputError: What is there has a damaged manifest.
    """
    digest = _digest(planned.output)
    if digest is None or digest != _written(workplace):
        require_room(planned)


def tidy(workplace: Path) -> None:
    """Remove what earlier runs have left that is of no use; the caller holds the lock.

    These are models that were being tried when a run was killed; and the log of a search in which
    no evaluation has succeeded, so that a command that was wrong can be put right.
    """
    models, log = workplace / MODELS, workplace / LOG_NAME
    for left in models.glob("uipe-search-*"):
        shutil.rmtree(left)
    if models.is_dir() and not any(models.iterdir()):
        models.rmdir()
    if log.exists() and not _succeeded(log):
        log.unlink()
        (workplace / sampling.STUDY_NAME).unlink(missing_ok=True)


def _succeeded(log: Path) -> bool:
    """Tell whether a log holds an evaluation that is worth keeping, or something else."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        head, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return "evaluator" not in head or any(row["problem"] is None for row in rows)
    except (ValueError, TypeError, KeyError):
        return True


def write_study(workplace: Path, study: dict[str, object]) -> None:
    """Write ``study.json`` in place of an older one."""
    _write(workplace, STUDY_NAME, study)


def kept_reference(workplace: Path, of: object) -> list[float] | None:
    """Return the truth ratios of a retain-only model that ``keep_reference`` has kept."""
    try:
        kept = json.loads((workplace / REFERENCE_NAME).read_text(encoding="utf-8"))
        return list(map(float, kept["truth_ratios"])) if kept["of"] == _as_read(of) else None
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        return None


def keep_reference(workplace: Path, of: object, truth_ratios: list[float]) -> None:
    """Keep the truth ratios of a retain-only model, with what tells it from others."""
    _write(workplace, REFERENCE_NAME, {"of": of, "truth_ratios": truth_ratios})


def _as_read(value: object) -> object:
    return json.loads(json.dumps(value))  # as it comes back: lists for tuples


def _write(workplace: Path, name: str, document: dict[str, object]) -> None:
    filesystem, draft = LocalFileSystem(), workplace / f".{name}.tmp"
    write_document(filesystem, draft, (json.dumps(document, indent=1) + "\n").encode())
    filesystem.rename(draft, workplace / name)
    filesystem.sync_directory(workplace)


def write_model(job: Job, threads: int | None, progress: Progress) -> list[str]:
    """Write a model as ``merge`` does, unless an earlier run did; return what to warn of.

    Raises:
        UipeMergeError: See ``running.run``.
    """
    ended = not place.partial_directory(job.output).exists()
    if ended and not job.overwrite and _digest(job.output) == run_digest(job):
        return []
    executor = make_executor(threads, remote=job.remote)
    return run(job, executor, LocalFileSystem(), progress).warnings


def _digest(output: Path) -> object:
    """Return the digest of the run that made what is at the output; ``None`` of no model."""
    if not (output / MANIFEST_NAME).is_file():
        return None
    manifest, _ = read_manifest(output)
    return manifest.get("run")


def _written(workplace: Path) -> object:
    """Return the digest of the run that the study says wrote its model."""
    try:
        study = json.loads((workplace / STUDY_NAME).read_text(encoding="utf-8"))
        return study["chosen"]["run"]
    except (OSError, ValueError, TypeError, KeyError):  # none was written, or it is damaged
        return None
