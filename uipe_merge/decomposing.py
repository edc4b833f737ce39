"""The coherent part of matrices' updates: the pass that finds it, and the factors it keeps.

U·P with U the leading left singular vectors of v and P = Uᵀ·v is the update of an adapter. So the
factors are written as the tensors of a checkpoint beside the output, and every later pass reads
w = 0 + U·P as it reads any adapter. A matrix is in memory as a whole, one for each thread.
"""

from __future__ import annotations

import hashlib
import json
import threading
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.arithmetic.terms import Vector
from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import ZERO, Factor, encode_header, read_header
from uipe_merge.checkpoint.model import Checkpoint, ShardInput
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.coherent import at_once, targets
from uipe_merge.once import Once
from uipe_merge.output.filesystem import write_document
from uipe_merge.output.journal import Journal, ShardRecord
from uipe_merge.output.staging import hash_file
from uipe_merge.plan import NUMERICS, Operand, Plan

if TYPE_CHECKING:
    from pathlib import Path

    from uipe_merge.arithmetic.svd import LowRank
    from uipe_merge.deltas import Growths
    from uipe_merge.executors import Executor
    from uipe_merge.matrices import Matrices
    from uipe_merge.output.filesystem import FileSystem
    from uipe_merge.plan import Step
    from uipe_merge.progress import Progress
    from uipe_merge.reader import Pair

_FLOAT = DTYPES["F32"]


class Factors(NamedTuple):
    """What was found.

    Attributes:
        checkpoint: The factors as one more checkpoint, to follow those of the pair.
        operands: w of every tensor whose direction is not v.
        records: Rank and share of ‖v‖² by tensor.
        key: A digest of all factors.
    """

    checkpoint: Checkpoint
    operands: dict[str, Operand]
    records: dict[str, dict[str, object]]
    key: str

    def attached(self, plan: Plan) -> tuple[Plan, dict[str, Vector]]:
        """Return a plan whose steps have w as their last operand, and w in terms of operands."""
        directions: dict[str, Vector] = {}

        def with_factors(step: Step) -> Step:
            operand = self.operands.get(step.name)
            if operand is None or not step.group:
                return step
            directions[step.name] = Vector(2 + len(step.further), -1)
            return step._replace(further=(*step.further, operand))

        shards = [
            shard._replace(steps=list(map(with_factors, shard.steps))) for shard in plan.shards
        ]
        return plan._replace(shards=shards), directions


def decompose(
    plan: Plan,
    pair: Pair,
    directory: Path,
    filesystem: FileSystem,
    executor: Executor,
    progress: Progress,
    *,
    device: str = "cpu",
) -> Factors:
    """Find the factors of all targets, or what an earlier run left to be found.

    Args:
        plan: A plan with groups.
        pair: Where to read.
        directory: Where the factors are kept; it exists.
        filesystem: How to write them.
        executor: On what to run; every worker holds a matrix.
        progress: Told of every matrix.
        device: Where the singular vectors are found.

    Raises:
        NumericError: A value is not finite.
        RecipeError: No matrix is in a layer.
    """
    todo = targets(plan)
    identity: dict[str, object] = {"key": _key(plan, pair, todo)}
    journal = Journal(filesystem, directory / "factors")
    kept = journal.shards() if journal.identity() == identity else {}
    done = {
        name: record
        for name, record in kept.items()
        if hash_file(directory / name) == (record.size, record.sha256)
    }
    journal.begin(identity, done.values())
    progress.start(sum(step.source.nbytes for step in todo))
    growths: Growths = Once()
    turns = threading.Semaphore(at_once())

    def make_worker() -> FactorsWorker:
        from uipe_merge.matrices import Matrices  # imports torch

        return FactorsWorker(Matrices(plan, pair, growths, device), directory, filesystem, turns)

    left = [item for item in enumerate(todo) if _file(item[0]) not in done]
    for step in (step for number, step in enumerate(todo) if _file(number) in done):
        progress.advance(step.source.nbytes, f"factors of {step.name}")
    for step, record in executor.run(make_worker, left):
        journal.finish_shard(record)
        done[record.name] = record
        progress.advance(step.source.nbytes, f"factors of {step.name}")
    return _found(len(pair.sides), directory, todo, done)


class FactorsWorker:
    """Decomposes the updates of one thread, one tensor at a time."""

    def __init__(
        self,
        matrices: Matrices,
        directory: Path,
        filesystem: FileSystem,
        turns: threading.Semaphore,
    ) -> None:
        """Take the matrices of one thread; as many workers as ``turns`` allows have one in hand."""
        self._matrices = matrices
        self._directory = directory
        self._filesystem = filesystem
        self._turns = turns

    def __call__(self, item: tuple[int, Step]) -> tuple[Step, ShardRecord]:
        """Find and write the factors of one tensor."""
        with self._turns:
            return self._write(*item)

    def close(self) -> None:
        """Close the input files."""
        self._matrices.close()

    def _write(self, number: int, step: Step) -> tuple[Step, ShardRecord]:
        step = step._replace(further=())
        *stack, rows, columns = step.source.shape
        found = [
            self._matrices.decompose(step, number, self._matrices.load(step, number))
            for number in range(stack[0] if stack else 1)
        ]
        rank = max(each.left.shape[1] for each in found)
        content = _encoded(found, rank, rows, columns)
        name = _file(number)
        draft = self._directory / f"{name}.tmp"
        write_document(self._filesystem, draft, content)
        self._filesystem.rename(draft, self._directory / name)
        self._filesystem.sync_directory(self._directory)
        most = max(each.iterations for each in found)
        least = min(each.energy for each in found)
        digest = hashlib.sha256(content).hexdigest()
        return step, ShardRecord(name, len(content), digest, [[rank, least, most]])


def _encoded(found: list[LowRank], rank: int, rows: int, columns: int) -> bytes:
    """Return the factors of a stack as a safetensors file, laid out as PEFT's.

    The expert is the slower index of the rows of the right factor and the faster one of the
    columns of the left. A matrix of smaller rank than others of the stack is filled up with zeros.
    """
    import torch

    left = torch.zeros((rows, rank, len(found)))
    right = torch.zeros((len(found), rank, columns))
    for number, each in enumerate(found):
        left[:, : each.left.shape[1], number] = each.left  # from the device, where there is one
        right[number, : each.left.shape[1]] = each.right
    parts = [("left", left.reshape(rows, -1)), ("right", right.reshape(-1, columns))]
    header = encode_header(
        (name, _FLOAT, tuple(part.shape), part.numel() * 4) for name, part in parts
    )
    return header + b"".join(part.contiguous().numpy().tobytes() for _, part in parts)


def _found(side: int, directory: Path, todo: list[Step], done: dict[str, ShardRecord]) -> Factors:
    """Return the factors of all targets; ``side`` is what their checkpoint will be."""
    folder = LocalFolder(str(directory))
    shards: list[ShardInput] = []
    operands: dict[str, Operand] = {}
    records: dict[str, dict[str, object]] = {}
    for number, step in enumerate(todo):
        name = _file(number)
        [[rank, energy, iterations]] = [row for row in done[name].moments if row]
        records[step.name] = {"rank": int(rank), "energy": energy, "iterations": int(iterations)}
        if not rank:  # v = 0, and so is w
            continue
        file = folder.open_file(name)
        try:
            header = read_header(file, name)
        finally:
            file.close()
        shards.append(ShardInput(name, file.stamp, header.sha256))
        factors = {spec.name: spec for spec in header.tensors}
        experts = step.source.elements // (step.source.shape[-1] * step.source.shape[-2])
        factor = Factor(
            factors["left"], factors["right"], transposed=False, scale=1.0, experts=experts
        )
        bare = step.source._replace(file="", offset=0, home=ZERO, pieces=(), scales=None)
        operands[step.name] = Operand(side, bare._replace(factors=(factor,)))
    checkpoint = Checkpoint(folder, [], shards, {}, {}, [], {"": folder})
    digests = [(step.name, done[_file(number)].sha256) for number, step in enumerate(todo)]
    key = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return Factors(checkpoint, operands, records, key)


def _file(number: int) -> str:
    return f"{number:06d}.safetensors"


def _key(plan: Plan, pair: Pair, todo: list[Step]) -> str:
    """Return a digest of all that decides the factors; no coefficient is among it."""
    recipe = plan.recipe
    document: list[object] = [NUMERICS, pair.locations, plan.original, plan.unlearned]
    document += [recipe.steering.rank, recipe.steering.energy, recipe.seed]
    document += [[step.name, step.source[1:], step.original and step.original[1:]] for step in todo]
    return hashlib.sha256(json.dumps(document, default=str).encode()).hexdigest()
