"""The retain-only model that forget quality compares with: its truth ratios, or itself."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.output.sidecars import Sidecar
    from uipe_merge.progress import Progress
    from uipe_merge.study.examination import Examination
    from uipe_merge.study.metrics import Floats

ReferenceLike = str | os.PathLike[str] | Sequence[float]
"""A directory of a retain-only model, or its truth ratios."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A retain-only model.

    Attributes:
        name: The file or the model, as the user named it.
        known: Its truth ratios, shape (m,), where they are known already.
    """

    name: str | None
    known: Floats | None = None

    @property
    def identity(self) -> object:
        """What tells it from others: its truth ratios, or the files of the model.

        Raises:
            UipeMergeError: It is no model that can be read.
        """
        if self.known is not None:
            return hashlib.sha256(self.known.astype("<f8").tobytes()).hexdigest()
        from uipe_merge.checkpoint.model import open_checkpoint
        from uipe_merge.checkpoint.storage import LocalFolder
        from uipe_merge.output.sidecars import plan_sidecars

        checkpoint = open_checkpoint(LocalFolder(self.name or ""))
        return [checkpoint.shards, stamps(plan_sidecars(checkpoint, checkpoint))]

    def truth_ratios(self, asked: Examination, progress: Progress) -> Floats:
        """Return its truth ratios on the forget questions; a model is loaded, asked, and gone.

        Raises:
            UsageError: They are not finite.
            UipeMergeError: The model cannot be loaded or asked.
        """
        if self.known is not None:
            return self.known
        from uipe_merge.study import evaluate, models

        model, tokenizer = models.load(self.name or "")
        with models.quiet():
            ratios = evaluate.reference_truth_ratios(
                model,
                tokenizer,
                asked.forget,
                batch_size=asked.batch_size,
                device=asked.device,
                template=asked.template,
                progress=progress,
            )
        if not all(map(math.isfinite, ratios)):
            raise UsageError(
                "its truth ratios are not finite, so nothing can be compared with it",
                file=self.name,
                remedy="name a model that works",
            )
        return ratios


def make_reference(
    reference: ReferenceLike | None, logs: str | os.PathLike[str] | None
) -> Reference | None:
    """Return the retain-only model of a directory, of numbers, or of a log; None without one.

    Raises:
        UsageError: Both were given, there is no such log, or a number is none.
        CorruptInputError: The log holds no truth ratios.
        OutputError: It cannot be read.
    """
    if reference is not None and logs is not None:
        raise UsageError(
            "a reference and the logs of one exclude each other", remedy="give one of them"
        )
    if logs is not None:
        from uipe_merge.study.tofu_logs import read_truth_ratios

        return Reference(os.fspath(logs), read_truth_ratios(logs))
    if reference is None:
        return None
    if isinstance(reference, str | os.PathLike):
        return Reference(os.fspath(reference))
    ratios = np.asarray(reference, dtype=np.float64)
    if ratios.ndim != 1 or not ratios.size or not np.isfinite(ratios).all():
        raise UsageError("the reference is no list of finite truth ratios")
    return Reference(None, ratios)


def stamps(sidecars: Iterable[Sidecar]) -> list[tuple[str, object]]:
    """Return what tells files beside the weights from changed ones: size, and time or tag."""
    found: list[tuple[str, object]] = []
    for sidecar in sidecars:
        file = sidecar.folder.open_file(sidecar.source)
        found.append((sidecar.name, file.stamp))
        file.close()
    return found
