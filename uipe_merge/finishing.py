"""What stands beside the shards of an output: sidecars, card, index, and the manifest last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uipe_merge._version import __version__
from uipe_merge.checkpoint.adapter import CONFIG_NAME
from uipe_merge.checkpoint.decisions import following
from uipe_merge.checkpoint.index import INDEX_NAME
from uipe_merge.checkpoint.scaled import DEFAULT_DTYPE, said_dtype
from uipe_merge.job import Job, is_scaled, run_digest
from uipe_merge.output.card import CARD_NAME, encode_card, hub_id
from uipe_merge.output.filesystem import write_document
from uipe_merge.output.manifest import MANIFEST_NAME, FileRecord, encode_manifest, record_of
from uipe_merge.output.sidecars import Edits, copy_sidecar
from uipe_merge.plan import NUMERICS
from uipe_merge.report import Summary, Sums, add, summarise, tensor_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.output.journal import ShardRecord
    from uipe_merge.output.staging import Staging
    from uipe_merge.recipe import Recipe
    from uipe_merge.resolving import GroupRecord
    from uipe_merge.settling import Settled

_RULES = {
    "model": "theta_u + alpha * (theta_u - theta_0)",
    "adapter": "theta_0 + (1 + alpha) * c * B * A: B + alpha * (B - 0)",
}
_TASK = "theta_0 + (1 + alpha) * (theta_u - theta_0), in float32"
_STEERED = "theta_u + s, with s made as the recipe says: see groups"


def write_rest(
    job: Job,
    settled: Settled,
    staging: Staging,
    filesystem: FileSystem,
    records: dict[str, ShardRecord],
) -> None:
    """Write everything but the shards; the manifest comes last."""
    plan, model = settled.plan, staging.model
    summary, tensors, groups = results(settled, records)
    files = {record.name: FileRecord(record.size, record.sha256) for record in records.values()}
    recipe = plan.recipe
    edits = config_edits(job)
    for sidecar in job.sidecars:
        changed = edits.get(sidecar.name, Edits())
        files[sidecar.name] = copy_sidecar(filesystem, sidecar, model, changed)
    documents = {
        CARD_NAME: encode_card(job.pair.original, job.pair.unlearned, job.command, summary, recipe)
    }
    if (index := plan.index_json()) is not None:
        documents[INDEX_NAME] = index
    for name, content in documents.items():
        write_document(filesystem, model / name, content)
        files[name] = record_of(content)
    manifest = {
        "tool": {"name": "uipe-merge", "version": __version__, "numerics": NUMERICS},
        "rule": _rule(recipe),
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
            **recipe.steering.document(),
            **({} if recipe.mergekit is None else {"mergekit": recipe.mergekit.document()}),
        },
        "plan": plan.fingerprint(),
        "run": run_digest(job),
        "inputs": {
            "original": _input(job.pair.original),
            "unlearned": _input(job.pair.unlearned),
            **({"further": list(map(_input, job.pair.further))} if job.pair.further else {}),
        },
        "summary": summary.as_dict(),
        **({"groups": groups} if groups else {}),
        "tensors": tensors,
    }
    write_document(filesystem, model / MANIFEST_NAME, encode_manifest(manifest, files))


def _rule(recipe: Recipe) -> str:
    if recipe.mergekit is not None and recipe.mergekit.arithmetic == "task":
        return _TASK
    return _STEERED if recipe.steering.active else _RULES[recipe.form]


def _input(checkpoint: Checkpoint) -> dict[str, object]:
    return {
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


def config_edits(job: Job) -> dict[str, Edits]:
    """Return what a configuration must say other than the unlearned checkpoint's."""
    original, unlearned = job.pair.original, job.pair.unlearned
    if job.plan.recipe.form == "adapter" and unlearned.adapter is not None:
        config = unlearned.adapter.config
        fields: dict[str, object] = {} if config.get("inference_mode") else {"inference_mode": True}
        if not config.get("base_model_name_or_path") and original.adapter is None:
            fields["base_model_name_or_path"] = hub_id(original.location) or original.location
        return {CONFIG_NAME: Edits(fields=fields)}
    kept, dtype = unlearned.tensors, job.plan.recipe.dtype
    steps = [step for step in job.plan.steps if step.name in kept]
    changed = any(step.dtype != kept[step.name].kept_dtype for step in steps)
    if is_scaled(unlearned) and said_dtype(unlearned.config) is None:
        dtype, changed = DEFAULT_DTYPE if dtype == "auto" else dtype, True
    fields = {}
    if job.plan.recipe.on_mismatch == "keep-original":
        fields = following(original.config, unlearned.config)
    # Where the checkpoint has no config.json, the original's is carried over.
    config = unlearned.config or original.config
    removed = ("quantization_config",) if config.get("quantization_config") else ()
    edits = Edits(dtype if changed and dtype != "auto" else None, fields, removed)
    return {"config.json": edits}


def results(
    settled: Settled, records: dict[str, ShardRecord]
) -> tuple[Summary, dict[str, dict[str, object]], dict[str, dict[str, object]]]:
    """Return the numbers over the model, and the record of every tensor and of every group."""
    plan = settled.plan
    sums = {
        step.name: None if values is None else Sums(*values)
        for shard in plan.shards
        for step, values in zip(shard.steps, records[shard.name].moments, strict=True)
    }
    steps = list(plan.steps)
    tensors = {step.name: tensor_record(step, sums[step.name]) for step in steps}
    for name, found in settled.ranks.items():
        tensors[name] |= found
    summary = summarise(steps, sums, plan.recipe.alpha, steered=plan.directions is not None)
    return summary, tensors, {group.name: _group(group, sums) for group in settled.groups}


def _group(group: GroupRecord, sums: Mapping[str, Sums | None]) -> dict[str, object]:
    total = add(found for name in group.tensors if (found := sums[name]) is not None)
    return {**group.as_dict(), "effective_alpha": total.effective_alpha, "share_kept": total.kept}
