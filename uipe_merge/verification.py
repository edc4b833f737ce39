"""A published model held against its manifest, and the manifest against the inputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uipe_merge.drawing import Deep
from uipe_merge.progress import watcher

if TYPE_CHECKING:
    from uipe_merge.progress import Progress
    from uipe_merge.recomputing import Recomputed


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found.

    Attributes:
        files: Files that were hashed.
        bytes: Their bytes.
        problems: One line for each difference from the manifest; empty if all is well.
        notes: Files the manifest does not know and that do not change the model.
        recomputed: What was computed again from the inputs; its problems are among those above.
    """

    files: int
    bytes: int
    problems: list[str]
    notes: list[str]
    recomputed: Recomputed | None = None


def verify(
    output: str | os.PathLike[str], *, deep: bool | Deep = False, progress: bool | Progress = True
) -> Verification:
    """Hash every file of a published model again and hold it against its manifest.

    Args:
        output: Directory or URL of the model.
        deep: Compute blocks of it again from the inputs, too, and compare bit for bit: a tenth
            of them, or what a ``Deep`` says. What the manifest names as inputs is read.
        progress: As for ``merge``.

    Raises:
        UsageError: There is no such directory, or it has no manifest; or an input of it is gone.
        CorruptInputError: The manifest itself is damaged, or of other numeric code.
        IncompatibleModelsError: An input is not what the model was made from.
        OutputError: A file cannot be read.
        RemoteError: The store refuses or cannot be reached.
    """
    from uipe_merge.checkpoint.urls import is_url, local
    from uipe_merge.output import published
    from uipe_merge.output.manifest import MANIFEST_NAME
    from uipe_merge.output.sidecars import carried

    location = local(os.fspath(output))
    model: published.Published
    model = (published.InBucket if is_url(location) else published.InDirectory)(location)
    watching = watcher(progress)
    problems: list[str] = []
    recomputed: Recomputed | None = None
    try:
        manifest, files = model.manifest()
        watching.start(sum(record.size for record in files.values()))
        for name, record in files.items():
            found = model.hash(name)
            if found is None:
                problems.append(f"'{name}' is missing")
            elif found[0] != record.size:
                problems.append(f"'{name}' has {found[0]} bytes, not {record.size}")
            elif found[1] != record.sha256:
                problems.append(f"'{name}' has the right size and other bytes")
            watching.advance(record.size, name)
        if deep:
            from uipe_merge.recomputing import recompute  # imports what a merge does

            asked = Deep() if deep is True else deep
            recomputed = recompute(manifest, model, asked, watching)
            problems += recomputed.problems
    finally:
        watching.close()
    unknown = sorted(set(model.names()) - files.keys() - {MANIFEST_NAME})
    problems += [f"'{name}' was not written by the merge" for name in unknown if not carried(name)]
    notes = [f"'{name}' is not in the manifest" for name in unknown if carried(name)]
    nbytes = sum(record.size for record in files.values())
    return Verification(len(files), nbytes, problems, notes, recomputed)
