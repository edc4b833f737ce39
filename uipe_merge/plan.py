"""The plan: everything a run will do, as plain data, made from headers alone.

Every tensor gets one step with its operation, its coefficient, its source ranges and its
place in the output. Running the plan needs no further decision, so the same plan gives the
same bytes on any number of threads, after any interruption, on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from uipe_merge.checkpoint.adapter import ADAPTER
from uipe_merge.checkpoint.dtypes import CONVERTIBLE, OUTPUT_DTYPES, DType
from uipe_merge.checkpoint.header import ZERO, encode_header
from uipe_merge.checkpoint.index import encode_index
from uipe_merge.checkpoint.model import SINGLE_NAME, Checkpoint, ShardInput
from uipe_merge.checkpoint.pair import tied_names
from uipe_merge.coefficients import resolve
from uipe_merge.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from uipe_merge.checkpoint.decisions import Kept
    from uipe_merge.checkpoint.header import Factor, TensorSpec
    from uipe_merge.checkpoint.pair import Pairing
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

_BY_CHANCE = ("BF16", "F16")

_BASE_MEMORY = 60_000_000  # the interpreter and what it imports, measured
_TORCH_MEMORY = 190_000_000  # what importing torch adds
_NETWORK_MEMORY = 100_000_000  # the libraries of an object store, and an upload
_NAME_MEMORY = 1_500  # bytes a planned tensor holds, measured on 100 k tensors


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

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.source.elements

    def ranges(self, size: int) -> Iterator[tuple[int, int]]:
        """Cut it into ``(first element, elements)`` of at most ``size``, each in one piece."""
        seams = {*self.source.seams(), *(self.original.seams() if self.original else ())}
        for begin, end in pairwise([*sorted(seams), self.elements]):
            for start in range(begin, max(end, begin + 1), size):
                yield start, min(size, end - start)

    def at(self, start: int, count: int) -> Step:
        """Return the step of one of its ranges, with the piece of each side that it lies in."""
        original = self.original and self.original.part(start, count)
        return self._replace(source=self.source.part(start, count), original=original)


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


class Block(NamedTuple):
    """A piece of a tensor: the unit of work.

    Attributes:
        shard: Index of the shard in the plan.
        step: Index of the step in the shard.
        start: First element.
        elements: Number of elements.
        sequence: Position of the block in its shard, from 0.
        last: Whether it is the last of its shard.
    """

    shard: int
    step: int
    start: int
    elements: int
    sequence: int
    last: bool


class Plan(NamedTuple):
    """A whole merge.

    Attributes:
        recipe: What was asked for.
        shards: The output's weight files.
        original: The weight files of the original, with their fingerprints.
        unlearned: The weight files of the unlearned checkpoint.
        warnings: What the user should know before anything is written.
    """

    recipe: Recipe
    shards: list[Shard]
    original: list[ShardInput]
    unlearned: list[ShardInput]
    warnings: list[str]

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
        """Bytes of tensors read from both inputs."""
        sides = ((step.source, step.original) for step in self.steps)
        return sum(spec.nbytes for pair in sides for spec in pair if spec and spec.home != ZERO)

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
        widths = ((step.source.dtype.bits, step.dtype.bits) for step in self.steps)
        widest = max((max(pair) // 8 for pair in widths), default=0)
        # Per thread: two input blocks and one output block (over a network, two more of what just
        # came in), the cells of the arithmetic and of the norms of DoRA, and an adapter's factors
        # and scales with room for a wider type and a transposed copy.
        blocks_held = 5 if remote else 3
        cells = 13 if any(map(_has_norms, self.steps)) else 5
        beside = 4 * max(map(_beside_bytes, self.steps), default=0)
        worker = blocks_held * block * widest + cells * CELL * 8 + beside
        tensors = sum(len(shard.steps) for shard in self.shards)
        base = _BASE_MEMORY + (_TORCH_MEMORY if torch else 0) + (_NETWORK_MEMORY if remote else 0)
        return base + threads * worker + tensors * _NAME_MEMORY

    def fingerprint(self) -> str:
        """Return a digest of all that decides the bytes of the weight files."""
        digest = hashlib.sha256()
        document = {"recipe": self.recipe.canonical(), "numerics": NUMERICS}
        digest.update(json.dumps(document, sort_keys=True).encode())
        for side in (self.original, self.unlearned):
            digest.update(json.dumps(side).encode())
        for shard in self.shards:
            digest.update(f"\n{shard.name} {shard.size}\n".encode() + shard.header)
            for step in shard.steps:
                source, original = step.source, step.original
                digest.update(
                    f"{step.operation} {step.alpha.hex()} {step.from_original} "
                    f"{step.noise} {source[3:]} {original and original[3:]}\n".encode()
                )
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
    for side in (step.source, step.original):
        if side is not None and side.scales is not None:
            # Scales are spread over the elements of a cell, in whole rows.
            counts += [side.scales.values.elements, CELL + 2 * max(side.shape[-1:], default=1)]
    return 4 * sum(counts)


def _has_norms(step: Step) -> bool:
    return any(factor.magnitude is not None for factor in _factors(step))


def _factors(step: Step) -> list[Factor]:
    sides = (step.source, step.original)
    return [factor for side in sides if side is not None for factor in side.factors]


def make_plan(
    original: Checkpoint, unlearned: Checkpoint, pairing: Pairing, recipe: Recipe
) -> Plan:
    """Resolve a recipe against two matched checkpoints.

    Raises:
        UsageError: A tensor alone is larger than the largest shard asked for.
        RecipeError: A rule or the layers of the recipe match nothing.
    """
    alphas = resolve(recipe, list(pairing.pairs))
    _refuse_untying(unlearned, alphas)
    added = [name for name in pairing.kept if name not in unlearned.tensors]
    drafts = [
        _kept(name, pairing.kept[name], recipe)
        if name in pairing.kept
        else draft(name, *pairing.pairs[name], recipe, alphas[name])
        for name in [*unlearned.tensors, *added]
        if name in pairing.pairs or name in pairing.kept
    ]
    # What an adapter replaces lies in its own file, but belongs where the base has it.
    layout = {
        name: pairing.pairs[name][0].file
        if spec.home.startswith(ADAPTER) and name in pairing.pairs
        else spec.file
        for name, spec in unlearned.tensors.items()
    }
    layout |= dict.fromkeys(added, max(layout.values()))  # what only the original has comes last
    grouped = list(_layout(drafts, layout, recipe.max_shard_bytes))
    shards = [placed(name, group) for name, group in grouped]
    warnings = [*original.warnings, *unlearned.warnings, *pairing.warnings]
    return Plan(recipe, shards, original.shards, unlearned.shards, warnings)


def _refuse_untying(unlearned: Checkpoint, alphas: Mapping[str, float]) -> None:
    """Refuse two α for one parameter: a head that is stored beside the embedding it is tied to."""
    head, embedding = tied_names(unlearned)
    if head in alphas and embedding in alphas and alphas[head] != alphas[embedding]:
        raise RecipeError(
            f"'{head}' and '{embedding}' are tied, and α is {alphas[head]:g} and "
            f"{alphas[embedding]:g}",
            remedy="give both one α, or the loaded model would have either",
        )


def _kept(name: str, kept: Kept, recipe: Recipe) -> Step:
    """Carry a tensor over from one side, whatever α is."""
    spec, dtype = kept.spec, kept.spec.dtype
    if recipe.dtype != "auto" and dtype.name in CONVERTIBLE:
        dtype = OUTPUT_DTYPES[recipe.dtype]
    operation: Operation = "copy" if spec.dtype == dtype else "cast"
    nbytes = spec.elements * dtype.bits // 8
    return Step(name, operation, recipe.alpha, spec, None, dtype, 0, nbytes, kept.from_original)


def draft(
    name: str, original: TensorSpec, unlearned: TensorSpec, recipe: Recipe, alpha: float
) -> Step:
    """Decide the operation of one tensor; its place in the output is not known yet."""
    dtype = unlearned.kept_dtype
    if recipe.dtype != "auto" and dtype.name in CONVERTIBLE:
        dtype = OUTPUT_DTYPES[recipe.dtype]
    from_original = alpha == -1 and original.plain
    source = original if from_original else unlearned
    other: TensorSpec | None = None
    operation: Operation
    if not unlearned.dtype.computes:
        operation = "copy" if from_original else "keep"
        other = None if from_original else original
        dtype = source.dtype
    elif (alpha == 0 or from_original) and source.plain:
        stored = {piece.dtype for piece in source.pieces or (source,)}
        operation = "copy" if stored == {dtype} else "cast"
    else:
        operation, other = "extrapolate", original
    nbytes = source.elements * dtype.bits // 8
    noise: int | None = None
    if recipe.rounding == "stochastic" and operation == "extrapolate" and dtype.name in _BY_CHANCE:
        noise = _noise_key(recipe.seed, name)
    return Step(name, operation, alpha, source, other, dtype, 0, nbytes, from_original, noise)


def _noise_key(seed: int, name: str) -> int:
    """Return the 64-bit key of one tensor's noise; see ``arithmetic.noise``."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def _layout(
    drafts: list[Step], layout: Mapping[str, str], limit: int | None
) -> Iterator[tuple[str, list[Step]]]:
    """Group the tensors into named shards: the unlearned layout, or filled up to a limit."""
    if limit is None:
        groups: dict[str, list[Step]] = {}
        for step in drafts:
            groups.setdefault(_output_name(layout[step.name]), []).append(step)
        if len(groups) == 1:
            groups = {SINGLE_NAME: drafts}
        yield from groups.items()
        return
    too_large = max(drafts, key=lambda step: step.nbytes)
    if too_large.nbytes > limit:
        raise UsageError(
            f"has {too_large.nbytes} bytes, more than the largest shard of {limit}",
            tensor=too_large.name,
            remedy=f"raise --max-shard-size to at least {too_large.nbytes}",
        )
    filled: list[list[Step]] = [[]]
    size = 0
    for step in drafts:
        if filled[-1] and size + step.nbytes > limit:
            filled.append([])
            size = 0
        filled[-1].append(step)
        size += step.nbytes
    if len(filled) == 1:
        yield SINGLE_NAME, drafts
        return
    for number, group in enumerate(filled, 1):
        yield f"model-{number:05d}-of-{len(filled):05d}.safetensors", group


def _output_name(file: str) -> str:
    """Return the name of an output shard laid out like the input ``file``."""
    if not file.endswith(".bin"):
        return file
    return f"{file.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"


def placed(name: str, drafts: list[Step]) -> Shard:
    """Give every tensor of a shard its offset."""
    header = encode_header(
        (step.name, step.dtype, step.source.shape, step.nbytes) for step in drafts
    )
    steps: list[Step] = []
    position = len(header)
    for step in drafts:
        steps.append(Step(*step[:6], position, *step[7:]))
        position += step.nbytes
    return Shard(name, header, steps, position)


def shard_blocks(plan: Plan, shard: int, size: int = BLOCK) -> Iterator[Block]:
    """Cut one shard into blocks of at most ``size`` elements (a multiple of ``CELL``)."""
    steps = plan.shards[shard].steps
    sequence = 0
    for index, step in enumerate(steps):
        # An empty tensor still is a block, so that it is counted and recorded.
        for start, count in step.ranges(size):
            last = index == len(steps) - 1 and start + count == step.elements
            yield Block(shard, index, start, count, sequence, last)
            sequence += 1


def blocks(plan: Plan, shards: Iterable[int], width: int, size: int = BLOCK) -> Iterator[Block]:
    """Interleave the blocks of ``width`` shards at a time.

    The bytes of one file are hashed in their order, by one thread at a time; working on as
    many files as there are threads keeps the threads from waiting for one another.
    """
    waiting = iter(shards)
    active: list[Iterator[Block]] = []
    while True:
        while len(active) < width and (shard := next(waiting, None)) is not None:
            active.append(shard_blocks(plan, shard, size))
        if not active:
            return
        for stream in list(active):
            block = next(stream, None)
            if block is None:
                active.remove(stream)
            else:
                yield block
