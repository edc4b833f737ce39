"""From a recipe and two matched checkpoints to the plan."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.dtypes import CONVERTIBLE, OUTPUT_DTYPES
from uipe_merge.checkpoint.header import ZERO, encode_header
from uipe_merge.checkpoint.model import SINGLE_NAME, Checkpoint
from uipe_merge.checkpoint.pair import tied_names
from uipe_merge.coefficients import resolve
from uipe_merge.errors import RecipeError, UsageError, listed
from uipe_merge.naming import place, stack
from uipe_merge.plan import Directions, Operand, Operation, Plan, Shard, Step
from uipe_merge.steering import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from uipe_merge.arithmetic.terms import Arithmetic
    from uipe_merge.checkpoint.decisions import Kept
    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.checkpoint.model import ShardInput
    from uipe_merge.checkpoint.pair import Pairing
    from uipe_merge.recipe import Recipe
    from uipe_merge.steering import Granularity

_BY_CHANCE = ("BF16", "F16")


class Further(NamedTuple):
    """The checkpoints beside the two, held against the unlearned one.

    Attributes:
        specs: Their tensors by the unlearned checkpoint's names, side by side from 2 on.
        shards: Their weight files.
        directions: The updates that they make.
        warnings: What is odd about them.
    """

    specs: Mapping[int, Mapping[str, TensorSpec]]
    shards: tuple[list[ShardInput], ...]
    directions: Directions
    warnings: list[str]

    def operands(self, name: str) -> tuple[Operand, ...]:
        """Return what they have of a tensor; of one that is not extrapolated, nothing."""
        if not self.specs:
            return ()
        found = ((side, specs.get(name)) for side, specs in self.specs.items())
        return tuple(Operand(side, spec) for side, spec in found if spec is not None)


NOTHING_FURTHER = Further({}, (), Directions(), [])


def make_plan(
    original: Checkpoint,
    unlearned: Checkpoint,
    pairing: Pairing,
    recipe: Recipe,
    further: Further = NOTHING_FURTHER,
) -> Plan:
    """Resolve a recipe against two matched checkpoints.

    Args:
        original: θ₀.
        unlearned: θᵤ.
        pairing: What is done with every tensor of the two.
        recipe: What was asked for.
        further: The other checkpoints that it names.

    Raises:
        UsageError: A tensor alone is larger than the largest shard asked for.
        RecipeError: A rule or the layers of the recipe match nothing.
    """
    alphas = resolve(recipe, list(pairing.pairs))
    refuse_untying(unlearned, alphas)
    weights = {} if recipe.mergekit is None else recipe.mergekit.values(list(pairing.pairs))
    head, embedding = tied_names(unlearned)
    tied = {head: embedding}
    added = [name for name in pairing.kept if name not in unlearned.tensors]
    drafts = [
        _kept(name, pairing.kept[name], recipe)
        if name in pairing.kept
        else draft(
            name,
            *pairing.pairs[name],
            recipe,
            alphas[name],
            tied.get(name, name),
            weight=weights.get(name, 0.0),
        )
        for name in [*unlearned.tensors, *added]
        if name in pairing.pairs or name in pairing.kept
    ]
    if recipe.steering.active:
        drafts = [
            _steered(step, recipe, further.operands(step.name), tied.get(step.name, step.name))
            for step in drafts
        ]
    layout = {name: spec.file for name, spec in unlearned.tensors.items()}
    if unlearned.adapter is not None:  # what it replaces lies in its own file
        layout |= unlearned.adapter.places
    layout |= dict.fromkeys(added, max(layout.values()))  # what only the original has comes last
    grouped = list(_layout(drafts, layout, recipe.max_shard_bytes))
    shards = [placed(name, group) for name, group in grouped]
    warnings = [*original.warnings, *unlearned.warnings, *pairing.warnings, *further.warnings]
    if recipe.mergekit is not None:
        warnings += [f"{recipe.mergekit.config}: {remark}" for remark in recipe.mergekit.remarks]
        if unmatched := recipe.mergekit.unmatched(list(pairing.pairs)):
            warnings.append(f"no tensor's name has in it what is filtered by: {listed(unmatched)}")
    return Plan(
        recipe,
        shards,
        original.shards,
        unlearned.shards,
        warnings,
        further.shards,
        further.directions if recipe.steering.active else None,
    )


def refuse_untying(unlearned: Checkpoint, alphas: Mapping[str, float]) -> None:
    """Refuse two α for one parameter: a head that is stored beside the embedding it is tied to.

    Raises:
        RecipeError: They are two.
    """
    if len(set(alphas.values())) == 1:
        return
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
    nbytes = spec.elements * dtype.bits // 8
    operation = _carried(spec, dtype)
    return Step(name, operation, recipe.alpha, spec, None, dtype, 0, nbytes, kept.from_original)


def draft(
    name: str,
    original: TensorSpec,
    unlearned: TensorSpec,
    recipe: Recipe,
    alpha: float,
    parameter: str,
    *,
    weight: float = 0.0,
) -> Step:
    """Decide the operation of one tensor; its place in the output is not known yet.

    ``parameter`` is the name of the tensor that it is tied to, or its own: what is drawn by
    chance is drawn for that. ``weight`` counts for task arithmetic only.
    """
    dtype = unlearned.kept_dtype
    if recipe.dtype != "auto" and dtype.name in CONVERTIBLE:
        dtype = OUTPUT_DTYPES[recipe.dtype]
    steering = recipe.steering
    steered = steering is not PLAIN and steering.active
    arithmetic: Arithmetic = "wider" if recipe.mergekit is None else recipe.mergekit.arithmetic
    task = arithmetic == "task"  # has bits of its own for α = 0 and −1 too
    from_original = alpha == -1 and original.plain and not (steered or task)
    source = original if from_original else unlearned
    other: TensorSpec | None = None
    operation: Operation
    if not unlearned.dtype.computes:
        operation = "copy" if from_original else "keep"
        other = None if from_original else original
        dtype = source.dtype
    elif ((alpha == 0 and not (steering.add or task)) or from_original) and source.plain:
        operation = _carried(source, dtype)
    else:
        operation, other = "extrapolate", original
    nbytes = source.elements * dtype.bits // 8
    noise: int | None = None
    amplified = operation == "extrapolate" and (steered or alpha not in (0, -1))
    if recipe.rounding == "stochastic" and amplified and dtype.name in _BY_CHANCE:
        noise = noise_key(recipe.seed, parameter)
    step = Step(name, operation, alpha, source, other, dtype, 0, nbytes, from_original, noise)
    return step if arithmetic == "wider" else step._replace(arithmetic=arithmetic, weight=weight)


def _steered(step: Step, recipe: Recipe, further: tuple[Operand, ...], parameter: str) -> Step:
    """Give a step the operands that its terms may need, and the group it is measured in."""
    if step.operation != "extrapolate":
        return step
    steering = recipe.steering
    if steering.control == "random":
        key = noise_key(recipe.seed, f"control\0{parameter}")
        further = (*further, _random(step.source, key))
    group = _group(parameter, steering.granularity) if step.alpha else ""
    return step._replace(further=further, group=group, parameter=parameter)


def _random(spec: TensorSpec, key: int) -> Operand:
    """Return random numbers in the shape of a tensor."""
    bare = spec._replace(file="", offset=0, home=ZERO, factors=(), pieces=(), scales=None)
    return Operand(1, bare, key)


def _group(name: str, granularity: Granularity) -> str:
    """Return what a tensor's inner products are taken over; outside the layers it is alone."""
    layer = place(name).layer
    if granularity == "model":
        return "model"
    return name if granularity == "tensor" or layer is None else f"{stack(name)}{layer}"


def _carried(spec: TensorSpec, dtype: DType) -> Operation:
    stored = {piece.dtype for piece in spec.pieces or (spec,)}
    return "copy" if stored == {dtype} else "cast"


def noise_key(seed: int, name: str) -> int:
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
        steps.append(Step._make((*step[:6], position, *step[7:])))
        position += step.nbytes
    return Shard(name, header, steps, position)
