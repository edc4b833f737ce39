"""A merge up to its blocks, whose output is never written: for models in memory, and for checks."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge import fetching
from uipe_merge.executors import make_executor
from uipe_merge.job import Job, prepare
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.progress import Silent
from uipe_merge.settling import Settled, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uipe_merge.executors import Executor
    from uipe_merge.recipe import Recipe


class Rehearsal(NamedTuple):
    """A planned merge.

    Attributes:
        job: The merge; nothing will be at its output.
        executor: On what its blocks run.
        root: A directory that is there as long as the rehearsal.
    """

    job: Job
    executor: Executor
    root: Path

    def settled(self) -> Settled:
        """Download what is absent, and measure what the steps depend on, as a merge does.

        Raises:
            UipeMergeError: As ``running.run``, before it writes.
        """
        fetching.require_room(self.job.wanted, None, 0)
        fetching.fetch(self.job.wanted, self.job.pair)
        kept = self.root / "kept"
        return settle(self.job, kept, LocalFileSystem(), self.executor, Silent())


@contextmanager
def rehearse(
    original: str,
    unlearned: str,
    recipe: Recipe,
    *,
    allow_pickle: bool,
    dequantize: bool,
    device: str,
    threads: int | None,
) -> Iterator[Rehearsal]:
    """Plan a merge from headers alone. The arguments are ``api.merge``'s.

    Raises:
        UipeMergeError: As ``job.prepare``.
    """
    with TemporaryDirectory(prefix="uipe-merge-") as name:
        root = Path(name)
        job = prepare(
            original,
            unlearned,
            root / "model",
            recipe,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
            device=device,
        )
        yield Rehearsal(job, make_executor(threads, remote=job.remote), root)
