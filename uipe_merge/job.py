"""One merge, from its arguments to a plan that may be run."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uipe_merge._version import __version__
from uipe_merge.adapter_plan import make_adapter_plan
from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.checkpoint.urls import RemoteFolder, is_url, local
from uipe_merge.coherent import factors_bytes
from uipe_merge.coherent import peak_memory as factors_memory
from uipe_merge.fetching import download_bytes, wanted
from uipe_merge.fetching import require_room as require_download_room
from uipe_merge.inputs import Inputs, collector_paused, open_inputs
from uipe_merge.output import bucket, place
from uipe_merge.output.bucket import BucketStaging
from uipe_merge.output.card import CARD_NAME
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.output.manifest import MANIFEST_NAME
from uipe_merge.output.sidecars import (
    Sidecar,
    plan_adapter_sidecars,
    plan_sidecars,
)
from uipe_merge.output.staging import Staging
from uipe_merge.plan import BLOCK, CELL, NUMERICS, Plan
from uipe_merge.planning import make_plan
from uipe_merge.reader import widest_input

if TYPE_CHECKING:
    from pathlib import Path

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.fetching import Wanted
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.reader import Pair
    from uipe_merge.recipe import Recipe

PathLike = str | os.PathLike[str]

_COMMANDS = (
    "merge",
    "finish",
    "grid",
    "collect",
    "evaluate",
    "search",
    "lm-eval",
    "inspect",
    "verify",
    "demo",
    "mergekit",
)
_REMOTE_BLOCK = 4 * 2**20  # bytes: eight threads with three of them stay far below 512 MiB


@dataclass(frozen=True, slots=True)
class Job:
    """A merge that was planned and may be run.

    Attributes:
        plan: What will be done to every tensor.
        pair: The two checkpoints.
        sidecars: The files that go beside the weights.
        wanted: The files that will be read whole, folder by folder.
        output: The real path of the output; for a URL, where it is made before it goes there.
        folder: Where an output by URL goes.
        arguments: The two inputs as the user named them, a hub id with its commit.
        names: The same of every further checkpoint, by the name that the recipe has.
        named: The output as the user named it.
        space: What the disk needs and has.
        beside: Bytes of what is kept until the output is published; of several jobs, once.
        overwrite: Whether a model at the output may be replaced.
        device: Where singular vectors are found.
    """

    plan: Plan
    pair: Pair
    sidecars: list[Sidecar]
    wanted: list[Wanted]
    output: Path
    folder: RemoteFolder | None
    arguments: tuple[str, str]
    names: dict[str, str]
    named: str
    space: place.Space
    beside: int
    overwrite: bool
    device: str = "cpu"

    @property
    def download_bytes(self) -> int:
        """How much has to be downloaded before the run."""
        return download_bytes(self.wanted)

    @property
    def command(self) -> str:
        """The command line that makes this output."""
        config = self.plan.recipe.mergekit
        named = self.arguments if config is None else (config.config,)
        words = ["uipe-merge", *(_operand(argument) for argument in named)]
        recipe = self.plan.recipe.words(lambda name: self.names.get(name, name))
        words += [*recipe, "-o", self.named]
        words += ["--allow-pickle"] if self.pickled else []
        words += ["--dequantize"] if self.quantised else []
        return shlex.join(words)

    @property
    def pickled(self) -> bool:
        """Whether a checkpoint is pickled."""
        shards = (shard for side in self.pair.sides for shard in side.shards)
        return any(shard.name.endswith(".bin") for shard in shards)

    @property
    def quantised(self) -> bool:
        """Whether a checkpoint is, or says that it was, quantised."""
        sides = self.pair.sides
        return any(is_scaled(side) or side.config.get("quantization_config") for side in sides)

    @property
    def _reads_remotely(self) -> bool:
        folders = [folder for side in self.pair.sides for folder in side.folders.values()]
        return any(isinstance(folder, RemoteFolder) for folder in folders)

    @property
    def remote(self) -> bool:
        """Whether it reads or writes over a network."""
        return self.folder is not None or self._reads_remotely

    @property
    def block(self) -> int:
        """How many elements are read at a time: over a network more, up to some bytes."""
        if not self._reads_remotely:
            return BLOCK
        return max(_REMOTE_BLOCK // widest_input(self.plan) // CELL * CELL, CELL)

    def peak_memory(self, threads: int, *, torch: bool) -> int:
        """Return an upper estimate of the resident bytes of a run; see ``Plan.peak_memory``."""
        peak = self.plan.peak_memory(threads, torch=torch, block=self.block, remote=self.remote)
        low_rank = self.plan.recipe.steering.low_rank
        return peak + (factors_memory(self.plan, threads) if low_rank else 0)

    def staging(self, filesystem: FileSystem) -> Staging:
        """Return where the output is built."""
        if self.folder is None:
            return Staging(filesystem, self.output)
        names = [shard.name for shard in self.plan.shards]
        names += [sidecar.name for sidecar in self.sidecars]
        planned = frozenset([*names, CARD_NAME, INDEX_NAME, MANIFEST_NAME])
        return BucketStaging(filesystem, self.folder, planned)


def prepare(
    original: PathLike,
    unlearned: PathLike,
    output: PathLike,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
    device: str = "cpu",
) -> Job:
    """Read headers and decide everything; write nothing.

    Raises:
        UipeMergeError: Whatever is wrong with the inputs or the arguments, with its exit code.
            ``require_room`` looks at the output's place and the disk.
    """
    # Before the output is looked at, so that a missing input is what is reported.
    allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
    inputs = open_inputs(original, unlearned, recipe, **allowed)
    return plan_job(inputs, output, recipe, overwrite=overwrite, device=device)


def plan_job(
    inputs: Inputs,
    output: PathLike,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    parent_made: bool = False,
) -> Job:
    """Decide everything about one output; the recipe differs in α alone from the inputs' own.

    With ``parent_made`` the directory that it is to be in will be made.

    Raises:
        UipeMergeError: As for ``prepare``.
    """
    named = local(os.fspath(output))
    folder = None
    if is_url(named):
        remote = [each for each in inputs.folders if isinstance(each, RemoteFolder)]
        folder = bucket.resolve(named, remote)
        target = bucket.workplace(folder)
    else:
        directories = [each.location for each in inputs.folders if isinstance(each, LocalFolder)]
        target = place.resolve(named, directories, parent_made=parent_made)
    pair = inputs.pair
    with collector_paused():
        two = (pair.original, pair.unlearned)
        if recipe.form == "adapter":
            plan = make_adapter_plan(*two, inputs.pairing, recipe)
            sidecars = plan_adapter_sidecars(pair.unlearned)
        else:
            plan = make_plan(*two, inputs.pairing, recipe, inputs.further)
            sidecars = plan_sidecars(*two)
    if device != "cpu":
        from uipe_merge.device import require_device  # imports torch

        require_device(device)
        if not recipe.steering.low_rank:
            plan.warnings.append(
                f"--device {device} has nothing to do: it finds singular vectors (--rank, --energy)"
            )
    return Job(
        plan=plan,
        pair=pair,
        sidecars=sidecars,
        wanted=wanted(plan, pair, sidecars),
        output=target,
        folder=folder,
        arguments=inputs.arguments,
        names=inputs.names,
        named=named,
        space=_space(plan, sidecars, target, delivered=folder is not None),
        beside=factors_bytes(plan) if recipe.steering.low_rank else 0,
        overwrite=overwrite,
        device=device,
    )


def _space(plan: Plan, sidecars: list[Sidecar], target: Path, *, delivered: bool) -> place.Space:
    """Measure the disk; of an output that is delivered elsewhere it holds a few shards only."""
    shards = sorted((shard.size for shard in plan.shards), reverse=True)
    if delivered:
        shards = shards[: bucket.IN_HAND]
    needed = sum(shards) + sum(sidecar.size for sidecar in sidecars)
    files = len(shards) + len(sidecars) + 8  # index, card, manifest, journal, lock, …
    return place.measure(place.existing(target.parent), needed, files)


def _operand(path: str) -> str:
    """Return a path that the command line can take for nothing else."""
    return f"./{path}" if path.startswith("-") or path in _COMMANDS else path


def require_room(*jobs: Job) -> None:
    """Refuse what could not be published, or does not fit on the disk; of several jobs, together.

    What an interrupted run has written counts as room: it is kept, or removed first.

    Raises:
        OutputError: Something is at the output path that may not be replaced, or bytes, files
            or the size a file may have do not suffice, there or for what is downloaded.
    """
    left = [space for job in jobs if (space := _space_left(job)) is not None]
    if not left:
        return
    first = jobs[0]
    needed = sum(space.needed for space in left) + max(job.beside for job in jobs)
    together = left[0]._replace(needed=needed, files=sum(space.files for space in left))
    largest = max(shard.size for job in jobs for shard in job.plan.shards)
    parent = place.existing(first.output.parent)
    place.require(together, parent, largest)
    require_download_room(first.wanted, parent, needed)


def _space_left(job: Job) -> place.Space | None:
    """Return what a job still needs; nothing if it was published.

    Raises:
        OutputError: Something is at the output path that may not be replaced.
    """
    staging = job.staging(LocalFileSystem())
    nbytes = files = 0
    if staging.partial.exists():
        own = identity(job)
        if staging.was_published(own):
            return None
        nbytes, files = staging.held(own)
    staging.require_replaceable(job.named, overwrite=job.overwrite)
    return job.space._replace(needed=job.space.needed - nbytes, files=job.space.files - files)


def require_startable(job: Job) -> None:
    """Refuse all that ``run`` would refuse before it writes anything.

    Raises:
        OutputError: See ``require_room``; or an interrupted run of another command is there.
    """
    require_room(job)
    staging = job.staging(LocalFileSystem())
    if not job.overwrite and staging.partial.exists():
        staging.require_own(identity(job))


def identity(job: Job) -> dict[str, object]:
    """Return what a run must share with an interrupted one to go on with it."""
    return {
        "version": __version__,
        "numerics": NUMERICS,
        **job.plan.recipe.canonical(),
        "original": json.dumps(job.plan.original),
        "unlearned": json.dumps(job.plan.unlearned),
        "further": json.dumps(job.plan.further),
        "plan": job.plan.fingerprint(),
    }


def run_digest(job: Job) -> str:
    """Return a digest of ``identity``, by which a published output is known again."""
    return hashlib.sha256(json.dumps(identity(job), sort_keys=True).encode()).hexdigest()


def is_scaled(checkpoint: Checkpoint) -> bool:
    """Tell whether tensors of a checkpoint are dequantised."""
    return any(spec.scales is not None for spec in checkpoint.tensors.values())
