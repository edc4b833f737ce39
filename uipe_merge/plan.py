"""The plan: everything a run will do, as plain data, made from headers alone.

Every tensor gets one step with its operation, its coefficient, its source ranges and its
place in the output. Running the plan needs no further decision, so the same plan gives the
same bytes on any number of threads, after any interruption, on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from uipe_merge.checkpoint.header import ZERO
from uipe_merge.checkpoint.index import encode_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uipe_merge.arithmetic.terms import Arithmetic, Term, Vector
    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.checkpoint.header import Factor, TensorSpec
    from uipe_merge.checkpoint.model import ShardInput
    from uipe_merge.recipe import Recipe

Operation = Literal["copy", "keep", "cast", "extrapolate"]
"""What is done with a tensor.

``copy``: bytes of one input. ``keep``: bytes of the unlearned one, compared with the
original's (integers, booleans). ``cast``: one input, converted. ``extrapolate``: θᵤ + α·v.
"""

CELL = 2**17
"""Elements that go through the arithmetic at a time: the buffers stay in a core's cache.

It is part of the numbers that are reported (moments are summed cell by cell), so it is a
constant and not an option.
"""

BLOCK = 8 * CELL
"""Elements that are read and written at a time."""

NUMERICS = 1
"""Version of the arithmetic; raised when the bytes it produces change."""

_BASE_MEMORY = 60_000_000  # the interpreter and what it imports, measured
_TORCH_MEMORY = 190_000_000  # what importing torch adds
_NETWORK_MEMORY = 100_000_000  # the libraries of an object store, and an upload
_NAME_MEMORY = 1_500  # bytes a planned tensor holds, measured on 100 k tensors


class Operand(NamedTuple):
    """A tensor of one of the checkpoints that a step is made of.

    Attributes:
        side: Whose it is: 0 for the original, 1 for the unlearned checkpoint, further ones follow.
        spec: The tensor.
        noise: The key of the random numbers that are added to it; ``None`` for none.
    """

    side: int
    spec: TensorSpec
    noise: int | None = None


class Step(NamedTuple):
    """What happens to one tensor.

    Attributes:
        name: Its name in the output.
        operation: See ``Operation``.
        alpha: The coefficient α of this tensor.
        source: The tensor whose bytes are copied, kept or cast; θᵤ for ``extrapolate``.
        original: θ₀, where the operation reads it too.
        dtype: Element type in the output.
        offset: Position of its first byte in the output shard.
        nbytes: Its length there.
        from_original: Whether ``source`` belongs to the original checkpoint.
        noise: The key of the noise that rounds it by chance; ``None`` rounds to nearest.
        further: The operands after θ₀ and θᵤ.
        terms: What is added to θᵤ; nothing stands for α·v.
        group: Over what its inner products are taken; empty where there are none.
        parameter: The tensor that it is tied to, else its own name: what is drawn by chance is
            drawn for that.
        arithmetic: How its sum is formed.
        weight: w, for ``task``.
    """

    name: str
    operation: Operation
    alpha: float
    source: TensorSpec
    original: TensorSpec | None
    dtype: DType
    offset: int
    nbytes: int
    from_original: bool
    noise: int | None = None
    further: tuple[Operand, ...] = ()
    terms: tuple[Term, ...] = ()
    group: str = ""
    parameter: str = ""
    arithmetic: Arithmetic = "wider"
    weight: float = 0.0

    @property
    def operands(self) -> list[Operand]:
        """θ₀, θᵤ and what follows, of a step that extrapolates."""
        assert self.original is not None  # noqa: S101 - the plan gives it for this operation
        side = 0 if self.from_original else 1
        return [Operand(0, self.original), Operand(side, self.source), *self.further]

    @property
    def sides(self) -> list[Operand]:
        """All that it reads."""
        if self.original is not None:
            return self.operands
        return [Operand(0 if self.from_original else 1, self.source)]

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors that it reads."""
        specs = [self.source] if self.original is None else [self.original, self.source]
        if self.further:
            specs += [operand.spec for operand in self.further]
        return specs

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.source.elements

    @property
    def changed(self) -> bool:
        """Whether a side is not what is stored: scales are multiplied in, or factors added."""
        if not (self.source.plain and (self.original is None or self.original.plain)):
            return True
        return bool(self.further) and any(not each.spec.plain for each in self.further)

    def at(self, start: int, count: int) -> Step:
        """Return the step of one of its ranges, with the piece of each side that it lies in."""
        original = self.original and self.original.part(start, count)
        step = self._replace(source=self.source.part(start, count), original=original)
        if not self.further:
            return step
        parts = (each._replace(spec=each.spec.part(start, count)) for each in self.further)
        return step._replace(further=tuple(parts))


class Shard(NamedTuple):
    """One output file.

    Attributes:
        name: File name.
        header: Its first bytes.
        steps: Its tensors, in the order of their bytes.
        size: Its length in bytes.
    """

    name: str
    header: bytes
    steps: list[Step]
    size: int


class Directions(NamedTuple):
    """The updates that a step is made of or held against, as differences of sides.

    Attributes:
        along: The related updates.
        away: The protected one, or θ₀ itself.
        add: Further updates with their coefficients β.
    """

    along: tuple[Vector, ...] = ()
    away: Vector | None = None
    add: tuple[Term, ...] = ()


class Plan(NamedTuple):
    """A whole merge.

    Attributes:
        recipe: What was asked for.
        shards: The output's weight files.
        original: The weight files of the original, with their fingerprints.
        unlearned: The weight files of the unlearned checkpoint.
        warnings: What the user should know before anything is written.
        further: The weight files of every further checkpoint.
        directions: What its steps are made of, if it is more than α·v. The steps' terms are
            empty until inner products have been measured.
    """

    recipe: Recipe
    shards: list[Shard]
    original: list[ShardInput]
    unlearned: list[ShardInput]
    warnings: list[str]
    further: tuple[list[ShardInput], ...] = ()
    directions: Directions | None = None

    @property
    def steps(self) -> Iterator[Step]:
        """All steps, shard by shard."""
        return (step for shard in self.shards for step in shard.steps)

    @property
    def write_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that the writing pass reads from all inputs."""
        specs = (spec for step in self.steps for spec in step.specs)
        return sum(spec.nbytes for spec in specs if spec.home != ZERO)

    def alphas(self) -> dict[float, int]:
        """Return how many tensors get each α, whether or not it makes them a copy."""
        return Counter(step.alpha for step in self.steps if step.dtype.computes)

    def operations(self) -> dict[Operation, tuple[int, int]]:
        """Return ``(tensors, output bytes)`` by operation."""
        counts: dict[Operation, tuple[int, int]] = {}
        for step in self.steps:
            tensors, nbytes = counts.get(step.operation, (0, 0))
            counts[step.operation] = (tensors + 1, nbytes + step.nbytes)
        return counts

    def peak_memory(
        self, threads: int, *, torch: bool, block: int = BLOCK, remote: bool = False
    ) -> int:
        """Return an upper estimate of the resident bytes of a run.

        Args:
            threads: Threads that work on blocks.
            torch: Whether torch will be imported.
            block: Elements read at a time.
            remote: Whether a network is read from or written to.
        """
        steps = list(self.steps)
        sides = [spec for step in steps for spec in step.specs]
        pieces = [piece for side in sides if side.pieces for piece in side.pieces]
        dtypes = {each.dtype for each in (*sides, *pieces)} | {step.dtype for step in steps}
        widest = max((dtype.bits // 8 for dtype in dtypes), default=0)
        changed = [step for step in steps if step.changed]
        # Per thread: two input blocks and one output block (over a network, two more of what just
        # came in), the cells of the arithmetic and of the norms of DoRA, and an adapter's factors
        # and scales with room for a wider type and a transposed copy.
        further = max((len(step.further) for step in steps), default=0)
        blocks_held = (5 if remote else 3) + further
        cells = (13 if any(map(_has_norms, changed)) else 5) + (further and 4 + 2 * further)
        beside = 4 * max(map(_beside_bytes, changed), default=0)
        worker = blocks_held * block * widest + cells * CELL * 8 + beside
        tensors = sum(len(shard.steps) for shard in self.shards)
        base = _BASE_MEMORY + (_TORCH_MEMORY if torch else 0) + (_NETWORK_MEMORY if remote else 0)
        return base + threads * worker + tensors * _NAME_MEMORY

    def fingerprint(self) -> str:
        """Return a digest of all that decides the bytes of the weight files."""
        digest = hashlib.sha256()
        document = {"recipe": self.recipe.canonical(), "numerics": NUMERICS}
        digest.update(json.dumps(document, sort_keys=True).encode())
        for side in (self.original, self.unlearned, *self.further):
            digest.update(json.dumps(side).encode())
        for shard in self.shards:
            digest.update(f"\n{shard.name} {shard.size}\n".encode() + shard.header)
            for step in shard.steps:
                source, original = step.source, step.original
                digest.update(
                    f"{step.operation} {step.alpha.hex()} {step.from_original} "
                    f"{step.noise} {source[3:]} {original and original[3:]}\n".encode()
                )
                if step.arithmetic != "wider":
                    digest.update(f"{step.arithmetic} {step.weight.hex()}\n".encode())
                if step.further or step.terms:
                    further = [(side, *spec[3:], key) for side, spec, key in step.further]
                    digest.update(f"{step.group} {further} {step.terms}\n".encode())
        return digest.hexdigest()

    def index_json(self) -> bytes | None:
        """Return the bytes of the index file; ``None`` for a single weight file."""
        if len(self.shards) == 1:
            return None
        return encode_index(
            {step.name: shard.name for shard in self.shards for step in shard.steps},
            sum(step.nbytes for step in self.steps),
            sum(step.elements for step in self.steps),
        )


def _beside_bytes(step: Step) -> int:
    """Return the bytes of the factors and scales of one tensor, widened to float32."""
    counts = [part.elements for factor in _factors(step) for part in factor.tensors]
    for side in step.specs:
        if side.scales is not None:
            # Scales are spread over the elements of a cell, in whole rows.
            counts += [side.scales.values.elements, CELL + 2 * max(side.shape[-1:], default=1)]
    return 4 * sum(counts)


def _has_norms(step: Step) -> bool:
    return any(factor.magnitude is not None for factor in _factors(step))


def _factors(step: Step) -> list[Factor]:
    return [factor for spec in step.specs for factor in spec.factors]
