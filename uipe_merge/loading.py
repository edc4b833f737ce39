"""A model at any α in memory, without writing it, and moved to another α where it lies.

The plan is that of ``merge``, and so is the arithmetic, block by block; only the bytes go into
tensors instead of shards. transformers makes the model of these tensors as it makes one of a
checkpoint (``from_pretrained(None, state_dict=…)``), renaming and fusing as its version does.
Which parameter a tensor became is then seen, not guessed: the parameter lies in the tensor's own
memory. Such parameters are moved in place. What transformers converted (stacked, or cast to the
dtype of the configuration) has other memory, and is moved by way of a second conversion.

Memory: one model and a few blocks; what is converted is held twice while it is loaded or moved.
"""

from __future__ import annotations

import math
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_merge.api import make_recipe
from uipe_merge.checkpoint.pair import tied_names
from uipe_merge.errors import IncompatibleModelsError, UsageError, listed
from uipe_merge.filling import Place, Source, lay_out, outline, recognised
from uipe_merge.making import Maker, make_maker
from uipe_merge.opening import locations
from uipe_merge.steering import PLAIN, Steering

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from uipe_merge.checkpoint.decisions import Decision
    from uipe_merge.job import Job
    from uipe_merge.recipe import Recipe, Rounding
    from uipe_merge.settling import Settled

PathLike = str | os.PathLike[str]

_REFUSED = frozenset(
    [
        # What the two checkpoints answer.
        *("config", "state_dict", "torch_dtype", "output_loading_info", "gguf_file", "variant"),
        *("revision", "subfolder", "use_safetensors", "ignore_mismatched_sizes"),
        "trust_remote_code",  # code from a checkpoint is never run
        # What would give parameters other memory, or other bits, than the tensors that are made.
        *("device_map", "max_memory", "tp_plan", "tp_size", "distributed_config", "device_mesh"),
        *("quantization_config", "key_mapping"),
    ]
)
"""Arguments of ``from_pretrained`` that are not passed on."""

_RECORD = "uipe_extrapolation"


def load(  # noqa: PLR0913 - one keyword-only argument an option of the merge
    original: PathLike,
    unlearned: PathLike,
    *,
    alpha: float | None = None,
    alpha_rules: Mapping[str, float] | None = None,
    alpha_layers: Mapping[int, float] | None = None,
    alpha_gradient: Sequence[float] = (),
    dtype: str = "auto",
    on_mismatch: Decision = "error",
    rounding: Rounding = "nearest",
    seed: int = 0,
    steering: Steering = PLAIN,
    recipe: Recipe | PathLike | None = None,
    allow_pickle: bool = False,
    dequantize: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    model_class: Any = None,  # noqa: ANN401 - a class of transformers, which has no types
    **from_pretrained: object,
) -> PreTrainedModel:
    """Return θᵤ + α·(θᵤ − θ₀) as a model of transformers; its bits are those of ``merge``.

    The model is on the processor, in evaluation mode; ``.to("cuda")`` moves it. Its method
    ``model.set_alpha(2)`` is ``set_alpha`` of this module, and ``model.uipe_extrapolation`` says
    by which recipe it is what it is, and what ``merge`` would have warned of.

    Args:
        original: The original checkpoint θ₀, as for ``merge``.
        unlearned: The unlearned checkpoint θᵤ, as for ``merge``; or an adapter.
        alpha: As for ``merge``, as is everything up to ``threads``.
        alpha_rules: α by pattern of the name that a tensor has in the checkpoint.
        alpha_layers: α by layer.
        alpha_gradient: α spread over the layers.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        on_mismatch: What becomes of tensors that the two do not have alike.
        rounding: ``nearest`` or ``stochastic``.
        seed: Of what is drawn by chance.
        steering: What else than α·v goes into the step; measured first where it must be.
        recipe: All of the above from α on, as an object or in a file.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file.
        dequantize: Take block-scaled FP8 checkpoints.
        device: Where the singular vectors of a recipe are found. The model does not go there.
        threads: Threads; changes no bit.
        model_class: What makes the model: ``AutoModelForCausalLM``, unless another is given.
        from_pretrained: More for its ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        UsageError: An argument does not go with this.
        IncompatibleModelsError: transformers cannot make the model, or the checkpoints lack
            parameters of it, which would be random numbers.
        UipeMergeError: Whatever ``merge`` would refuse.
    """
    asked = make_recipe(
        alpha=alpha,
        alpha_rules=tuple((name, float(at)) for name, at in (alpha_rules or {}).items()),
        alpha_layers=tuple((at, float(to)) for at, to in sorted((alpha_layers or {}).items())),
        alpha_gradient=tuple(map(float, alpha_gradient)),
        dtype=dtype,
        on_mismatch=on_mismatch,
        rounding=rounding,
        seed=seed,
        steering=steering,
        recipe=recipe,
    )
    if refused := sorted(_REFUSED & from_pretrained.keys()):
        raise UsageError(
            f"load takes no {listed(refused)}",
            remedy="the checkpoints say what is loaded, by code of transformers, on the processor; "
            "move the model afterwards, or give model_class",
        )
    paths = (_fixed(original), _fixed(unlearned))
    source = Source(*paths, allow_pickle, dequantize, device, threads)
    with source.settled(asked) as (job, settled, directory):
        maker = make_maker(model_class, job, directory, from_pretrained)
        places, state = lay_out(settled.plan, job.pair)
        targets = {
            step.name: state[place.name].view(-1)[place.start : place.start + step.elements]
            for step in settled.plan.steps
            for place in [places[step.name]]
        }
        warnings = source.fill(job, settled, targets)
        tied = tied_names(job.pair.unlearned)
    model, missing = maker.make(state)
    model.config.name_or_path = source.unlearned
    found, converted = recognised(model, state, missing)
    record = Extrapolation(
        asked, warnings, source, maker, outline(settled.plan), places, found, converted, tied
    )
    setattr(model, _RECORD, record)
    model.set_alpha = _Bound(model)
    return model


def set_alpha(
    model: PreTrainedModel,
    alpha: float | None = None,
    *,
    alpha_rules: Mapping[str, float] | None = None,
    alpha_layers: Mapping[int, float] | None = None,
    alpha_gradient: Sequence[float] = (),
    recipe: Recipe | PathLike | None = None,
) -> None:
    """Move a model that ``load`` made to another α, in place; its bits are those of a fresh load.

    Both checkpoints are read again. What is not about α stays as it was loaded; rules and layers
    that are not given again are gone. Parameters keep identity, device, dtype and gradient, and
    tied ones stay tied. Whatever goes wrong on the way, the model is moved back.

    Args:
        model: The model, wherever it is by now.
        alpha: α of what no rule and no layer decides.
        alpha_rules: As for ``load``, as are the following.
        alpha_layers: α by layer.
        alpha_gradient: α spread over the layers.
        recipe: All of it instead, with the same dtype.

    Raises:
        UsageError: ``load`` did not make this model, its parameters were replaced since, or the
            recipe makes other tensors.
        UipeMergeError: Whatever ``merge`` would refuse.
    """
    record = getattr(model, _RECORD, None)
    if not isinstance(record, Extrapolation):
        raise UsageError("this model was not loaded here", remedy="make it with uipe_merge.load")
    asked = make_recipe(
        alpha=alpha,
        alpha_rules=tuple((name, float(at)) for name, at in (alpha_rules or {}).items()),
        alpha_layers=tuple((at, float(to)) for at, to in sorted((alpha_layers or {}).items())),
        alpha_gradient=tuple(map(float, alpha_gradient)),
        recipe=recipe,
    )
    if recipe is None:
        asked = replace(
            record.recipe,
            alpha=asked.alpha,
            rules=asked.rules,
            layers=asked.layers,
            gradient=asked.gradient,
        )
    record.move(model, asked)


@dataclass(slots=True)
class Extrapolation:
    """How a model in memory was made; it does not hold the model.

    Attributes:
        recipe: What the model is now.
        warnings: What ``merge`` would warn of at that recipe.
        source: Where it is read from.
        maker: What makes such a model.
        outline: Shape and type of every tensor of the checkpoints.
        places: Where each is in what transformers was given.
        found: The parameter or buffer that lies in the memory of what transformers was given, by
            the name of the latter.
        converted: Parameters that lie in none of it.
        tied: A head and an embedding that are stored both, though tied; else empty.
    """

    recipe: Recipe
    warnings: list[str]
    source: Source
    maker: Maker
    outline: dict[str, tuple[tuple[int, ...], str]]
    places: dict[str, Place]
    found: dict[str, str]
    converted: list[str]
    tied: tuple[str, str]

    def move(self, model: PreTrainedModel, recipe: Recipe) -> None:
        """Make the model what ``recipe`` says, or leave it as it was.

        Raises:
            UipeMergeError: See ``set_alpha``.
        """
        with self.source.settled(recipe) as (job, settled, _):
            if outline(settled.plan) != self.outline:
                raise UsageError(
                    "this makes other tensors than those that were loaded",
                    remedy="load the model again",
                )
            parameters = self._parameters(model)
            try:
                self.warnings = self._write(parameters, job, settled)
            except BaseException:
                with suppress(Exception), self.source.settled(self.recipe) as (before, was, _):
                    self._write(parameters, before, was)
                raise
        self.recipe = recipe

    def _write(
        self, parameters: Mapping[str, torch.Tensor], job: Job, settled: Settled
    ) -> list[str]:
        import torch

        _, state = lay_out(settled.plan, job.pair)
        flat = {name: state[name].view(-1) for name in state}
        flat |= {name: parameters[where].view(-1) for name, where in self.found.items()}
        wanted = set(state) if self.converted else {*self.found, *self.tied}
        targets = {
            step.name: flat[place.name][place.start : place.start + step.elements]
            for step in settled.plan.steps
            if (place := self.places[step.name]).name in wanted
        }
        warnings = self.source.fill(job, settled, targets)
        head, embedding = self.tied
        if head and (head in self.found) != (embedding in self.found):
            one, two = flat[head], flat[embedding]
            if not torch.equal(one.to(two.device, two.dtype), two):
                raise IncompatibleModelsError(
                    f"'{head}' and '{embedding}' are stored apart and would be untied at this α, "
                    "which a loaded model cannot become",
                    remedy="load it again",
                )
        if self.converted:
            for name in self.found:  # stands in for what is in its place already: one element
                state[name] = torch.zeros((), dtype=state[name].dtype).expand(state[name].shape)
            made = self.maker.make(state)[0].state_dict()
            for name in self.converted:
                parameters[name].copy_(made[name])
        return warnings

    def _parameters(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return what is to be moved, without its history.

        Raises:
            UsageError: It is not there any more, or not as one piece of memory.
        """
        present: dict[str, torch.Tensor] = model.state_dict()
        counts = dict.fromkeys(self.converted, -1)
        for name, place in self.places.items():
            if (where := self.found.get(place.name)) is not None:
                shape, _ = self.outline[name]
                counts[where] = counts.get(where, 0) + math.prod(shape)
        lost = [
            name
            for name, count in counts.items()
            if name not in present
            or (count not in (-1, present[name].numel()))
            or not present[name].is_contiguous()
        ]
        if lost:
            raise UsageError(
                f"the model was changed since it was loaded: {listed(lost)}",
                remedy="move it before it is quantised, pruned or wrapped, or load it again",
            )
        return {name: present[name] for name in counts}


class _Bound:
    """``set_alpha`` of one model, which is not kept alive by it; a copy of the model gets its own."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - those of set_alpha
        set_alpha(self._model(), *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bound:
        return _Bound(memo.get(id(self._model())))

    def __reduce__(self) -> tuple[type[_Bound], tuple[()]]:
        return _Bound, ()  # pickled it forgets the model; set_alpha(model, …) still moves it


def _fixed(argument: PathLike) -> str:
    """Return an argument that means the same from another working directory."""
    parts = locations(argument)
    return "+".join(str(Path(part).absolute()) if Path(part).is_dir() else part for part in parts)
