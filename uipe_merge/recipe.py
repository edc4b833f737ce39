"""What the user asked for: frozen, checked, and written down the same way every time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from uipe_merge.checkpoint.decisions import DECISIONS, Decision
from uipe_merge.checkpoint.dtypes import OUTPUT_DTYPES
from uipe_merge.errors import NumericError, RecipeError, UsageError
from uipe_merge.steering import NUMBER, PLAIN, Steering

if TYPE_CHECKING:
    from collections.abc import Callable

    from uipe_merge.mergekit_recipe import MergekitRecipe

ALPHA_LIMIT = 2.0**24
"""From here on θᵤ is smaller than the rounding of α·v in float32 and is lost in the sum."""

Form = Literal["model", "adapter"]
FORMS: tuple[Form, ...] = get_args(Form)
"""What may be written: a whole model, or the adapter that makes it of the original."""

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

_LAYER = re.compile(r"-?[0-9]{1,9}")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The merge θᵤ + α·(θᵤ − θ₀).

    Attributes:
        alpha: The amplification α, dimensionless, of what no rule and no layer decides. 0 is
            the unlearned model, −1 the original.
        dtype: ``auto`` (each tensor keeps the unlearned checkpoint's) or a key of
            ``OUTPUT_DTYPES``.
        max_shard_bytes: Largest output shard; ``None`` keeps the unlearned shard layout.
        on_mismatch: What becomes of tensors that the two do not have alike; see
            ``checkpoint.decisions``.
        rules: ``(pattern, α)`` for tensors whose name matches the pattern, as in a shell; the
            first that matches decides.
        layers: ``(layer, α)`` by layer, linear between, constant outside.
        gradient: α spread evenly from the first layer to the last, instead of ``layers``.
        form: One of ``FORMS``.
        rounding: One of ``ROUNDINGS``: what becomes of the digits that a 16-bit output has no
            room for.
        seed: Of the noise that rounds by chance, of a random control and of the search for
            singular vectors.
        steering: What else than α·v goes into the step.
        mergekit: What a recipe of mergekit says of α, instead of rules and layers; ``alpha`` is
            then that of a tensor in no layer that no filter matches.

    Raises:
        RecipeError: An α is not a finite number, or the layers are in no order.
        NumericError: α is so large that θᵤ would be lost in the arithmetic.
        UsageError: The dtype, the shard size or the form makes no sense.
    """

    alpha: float
    dtype: str = "auto"
    max_shard_bytes: int | None = None
    on_mismatch: Decision = "error"
    rules: tuple[tuple[str, float], ...] = ()
    layers: tuple[tuple[int, float], ...] = ()
    gradient: tuple[float, ...] = ()
    form: Form = "model"
    rounding: Rounding = "nearest"
    seed: int = 0
    steering: Steering = PLAIN
    mergekit: MergekitRecipe | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for alpha in (*self.alphas, *(beta for _, beta in self.steering.add)):
            _require_usable(alpha)
        knots = [layer for layer, _ in self.layers]
        if knots != sorted(set(knots)) or any(layer < 0 for layer in knots):
            raise RecipeError(
                f"the layers {', '.join(map(str, knots))} are not in order, each once, from 0",
                remedy="write them like 0=0,16=2,31=1",
            )
        if self.layers and self.gradient:
            raise RecipeError("has both layers and a gradient", remedy="give one of them")
        self._check_choices()
        if self.mergekit is not None and (self.form == "adapter" or self.steering.active):
            raise UsageError(
                "a recipe of mergekit makes a whole model of two, by α alone",
                remedy="name the two models and give the options instead",
            )

    def _check_choices(self) -> None:
        if self.dtype != "auto" and self.dtype not in OUTPUT_DTYPES:
            raise UsageError(
                f"unknown dtype '{self.dtype}'",
                remedy=f"choose auto or one of {', '.join(OUTPUT_DTYPES)}",
            )
        if self.on_mismatch not in DECISIONS:
            raise UsageError(
                f"unknown decision '{self.on_mismatch}' about mismatches",
                remedy=f"choose one of {', '.join(DECISIONS)}",
            )
        if self.max_shard_bytes is not None and not 0 < self.max_shard_bytes < 2**63:
            raise UsageError(
                "the largest shard holds nothing, or is no size of a file",
                remedy="give a size such as 5GB",
            )
        if not -(2**63) <= self.seed < 2**64:
            raise RecipeError("the seed is no number of 64 bits", remedy="choose a smaller one")
        if self.rounding not in ROUNDINGS:
            raise UsageError(
                f"cannot round '{self.rounding}'", remedy=f"choose one of {', '.join(ROUNDINGS)}"
            )
        if self.form not in FORMS:
            raise UsageError(
                f"cannot write '{self.form}'", remedy=f"choose one of {', '.join(FORMS)}"
            )
        if self.form == "adapter" and self.on_mismatch != "error":
            raise UsageError(
                "an adapter fits its base or it does not: there is nothing to decide",
                remedy="leave out --on-mismatch, or write a whole model with --as model",
            )
        if self.form == "adapter" and self.steering.active:
            raise UsageError(
                "an adapter is lengthened by α alone, whatever else a step may hold",
                remedy="write a whole model with --as model",
            )
        if self.form == "adapter" and self.max_shard_bytes is not None:
            raise UsageError(
                "an adapter is one file, whatever its size", remedy="leave out --max-shard-size"
            )

    @property
    def alphas(self) -> list[float]:
        """Every α that is named."""
        named = [alpha for _, alpha in (*self.rules, *self.layers)]
        if self.mergekit is not None:
            named += self.mergekit.named
        return [self.alpha, *named, *self.gradient]

    def rest(self) -> tuple[object, ...]:
        """Return all but α."""
        named = (self.dtype, self.max_shard_bytes, self.on_mismatch)
        values = (self.rules, self.layers, self.gradient, self.form, self.rounding, self.seed)
        return (*named, *values, self.steering)

    def words(self, name: Callable[[str], str] = str) -> list[str]:
        """Return the options of the command line that say the same.

        Args:
            name: Gives the name to write for a further checkpoint.
        """
        words = ["--alpha", _exact(self.alpha)] if self.mergekit is None else []
        for pattern, alpha in self.rules:
            words += ["--alpha-rule", f"{pattern}={_exact(alpha)}"]
        if self.layers:
            knots = (f"{layer}={_exact(alpha)}" for layer, alpha in self.layers)
            words += ["--alpha-layers", ",".join(knots)]
        if self.gradient:
            words += ["--alpha-gradient", ",".join(map(_exact, self.gradient))]
        if self.dtype != "auto" and self.mergekit is None:
            words += ["--dtype", self.dtype]
        if self.max_shard_bytes is not None:
            words += ["--max-shard-size", str(self.max_shard_bytes)]
        if self.on_mismatch != "error":
            words += ["--on-mismatch", self.on_mismatch]
        if self.form != "model":
            words += ["--as", self.form]
        if self.rounding != "nearest":
            words += ["--rounding", self.rounding]
        if self.seed:
            words += ["--seed", str(self.seed)]
        return words + self.steering.words(name)

    def canonical(self) -> dict[str, object]:
        """Return the recipe as plain values, α as an exact hexadecimal float."""
        return {
            "alpha": float(self.alpha).hex(),
            "dtype": self.dtype,
            "max_shard_bytes": self.max_shard_bytes,
            "on_mismatch": self.on_mismatch,
            "rules": [[pattern, float(alpha).hex()] for pattern, alpha in self.rules],
            "layers": [[layer, float(alpha).hex()] for layer, alpha in self.layers],
            "gradient": [float(alpha).hex() for alpha in self.gradient],
            "as": self.form,
            "rounding": self.rounding,
            "seed": self.seed,
            **self.steering.canonical(),
            **({} if self.mergekit is None else {"mergekit": self.mergekit.canonical()}),
        }


def _exact(alpha: float) -> str:
    return repr(float(alpha)).removesuffix(".0")


def _require_usable(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise RecipeError(f"alpha is {alpha}", remedy="give a finite number, for example --alpha 2")
    if abs(alpha) >= ALPHA_LIMIT:
        raise NumericError(
            f"alpha {alpha:g} is so large that nothing of the model would be left",
            remedy=f"choose |alpha| below {ALPHA_LIMIT:g}; values up to 5 are usual",
        )


def parse_rule(text: str) -> tuple[str, float]:
    """Return pattern and α of ``PATTERN=ALPHA``.

    Raises:
        RecipeError: It has not that form.
    """
    pattern, _, alpha = text.rpartition("=")
    if pattern and NUMBER.fullmatch(alpha):
        return pattern, float(alpha)
    raise RecipeError(
        f"the rule '{text}' is not PATTERN=ALPHA", remedy="write it like 'model.layers.*.mlp.*=3'"
    )


def parse_layers(text: str) -> tuple[tuple[int, float], ...]:
    """Return the knots of ``0=0,16=2,31=1``.

    Raises:
        RecipeError: It has not that form.
    """
    knots = [knot.partition("=") for knot in text.split(",")]
    if all(_LAYER.fullmatch(layer) and NUMBER.fullmatch(alpha) for layer, _, alpha in knots):
        return tuple((int(layer), float(alpha)) for layer, _, alpha in knots)
    raise RecipeError(f"'{text}' is not LAYER=ALPHA,…", remedy="write it like 0=0,16=2,31=1")


def parse_gradient(text: str) -> tuple[float, ...]:
    """Return the values of ``0,2,1``.

    Raises:
        RecipeError: It has not that form.
    """
    values = text.split(",")
    if all(map(NUMBER.fullmatch, values)):
        return tuple(map(float, values))
    raise RecipeError(f"'{text}' is not ALPHA,ALPHA,…", remedy="write it like 0,2,1")


def parse_size(text: str) -> int:
    """Return the bytes of ``5GB``, ``500 MB`` or ``2GiB`` (decimal unless there is an ``i``).

    Raises:
        UsageError: It is not a positive size.
    """
    match = _SIZE.fullmatch(text.strip())
    base = 1024 if match and match[3] else 1000
    size = int(float(match[1]) * base ** _POWERS[match[2].upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"'{text}' is not a shard size", remedy="give one such as 5GB or 500MB")
    return size
