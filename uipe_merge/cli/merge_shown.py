"""What ``merge`` prints: the plan before, the report after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge import native
from uipe_merge.cli.console import Output, number, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.job import Job
    from uipe_merge.output.slices import Slice
    from uipe_merge.report import MergeReport
    from uipe_merge.resolving import GroupRecord

_LISTED_ALPHAS = 5
_LISTED_GROUPS = 100
_LISTED_SHARDS = 3


def show_plan(
    out: Output, job: Job, threads: int, groups: list[GroupRecord], part: Slice | None = None
) -> None:
    """Print what a run would do, and what was measured for it."""
    plan = job.plan
    operations = plan.operations()
    steering = plan.recipe.steering
    torch = steering.low_rank or not native.suffices(plan)
    peak = job.peak_memory(threads, torch=torch)
    if out.as_json:
        out.data(
            {
                "operations": {
                    name: {"tensors": count, "bytes": nbytes}
                    for name, (count, nbytes) in operations.items()
                },
                "alphas": [
                    {"alpha": alpha, "tensors": count} for alpha, count in plan.alphas().items()
                ],
                "shards": len(plan.shards),
                "read_bytes": plan.read_bytes,
                "write_bytes": plan.write_bytes,
                "download_bytes": job.download_bytes,
                "sidecars": [sidecar.name for sidecar in job.sidecars],
                "free_bytes": job.space.free,
                "peak_memory_bytes": peak,
                "threads": threads,
                "compiled": native.COMPILED,
                **({"slice": _share(job, part)._asdict()} if part else {}),
                **({"groups": _as_dict(groups)} if steering.measured else {}),
                "warnings": plan.warnings,
            }
        )
        return
    out.table(
        ["operation", "tensors", "bytes"],
        [(name, f"{count:,}", size(nbytes)) for name, (count, nbytes) in operations.items()],
    )
    out.line("")
    free = "unknown" if job.space.free is None else size(job.space.free)
    where = job.output if job.folder is None else job.named
    rows = [
        ("α", _alphas(plan.alphas())),
        ("output", f"{where} ({len(plan.shards)} shards, {len(job.sidecars)} other files)"),
        ("read", size(plan.read_bytes) + (" twice at most" if steering.measured else "")),
        ("write", size(plan.write_bytes)),
        *([("of this slice", _share(job, part).text)] if part else []),
        *([("download first", size(job.download_bytes))] if job.download_bytes else []),
        ("free disk", free),
        ("peak memory", f"{size(peak)} with {threads} threads"),
        ("arithmetic", "compiled" if native.COMPILED else "torch; slower, the same bytes"),
    ]
    out.fields(rows)
    if out.verbose:
        out.line("")
        out.table(
            ["tensor", "operation", "α", "dtype", "bytes"],
            [
                (
                    step.name,
                    step.operation,
                    number(step.alpha, "g"),
                    step.dtype.name,
                    size(step.nbytes),
                )
                for step in plan.steps
            ],
        )
    _show_groups(out, _as_dict(groups) or {})
    if steering.measured and not groups:
        out.note("the coefficients are measured when it runs")
    out.warn(plan.warnings)


class _Share(NamedTuple):
    """What a slice makes of a plan."""

    shards: list[str]
    read_bytes: int
    write_bytes: int

    @property
    def text(self) -> str:
        names = ", ".join(self.shards[:_LISTED_SHARDS])
        more = "" if len(self.shards) <= _LISTED_SHARDS else ", …"
        which = f": {names}{more}" if self.shards else ""
        return f"{len(self.shards)} shards, {size(self.write_bytes)}{which}"


def _share(job: Job, part: Slice) -> _Share:
    from uipe_merge.slicing import divide

    shards = [job.plan.shards[index] for index in divide(job.plan, part.total)[part.number - 1]]
    plan = job.plan._replace(shards=shards)
    return _Share([shard.name for shard in shards], plan.read_bytes, plan.write_bytes)


def _show_groups(out: Output, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what was measured: a row for each group, a column for what was asked for."""
    if not groups or (len(groups) > _LISTED_GROUPS and not out.verbose):
        if groups:
            out.line(f"{len(groups)} groups were measured; -v lists them")
        return
    fields = [
        ("cosines", "cos(r, v)"),
        ("kappa", "κ"),
        ("protected_cosine", "cos(s, protected)"),
        ("conflict", "conflict"),
        ("removed", "removed"),
        ("control", "random"),
        ("alpha", "α"),
        ("effective_alpha", "effective α"),
    ]
    first = next(iter(groups.values()))
    shown = [(field, title) for field, title in fields if field in first]
    out.line("")
    out.table(
        ["group", "tensors", *(title for _, title in shown)],
        [
            (name, f"{group['tensors']:,}", *(_group_cell(group[field]) for field, _ in shown))
            for name, group in groups.items()
        ],
    )
    out.line("")


def _as_dict(groups: list[GroupRecord]) -> dict[str, dict[str, object]] | None:
    """Return the groups as plain values; nothing where they are measured at the run only."""
    return {each.name: each.as_dict() for each in groups} or None


def _group_cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(_group_cell, value))
    return number(value if isinstance(value, float) else None, ".4g")


def _alphas(counts: dict[float, int]) -> str:
    """Say which α how many tensors get: all values, or their range."""
    if len(counts) == 1:
        return number(next(iter(counts)), "g")
    if len(counts) > _LISTED_ALPHAS:
        return f"{min(counts):g} to {max(counts):g}, {len(counts)} values; -v lists them"
    return ", ".join(f"{alpha:g} for {count:,}" for alpha, count in sorted(counts.items()))


def show_report(out: Output, report: MergeReport) -> None:
    """Print what a run did."""
    if out.as_json:
        out.data(
            {
                "output": str(report.output),
                "summary": report.summary.as_dict(),
                "written_bytes": report.written,
                "seconds": report.seconds,
                "resumed_shards": report.resumed,
                "warnings": report.warnings,
                **({"groups": report.groups} if report.groups else {}),
                **({"tensors": report.tensors} if out.verbose else {}),
            }
        )
        return
    if not out.quiet:
        if out.verbose:
            ranked = any("rank" in record for record in report.tensors.values())
            columns = ["tensor", "operation", "‖v‖", "‖v‖/‖θᵤ‖", "effective α", "changed"]
            out.table(
                [*columns, *(["rank", "energy"] if ranked else [])],
                [_tensor_row(name, record, ranked) for name, record in report.tensors.items()],
            )
            out.line("")
        _show_groups(out, report.groups)
        rows = [("output", str(report.output)), *report.summary.rows()]
        rows.append(("written", f"{size(report.written)} in {report.seconds:.1f} s"))
        if report.resumed:
            rows.append(("shards kept from an interrupted run", f"{report.resumed:,}"))
        out.fields(rows)
    out.warn(report.warnings)


def _tensor_row(name: str, record: dict[str, object], ranked: bool) -> tuple[str, ...]:
    def shown(field: str, form: str = ".3g") -> str:
        value = record.get(field)
        return number(value if isinstance(value, float) else None, form)

    return (
        name,
        str(record["operation"]),
        shown("norm"),
        shown("ratio"),
        shown("effective_alpha", ".4g"),
        shown("share_changed", ".2%"),
        *((str(record.get("rank", "–")), shown("energy", ".4g")) if ranked else ()),
    )
