"""One merge, from its arguments to a plan that may be run."""

from __future__ import annotations

import gc
import json
import os
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uipe_merge import native
from uipe_merge._version import __version__
from uipe_merge.adapter_plan import make_adapter_plan
from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.checkpoint.pair import match, refuse_swapped
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.checkpoint.urls import RemoteFolder, is_url, local
from uipe_merge.coherent import factors_bytes
from uipe_merge.coherent import peak_memory as factors_memory
from uipe_merge.fetching import download_bytes, wanted
from uipe_merge.fetching import require_room as require_download_room
from uipe_merge.opening import hold_further, open_folders, open_further, open_pair
from uipe_merge.output import bucket, place
from uipe_merge.output.bucket import BucketStaging
from uipe_merge.output.card import CARD_NAME, base_models, card_metadata
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
    from collections.abc import Iterator
    from pathlib import Path

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.fetching import Wanted
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.reader import Pair
    from uipe_merge.recipe import Recipe

PathLike = str | os.PathLike[str]

_COMMANDS = ("merge", "inspect", "verify", "demo")
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
        overwrite: Whether a model at the output may be replaced.
        device: Where torch computes what is not compiled, and singular vectors.
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
    overwrite: bool
    device: str = "cpu"

    @property
    def download_bytes(self) -> int:
        """How much has to be downloaded before the run."""
        return download_bytes(self.wanted)

    @property
    def command(self) -> str:
        """The command line that makes this output."""
        words = ["uipe-merge", *(_operand(argument) for argument in self.arguments)]
        recipe = self.plan.recipe.words(lambda name: self.names.get(name, name))
        words += [*recipe, "-o", self.named]
        sides = self.pair.sides
        if any(shard.name.endswith(".bin") for side in sides for shard in side.shards):
            words.append("--allow-pickle")
        if any(is_scaled(side) or side.config.get("quantization_config") for side in sides):
            words.append("--dequantize")
        return shlex.join(words)

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
    further = recipe.steering.checkpoints
    first, second, *others = sides = open_folders(original, unlearned, *further)
    sources = [source for side in sides for source in side]
    named = local(os.fspath(output))
    folder = None
    if is_url(named):
        remote = [source for source in sources if isinstance(source, RemoteFolder)]
        folder = bucket.resolve(named, remote)
        target = bucket.workplace(folder)
    else:
        directories = [source.location for source in sources if isinstance(source, LocalFolder)]
        target = place.resolve(named, directories)
    with _collector_paused():
        allowed = {"allow_pickle": allow_pickle, "dequantize": dequantize}
        pair = open_pair(first, second, **allowed)
        refuse_swapped(pair.original, pair.unlearned, base_models(card_metadata(pair.original)))
        pairing = match(pair.original, pair.unlearned, recipe.on_mismatch)
        pairing.require_match(pair.original, pair.unlearned)
        if recipe.form == "adapter":
            plan = make_adapter_plan(pair.original, pair.unlearned, pairing, recipe)
            sidecars = plan_adapter_sidecars(pair.unlearned)
        else:
            folders = dict(zip(further, others, strict=True))
            pair, directions = open_further(
                recipe.steering, folders, pair, (first, second), **allowed
            )
            held = hold_further(pair, pairing, directions)
            plan = make_plan(pair.original, pair.unlearned, pairing, recipe, held)
            sidecars = plan_sidecars(pair.original, pair.unlearned)
    if device != "cpu":
        from uipe_merge.kernels import require_device  # imports torch

        require_device(device)
        if native.suffices(plan) and not recipe.steering.low_rank:
            plan.warnings.append(f"--device {device} has nothing to do: all of it is compiled")
    beside = factors_bytes(plan) if recipe.steering.low_rank else 0
    space = _space(plan, sidecars, target, beside, delivered=folder is not None)
    one, two, *rest = ("+".join(folder.location for folder in side) for side in sides)
    return Job(
        plan=plan,
        pair=pair,
        sidecars=sidecars,
        wanted=wanted(plan, pair, sidecars),
        output=target,
        folder=folder,
        arguments=(one, two),
        names=dict(zip(further, rest, strict=True)),
        named=named,
        space=space,
        overwrite=overwrite,
        device=device,
    )


def _space(
    plan: Plan, sidecars: list[Sidecar], target: Path, beside: int, *, delivered: bool
) -> place.Space:
    """Measure the disk; of an output that is delivered elsewhere it holds a few shards only.

    ``beside`` are the bytes of what is kept until the output is published.
    """
    shards = sorted((shard.size for shard in plan.shards), reverse=True)
    if delivered:
        shards = shards[: bucket.IN_HAND]
    needed = sum(shards) + sum(sidecar.size for sidecar in sidecars) + beside
    files = len(shards) + len(sidecars) + 8  # index, card, manifest, journal, lock, …
    return place.measure(place.existing(target.parent), needed, files)


def _operand(path: str) -> str:
    """Return a path that the command line can take for nothing else."""
    return f"./{path}" if path.startswith("-") or path in _COMMANDS else path


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking hundreds of thousands of new tuples.

    Planning makes no cycles; on a model of 100 k tensors this saves a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def require_room(job: Job) -> None:
    """Refuse what could not be published, or does not fit on the disk.

    What an interrupted run has written counts as room: it is kept, or removed first.

    Raises:
        OutputError: Something is at the output path that may not be replaced, or bytes, files
            or the size a file may have do not suffice, there or for what is downloaded.
    """
    staging = job.staging(LocalFileSystem())
    nbytes = files = 0
    if staging.partial.exists():
        own = identity(job)
        if staging.was_published(own):
            return
        nbytes, files = staging.held(own)
    staging.require_replaceable(job.named, overwrite=job.overwrite)
    left = job.space._replace(needed=job.space.needed - nbytes, files=job.space.files - files)
    place.require(left, job.output.parent, max(shard.size for shard in job.plan.shards))
    require_download_room(job.wanted, job.output.parent, left.needed)


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


def is_scaled(checkpoint: Checkpoint) -> bool:
    """Tell whether tensors of a checkpoint are dequantised."""
    return any(spec.scales is not None for spec in checkpoint.tensors.values())
