"""What ``--model_args`` of ``--model uipe`` may say, checked before anything is read.

lm_eval splits them at commas and guesses kinds by the look of a word, so a directory called 2024
arrives as a number, and α as whatever it looks like.
"""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.models.huggingface import HFLM

from uipe_merge import api
from uipe_merge.errors import RecipeError, UsageError
from uipe_merge.steering import NUMBER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uipe_merge.checkpoint.decisions import Decision
    from uipe_merge.recipe import Recipe, Rounding

PathLike = str | os.PathLike[str]

NAME = "uipe"

_MAKING = frozenset(["attn_implementation", "experts_implementation"])
"""Arguments that transformers gets with the tensors."""

_REFUSED = frozenset(
    [
        # What the two checkpoints answer.
        *("pretrained", "revision", "subfolder", "gguf_file", "peft", "delta"),
        "trust_remote_code",  # code from a checkpoint is never run
        # What would give parameters other memory, or other bits.
        *("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan"),
        *("autogptq", "gptqmodel"),
    ]
)
"""Arguments of lm_eval's ``hf`` that this one does not take."""

_LONGEST = 60
"""Bytes of a part of a name: the whole must be one of a directory."""

_REMEDY = "write the model with merge, and evaluate it by --model hf"


class Asked(NamedTuple):
    """The arguments of a model, checked.

    Attributes:
        recipe: α, and what else makes the step.
        options: Those that lm_eval's ``hf`` gets.
        making: Those that transformers gets with the tensors.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
        threads: Threads that make the model.
    """

    recipe: Recipe
    options: dict[str, object]
    making: dict[str, Any]
    allow_pickle: bool
    dequantize: bool
    threads: int | None


def check(  # noqa: PLR0913 - one keyword argument an option of the merge
    original: PathLike | None = None,
    unlearned: PathLike | None = None,
    alpha: float | str | None = None,
    *,
    recipe: PathLike | None = None,
    dtype: str = "auto",
    rounding: Rounding = "nearest",
    seed: int = 0,
    on_mismatch: Decision = "error",
    dequantize: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    model: str | None = None,  # noqa: ARG001 - read by lm_eval, before and after
    **options: object,
) -> Asked:
    """Check the arguments of ``UipeLM``, which are these, without looking at the checkpoints.

    Args:
        original: The original checkpoint θ₀, as for ``merge``: a directory, or the id of a hub.
        unlearned: The unlearned checkpoint θᵤ, likewise, or an adapter. Its tokenizer is used.
        alpha: α, dimensionless; a number, or a text that is one.
        recipe: A recipe file that says α and all that makes a step, instead.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``: that of the model.
        rounding: ``nearest`` or ``stochastic``.
        seed: Of what is drawn by chance.
        on_mismatch: What becomes of tensors that the two do not have alike.
        dequantize: Take block-scaled FP8 checkpoints.
        allow_pickle: Read ``pytorch_model*.bin`` where there is no safetensors file.
        threads: Threads that make the model; changes no bit.
        model: What lm_eval calls the model where it writes results; it looks for this argument
            itself, and makes up a name where there is none.
        options: Those of lm_eval's ``hf``, such as ``device``, ``batch_size``, ``max_length``,
            ``add_bos_token`` and ``tokenizer``, and ``attn_implementation``.

    Raises:
        UsageError: One is missing, unknown, or of a kind that makes no sense here.
        RecipeError: α is no number, or the recipe cannot be used.
        NumericError: An α is too large.
    """
    own = {name: value for name, value in options.items() if name not in _MAKING}
    known = _own_options(own)
    if original is None or unlearned is None:
        raise UsageError(
            f"--model {NAME} needs two checkpoints",
            remedy="give original=DIR,unlearned=DIR,alpha=2 as --model_args",
        )
    if alpha is None and recipe is None:
        raise UsageError("no alpha", remedy="add alpha=2 to --model_args, or recipe=FILE")
    for name, value, kinds in (
        ("original", original, (str, os.PathLike)),
        ("unlearned", unlearned, (str, os.PathLike)),
        ("recipe", recipe, (str, os.PathLike, type(None))),
        ("dtype", dtype, (str,)),
        ("rounding", rounding, (str,)),
        ("on_mismatch", on_mismatch, (str,)),
        ("seed", seed, (int,)),
        ("threads", threads, (int, type(None))),
        ("dequantize", dequantize, (bool,)),
        ("allow_pickle", allow_pickle, (bool,)),
    ):
        _require_kind(name, value, kinds)
    made = api.make_recipe(
        alpha=None if alpha is None else _number(alpha),
        dtype=dtype,
        on_mismatch=on_mismatch,
        rounding=rounding,
        seed=seed,
        recipe=recipe,
    )
    if made.form != "model":
        raise UsageError(
            "an adapter cannot be loaded as a model", remedy="leave out `as`, or use merge"
        )
    making = {name: options[name] for name in _MAKING & options.keys()}
    return Asked(made, known, making, allow_pickle, dequantize, threads)


def name_of(arguments: Mapping[str, object]) -> str:
    """Return a name that tells results of one α from another's, fit for a directory.

    Args:
        arguments: Those of ``check``, checked.
    """
    original, unlearned, recipe = (
        Path(str(arguments.get(key))).absolute().name.encode()[:_LONGEST].decode(errors="ignore")
        for key in ("original", "unlearned", "recipe")
    )
    alpha = arguments.get("alpha")
    step = recipe if alpha is None else f"alpha-{alpha}"
    return f"{NAME}-{original}-{unlearned}-{step}"


def _require_kind(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """Refuse what lm_eval took for something else: it guesses kinds by the look of a word.

    Raises:
        UsageError: See above.
    """
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return
    if str in kinds:
        remedy = f"write a path as ./{value}" if isinstance(value, int | float) else "give a text"
    else:
        remedy = "give true or false" if bool in kinds else "give a whole number"
    raise UsageError(f"{name} is {value!r}", remedy=remedy)


def _number(alpha: object) -> float:
    """Return α, which lm_eval gives as a number, or as a text where it was quoted.

    Raises:
        RecipeError: It is neither.
    """
    if isinstance(alpha, str) and NUMBER.fullmatch(alpha):
        return float(alpha)
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        return float(alpha)
    raise RecipeError(f"alpha is {alpha!r}", remedy="give a number, for example alpha=2")


def _own_options(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options that lm_eval's ``hf`` gets.

    Raises:
        UsageError: One is not for this model, or unknown.
    """
    known = inspect.signature(HFLM.__init__).parameters.keys() - {"self", "kwargs"}
    for name, value in options.items():
        if name in _REFUSED and value:
            raise UsageError(f"--model {NAME} takes no {name}", remedy=_remedy(name))
        if name not in known:
            own = inspect.signature(check).parameters.keys() - {"options"} | _MAKING
            near = difflib.get_close_matches(name, sorted((known | own) - _REFUSED), 1)
            remedy = f"did you mean {near[0]}?" if near else _REMEDY
            raise UsageError(f"--model {NAME} takes no {name}", remedy=remedy)
    return {name: value for name, value in options.items() if name not in _REFUSED}


def _remedy(name: str) -> str:
    """Return what to do instead of giving an argument that is not taken."""
    if name == "trust_remote_code":
        return f"code from a checkpoint is never run; leave it out, or {_REMEDY}"
    if name == "revision":
        return "name the checkpoint as ORG/NAME@REVISION"
    if name == "pretrained":
        return "give original=DIR,unlearned=DIR"
    return _REMEDY
