"""From a plan that names directions to one whose steps are literals: the passes in between."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.output.journal import Memo
from uipe_merge.resolving import GroupRecord, Products, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from uipe_merge.arithmetic.terms import Vector
    from uipe_merge.decomposing import Factors
    from uipe_merge.executors import Executor
    from uipe_merge.job import Job
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.plan import Plan
    from uipe_merge.progress import Progress
    from uipe_merge.reader import Pair


class Settled(NamedTuple):
    """A plan that can be run.

    Attributes:
        plan: With the terms of every step.
        pair: Where to read.
        groups: What was measured, group by group.
        ranks: Rank and share of ‖v‖² of the tensors whose update was cut to a part of its rank.
    """

    plan: Plan
    pair: Pair
    groups: list[GroupRecord]
    ranks: dict[str, dict[str, object]]


def settle_all(
    jobs: Sequence[Job],
    directory: Path,
    filesystem: FileSystem,
    executor: Executor,
    progress: Progress,
) -> list[Settled]:
    """Settle several jobs that read the same checkpoints, as ``settle``.

    What is measured serves all that measure the same tensors. The pair of the last one has what
    the plans of all of them read.
    """
    settled: list[Settled] = []
    places: dict[tuple[str, ...], Path] = {}
    known: dict[Path, Factors] = {}
    pair = jobs[0].pair
    for job in jobs:
        # α = 0 takes a tensor out of what is measured.
        grouped = tuple(step.name for step in job.plan.steps if step.group)
        if grouped and grouped not in places:
            places[grouped] = directory / str(len(places)) if places else directory
            if places[grouped] != directory:
                filesystem.make_directory(directory)
        place = places.get(grouped, directory)
        job = replace(job, pair=pair)  # noqa: PLW2901 - with the factors found so far
        found = settle(job, place, filesystem, executor, progress, known)
        pair = found.pair
        settled.append(found)
    return settled


def settle(
    job: Job,
    directory: Path,
    filesystem: FileSystem,
    executor: Executor,
    progress: Progress,
    known: dict[Path, Factors] | None = None,
) -> Settled:
    """Measure what the steps depend on, or find it measured by an earlier run; then resolve them.

    Args:
        job: The merge.
        directory: Where what is measured is kept; it is made where it is needed.
        filesystem: How to write there.
        executor: On what to run.
        progress: Told of every block.
        known: Factors that were found for other jobs, by directory; the job's pair has them.

    Raises:
        NumericError: A value is not finite, or a coefficient is too large.
        CorruptInputError: An input changed or ended early.
    """
    known = {} if known is None else known
    plan, pair = job.plan, job.pair
    if plan.directions is None:
        return Settled(plan, pair, [], {})
    directions: Mapping[str, Vector] = {}
    ranks: dict[str, dict[str, object]] = {}
    factors = ""
    steering = plan.recipe.steering
    if not any(step.group for step in plan.steps):  # every α is 0
        return Settled(resolve(plan, {}, {})[0], pair, [], {})
    if steering.measured or steering.low_rank:
        filesystem.make_directory(directory)
        filesystem.sync_directory(directory.parent)
    if steering.low_rank:
        from uipe_merge.decomposing import decompose  # imports numpy, as measuring does

        if directory not in known:
            known[directory] = decompose(
                plan, pair, directory, filesystem, executor, progress, device=job.device
            )
            pair = pair._replace(further=(*pair.further, known[directory].checkpoint))
        _, _, ranks, factors = known[directory]
        plan, directions = known[directory].attached(plan)
    products: Products = {}
    if steering.measured:
        from uipe_merge.measuring import key_of, measure, to_measure

        measured = to_measure(plan, directions)
        # A control measures one vector more: both are kept, for a grid of both.
        name = "products" if steering.control == "none" else "products-control"
        memo, key = Memo(filesystem, directory / name), key_of(measured, pair, factors)
        kept = memo.recall(key)
        if kept is None:
            products = measure(measured, pair, executor, progress, job.block)
            memo.keep(key, products)
        else:
            products = {name: tuple(row) for name, row in kept.items()}
    resolved, groups = resolve(plan, products, directions)
    return Settled(resolved, pair, groups, ranks)


def preview(job: Job, executor: Executor, progress: Progress) -> list[GroupRecord]:
    """Measure without writing anything; nothing where factors would have to be kept first."""
    if job.plan.directions is None or not job.plan.recipe.steering.measured:
        return []
    if job.plan.recipe.steering.low_rank:
        return []
    from uipe_merge.measuring import measure, to_measure

    measured = to_measure(job.plan, {})
    _, groups = resolve(job.plan, measure(measured, job.pair, executor, progress, job.block), {})
    return groups
