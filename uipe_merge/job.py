"""One merge from its arguments to the published directory."""

from __future__ import annotations

import gc
import json
import os
import shlex
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uipe_merge._version import __version__
from uipe_merge.adapter_plan import make_adapter_plan
from uipe_merge.checkpoint.adapter import CONFIG_NAME
from uipe_merge.checkpoint.decisions import following
from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.checkpoint.pair import match, refuse_swapped
from uipe_merge.checkpoint.scaled import DEFAULT_DTYPE, said_dtype
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.checkpoint.urls import RemoteFolder, is_url, local
from uipe_merge.errors import CorruptInputError, NumericError, OutputError, listed
from uipe_merge.fetching import download_bytes, fetch, wanted
from uipe_merge.fetching import require_room as require_download_room
from uipe_merge.opening import open_folders, open_pair
from uipe_merge.output import bucket, place
from uipe_merge.output.bucket import BucketStaging
from uipe_merge.output.card import CARD_NAME, base_models, card_metadata, encode_card, hub_id
from uipe_merge.output.filesystem import LocalFileSystem, write_document
from uipe_merge.output.lock import hold, tidy
from uipe_merge.output.manifest import MANIFEST_NAME, FileRecord, encode_manifest, record_of
from uipe_merge.output.sidecars import (
    Edits,
    Sidecar,
    copy_sidecar,
    plan_adapter_sidecars,
    plan_sidecars,
)
from uipe_merge.output.staging import Staging
from uipe_merge.plan import BLOCK, CELL, NUMERICS, Plan, make_plan
from uipe_merge.reader import widest_input
from uipe_merge.report import MergeReport, Summary, Sums, summarise, tensor_record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.executors import Executor
    from uipe_merge.fetching import Wanted
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.journal import ShardRecord
    from uipe_merge.progress import Progress
    from uipe_merge.reader import Pair
    from uipe_merge.recipe import Recipe

PathLike = str | os.PathLike[str]

_RULES = {
    "model": "theta_u + alpha * (theta_u - theta_0)",
    "adapter": "theta_0 + (1 + alpha) * c * B * A: B + alpha * (B - 0)",
}
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
        named: The output as the user named it.
        space: What the disk needs and has.
        overwrite: Whether a model at the output may be replaced.
    """

    plan: Plan
    pair: Pair
    sidecars: list[Sidecar]
    wanted: list[Wanted]
    output: Path
    folder: RemoteFolder | None
    arguments: tuple[str, str]
    named: str
    space: place.Space
    overwrite: bool

    @property
    def download_bytes(self) -> int:
        """How much has to be downloaded before the run."""
        return download_bytes(self.wanted)

    @property
    def command(self) -> str:
        """The command line that makes this output."""
        words = ["uipe-merge", *(_operand(argument) for argument in self.arguments)]
        words += [*self.plan.recipe.words(), "-o", self.named]
        if any(shard.name.endswith(".bin") for side in self.pair for shard in side.shards):
            words.append("--allow-pickle")
        if any(_scaled(side) for side in self.pair):
            words.append("--dequantize")
        return shlex.join(words)

    @property
    def _reads_remotely(self) -> bool:
        folders = [folder for side in self.pair for folder in side.folders.values()]
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
) -> Job:
    """Read headers and decide everything; write nothing.

    Raises:
        UipeMergeError: Whatever is wrong with the inputs or the arguments, with its exit code.
            ``require_room`` looks at the output's place and the disk.
    """
    # Before the output is looked at, so that a missing input is what is reported.
    sides = open_folders(original, unlearned)
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
        pair = open_pair(*sides, allow_pickle=allow_pickle, dequantize=dequantize)
        refuse_swapped(*pair, base_models(card_metadata(pair.original)))
        pairing = match(*pair, recipe.on_mismatch)
        pairing.require_match(*pair)
        planned = make_adapter_plan if recipe.form == "adapter" else make_plan
        plan = planned(*pair, pairing, recipe)
    if recipe.form == "adapter":
        sidecars = plan_adapter_sidecars(pair.unlearned)
    else:
        sidecars = plan_sidecars(*pair)
    space = _space(plan, sidecars, target, delivered=folder is not None)
    first, second = ("+".join(folder.location for folder in side) for side in sides)
    return Job(
        plan=plan,
        pair=pair,
        sidecars=sidecars,
        wanted=wanted(plan, pair, sidecars),
        output=target,
        folder=folder,
        arguments=(first, second),
        named=named,
        space=space,
        overwrite=overwrite,
    )


def _space(plan: Plan, sidecars: list[Sidecar], target: Path, *, delivered: bool) -> place.Space:
    """Measure the disk; of an output that is delivered elsewhere it holds a few shards only."""
    shards = sorted((shard.size for shard in plan.shards), reverse=True)
    if delivered:
        shards = shards[: bucket.IN_HAND]
    needed = sum(shards) + sum(sidecar.size for sidecar in sidecars)
    files = len(shards) + len(sidecars) + 8  # index, card, manifest, journal, lock, …
    return place.measure(bucket.existing(target.parent), needed, files)


def run(job: Job, executor: Executor, filesystem: FileSystem, progress: Progress) -> MergeReport:
    """Do a prepared merge, or what an interrupted run left of it, and publish the output.

    Args:
        job: The merge.
        executor: On what the blocks run.
        filesystem: Through what everything is written.
        progress: Told of every block.

    Raises:
        NumericError: A value is not finite, or would not be.
        CorruptInputError: An input changed or ended early.
        OutputError: The disk refused something, or another command's run is in the way.
        OutputLockedError: Another run is writing this output.
        RemoteError: What has to be downloaded first cannot be had.
    """
    from uipe_merge.engine import require_unchanged, write_shards  # imports numpy

    began = time.monotonic()
    staging = job.staging(filesystem)
    try:
        require_room(job)
    except OutputError:
        tidy(staging.partial)
        raise
    fetch(job.wanted, job.pair)
    identity = _identity(job)
    staging.prepare()
    with hold(staging.partial):
        if staging.was_published(identity):
            records = staging.journal.shards()
            resumed = len(records)
            staging.settle()
        else:
            staging.restore()
            staging.require_replaceable(job.named, overwrite=job.overwrite)
            staging.begin(identity, overwrite=job.overwrite)
            resumed = len(staging.done)
            try:
                records = write_shards(
                    job.plan,
                    job.pair,
                    staging,
                    filesystem,
                    executor,
                    progress,
                    block=job.block,
                )
                require_unchanged(job.pair)
            except (NumericError, CorruptInputError):
                staging.discard()  # it would fail again: there is nothing to go on with
                raise
            finally:
                progress.close()
            _write_rest(job, staging, filesystem, records)
            staging.publish(overwrite=job.overwrite)
    summary, tensors = _results(job.plan, records)
    return MergeReport(
        output=job.output if job.folder is None else job.folder.location,
        summary=summary,
        tensors=tensors,
        warnings=[*job.plan.warnings, *_kept_warnings(tensors), *summary.warnings()],
        written=job.plan.write_bytes,
        seconds=time.monotonic() - began,
        resumed=resumed,
    )


def _operand(path: str) -> str:
    """Return a path that the command line cannot take for an option."""
    return f"./{path}" if path.startswith("-") else path


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
        identity = _identity(job)
        if staging.was_published(identity):
            return
        nbytes, files = staging.held(identity)
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
    if not job.overwrite:
        job.staging(LocalFileSystem()).require_own(_identity(job))


def _identity(job: Job) -> dict[str, object]:
    """Return what a run must share with an interrupted one to go on with it."""
    return {
        "version": __version__,
        "numerics": NUMERICS,
        **job.plan.recipe.canonical(),
        "original": json.dumps(job.plan.original),
        "unlearned": json.dumps(job.plan.unlearned),
        "plan": job.plan.fingerprint(),
    }


def _write_rest(
    job: Job, staging: Staging, filesystem: FileSystem, records: dict[str, ShardRecord]
) -> None:
    """Write everything but the shards; the manifest comes last."""
    plan, model = job.plan, staging.model
    summary, tensors = _results(plan, records)
    files = {record.name: FileRecord(record.size, record.sha256) for record in records.values()}
    recipe = plan.recipe
    edits = _edits(job)
    for sidecar in job.sidecars:
        changed = edits.get(sidecar.name, Edits())
        files[sidecar.name] = copy_sidecar(filesystem, sidecar, model, changed)
    documents = {CARD_NAME: encode_card(*job.pair, job.command, summary, recipe.form)}
    if (index := plan.index_json()) is not None:
        documents[INDEX_NAME] = index
    for name, content in documents.items():
        write_document(filesystem, model / name, content)
        files[name] = record_of(content)
    manifest = {
        "tool": {"name": "uipe-merge", "version": __version__, "numerics": NUMERICS},
        "rule": _RULES[recipe.form],
        "command": job.command,
        "recipe": {
            "alpha": recipe.alpha,
            "dtype": recipe.dtype,
            "max_shard_bytes": recipe.max_shard_bytes,
            "on_mismatch": recipe.on_mismatch,
            "alpha_rules": [list(rule) for rule in recipe.rules],
            "alpha_layers": [list(knot) for knot in recipe.layers],
            "gradient": list(recipe.gradient),
            "as": recipe.form,
            "rounding": recipe.rounding,
            "seed": recipe.seed,
        },
        "plan": plan.fingerprint(),
        "inputs": {
            side: {
                "location": checkpoint.location,
                "shards": [
                    {
                        "name": shard.name,
                        "size": shard.stamp.size,
                        "mtime_ns": shard.stamp.mtime_ns,
                        "header_sha256": shard.header_sha256,
                        **({"tag": shard.stamp.tag} if shard.stamp.tag else {}),
                    }
                    for shard in checkpoint.shards
                ],
            }
            for side, checkpoint in job.pair._asdict().items()
        },
        "summary": summary.as_dict(),
        "tensors": tensors,
    }
    write_document(filesystem, model / MANIFEST_NAME, encode_manifest(manifest, files))


def _edits(job: Job) -> dict[str, Edits]:
    """Return what a configuration must say other than the unlearned checkpoint's."""
    original, unlearned = job.pair
    if job.plan.recipe.form == "adapter" and unlearned.adapter is not None:
        config = unlearned.adapter.config
        fields: dict[str, object] = {} if config.get("inference_mode") else {"inference_mode": True}
        if not config.get("base_model_name_or_path") and original.adapter is None:
            fields["base_model_name_or_path"] = hub_id(original.location) or original.location
        return {CONFIG_NAME: Edits(fields=fields)}
    kept, dtype = unlearned.tensors, job.plan.recipe.dtype
    steps = [step for step in job.plan.steps if step.name in kept]
    changed = any(step.dtype != kept[step.name].kept_dtype for step in steps)
    if dtype == "auto" and _scaled(unlearned) and said_dtype(unlearned.config) is None:
        dtype, changed = DEFAULT_DTYPE, True
    fields = {}
    if job.plan.recipe.on_mismatch == "keep-original":
        fields = following(original.config, unlearned.config)
    # Where the checkpoint has no config.json, the original's is carried over.
    config = unlearned.config or original.config
    removed = ("quantization_config",) if config.get("quantization_config") else ()
    edits = Edits(dtype if changed and dtype != "auto" else None, fields, removed)
    return {"config.json": edits}


def _scaled(checkpoint: Checkpoint) -> bool:
    return any(spec.scales is not None for spec in checkpoint.tensors.values())


def _results(
    plan: Plan, records: dict[str, ShardRecord]
) -> tuple[Summary, dict[str, dict[str, object]]]:
    sums = {
        step.name: None if values is None else Sums(*values)
        for shard in plan.shards
        for step, values in zip(shard.steps, records[shard.name].moments, strict=True)
    }
    steps = list(plan.steps)
    tensors = {step.name: tensor_record(step, sums[step.name]) for step in steps}
    return summarise(steps, sums, plan.recipe.alpha), tensors


def _kept_warnings(tensors: dict[str, dict[str, object]]) -> list[str]:
    differing = [name for name, record in tensors.items() if record.get("share_differing")]
    if not differing:
        return []
    return [
        (
            f"integer tensors differ between the checkpoints, the unlearned ones were kept: "
            f"{listed(differing)}"
        )
    ]
