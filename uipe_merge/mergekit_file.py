"""A recipe of mergekit's, read strictly: what of it this program can do, and what not.

Done is one model and its base, by task arithmetic or ``uipe``. All that cannot be done is named in
one error, and the remedy is mergekit itself.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import RecipeError, UsageError, listed
from uipe_merge.mergekit_recipe import (
    PARAMETERS,
    MergekitRecipe,
    Method,
    Scope,
    Setting,
    Stretch,
    alpha_of,
)
from uipe_merge.recipe import Recipe
from uipe_merge.recipe_formats import READERS, read_bytes
from uipe_merge.steering import NUMBER

if TYPE_CHECKING:
    import os

    from uipe_merge.arithmetic.terms import Arithmetic

ENDINGS = (".yml", ".yaml")

_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_NOT_DONE = {
    "modules": "models of several modules",
    "tokenizer_source": "the unlearned model's tokenizer is copied as it is",
    "tokenizer": "the unlearned model's tokenizer is copied as it is",
    "chat_template": "the unlearned model's is copied as it is",
}
_WITHOUT_EFFECT = ("density", "int8_mask", "rescale")
_NEUTRAL: dict[str, tuple[object, str]] = {
    "normalize": (False, "with one model it makes its weight 1"),
    "lambda": (1, "multiply the weights by it"),
}
"""Parameters of task arithmetic for all models: the value that changes nothing, and a way round."""

_DTYPES = ("float32", "float64", "bfloat16", "float16")


class MergekitMerge(NamedTuple):
    """What a recipe of mergekit's asks for.

    Attributes:
        original: The base model.
        unlearned: The other one.
        recipe: The rest.
    """

    original: str
    unlearned: str
    recipe: Recipe


class _Source(NamedTuple):
    model: str
    layers: tuple[int, int] | None
    parameters: dict[object, object]


def read_config(named: str | os.PathLike[str]) -> MergekitMerge:
    """Read a recipe of mergekit's.

    Raises:
        UsageError: There is no such file.
        RecipeError: It is malformed, or asks for what is not done here: all of it, in one line.
        NumericError: A weight is too large.
    """
    return parse_config(read_bytes(Path(named)), str(named))


def parse_config(raw: bytes, named: str) -> MergekitMerge:
    """Read the content of such a file, as ``read_config`` does."""
    path = Path(named)
    try:
        document = _mapping(READERS[".yaml"](raw), "the recipe")
        return _Reading(named, raw.decode()).read(document)
    except (RecipeError, UsageError) as error:
        raise type(error)(error.message, file=path, remedy=error.remedy) from None
    except RecursionError:
        raise RecipeError("is nested too deeply", file=path) from None
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"is malformed: {' '.join(str(error).split())}", file=path) from None


class _Reading:
    """One file being read: what it asks for in vain, and what it says in vain."""

    def __init__(self, config: str, text: str) -> None:
        self._config = config
        self._text = text
        self._undone: list[str] = []
        self._remarks: list[str] = []
        self._method: Method = "task_arithmetic"
        self._base = ""

    def read(self, document: dict[object, object]) -> MergekitMerge:
        fields = self._known(document, _TOP, "")
        method = _text(fields.get("merge_method"), "merge_method")
        if method == "uipe":
            self._method = "uipe"
        elif method != self._method:
            self._undone.append(f"merge_method: {method}")
        self._base = self._model(fields.get("base_model"), "base_model")
        top = self._parameters(fields.get("parameters"), "parameters")
        stretches: list[Stretch] = []
        models: list[str] = []
        if ("models" in fields) == ("slices" in fields):
            raise RecipeError("has not just one of models and slices")
        if "models" in fields:
            stretch, names = self._stretch(_list(fields["models"], "models"), "models", ())
            stretches, models = [stretch], names
        else:
            for number, entry in enumerate(_list(fields["slices"], "slices")):
                stretch, names = self._slice(entry, f"slices[{number}]")
                stretches.append(stretch)
                models += names
            self._require_order(stretches)
        others = list(dict.fromkeys(models))
        if len(others) != 1:
            self._undone.append(
                f"{len(others)} models besides the base" if others else "no model besides the base"
            )
        dtype, arithmetic = self._dtype(fields)
        if self._undone:
            raise RecipeError(
                f"asks for what is not done here: {listed(self._undone)}",
                remedy="mergekit itself does it: uipe-merge mergekit CONFIG OUT",
            )
        stretches = [one._replace(scopes=(*one.scopes, top)) for one in stretches]
        found = MergekitRecipe(
            self._method,
            tuple(stretches),
            arithmetic,
            self._config,
            self._text,
            tuple(self._remarks),
        )
        general = stretches[0].at("", 0.0) or 0.0
        alpha = general if self._method == "uipe" else alpha_of(general)
        return MergekitMerge(self._base, others[0], Recipe(alpha, dtype, mergekit=found))

    def _slice(self, entry: object, where: str) -> tuple[Stretch, list[str]]:
        known = ("sources", "parameters", "base_model")
        fields = self._known(_mapping(entry, where), known, where)
        own = fields.get("base_model", self._base)
        if self._model(own, f"{where}.base_model") != self._base:
            self._undone.append(f"{where}.base_model")
        scope = self._parameters(fields.get("parameters"), f"{where}.parameters")
        sources = _list(fields.get("sources"), f"{where}.sources")
        return self._stretch(sources, f"{where}.sources", scope)

    def _stretch(
        self, entries: list[object], where: str, outer: Scope
    ) -> tuple[Stretch, list[str]]:
        """Return what decides about layers, and the models besides the base."""
        sliced = where != "models"
        sources = [self._source(entry, f"{where}[{n}]", sliced) for n, entry in enumerate(entries)]
        names = [source.model for source in sources]
        if len(set(names)) < len(names):
            self._undone.append(f"a model twice in {where}")
        ranges = {source.layers for source in sources}
        if len(ranges) > 1:
            self._undone.append(f"layer_range that differs in {where}")
        if sliced and self._base not in names:
            raise RecipeError(f"{where} has no source of the base model", remedy="add one")
        scopes: list[Scope] = []
        for number, source in enumerate(sources):
            where_here = f"{where}[{number}].parameters"
            if source.model != self._base:
                scopes.append(self._parameters(source.parameters, where_here, inner=True))
            elif source.parameters:
                self._remarks.append(f"{where_here}: of the base model, without effect")
        layers = sources[0].layers if sources else None
        others = [name for name in names if name != self._base]
        return Stretch(layers, (*scopes[:1], outer)), others

    def _source(self, entry: object, where: str, sliced: bool) -> _Source:  # noqa: FBT001 - private
        known = ("model", "parameters", "layer_range") if sliced else ("model", "parameters")
        fields = self._known(_mapping(entry, where), known, where)
        parameters = _mapping(fields.get("parameters", {}), f"{where}.parameters")
        layers: tuple[int, int] | None = None
        if sliced:
            match fields.get("layer_range"):
                case [int(first), int(last)] if 0 <= first < last:
                    layers = first, last
                case other:
                    raise RecipeError(f"{where}.layer_range is {other!r:.60}, not [FIRST, END]")
        return _Source(self._model(fields.get("model"), f"{where}.model"), layers, parameters)

    def _require_order(self, stretches: list[Stretch]) -> None:
        end = 0
        for number, stretch in enumerate(stretches):
            first, last = stretch.layers or (0, 0)
            if first != end:
                self._undone.append(f"slices[{number}] beginning at layer {first} after {end}")
            end = last

    def _model(self, value: object, where: str) -> str:
        if isinstance(value, dict):
            self._undone.append(f"{where} as a mapping")
            return ""
        named = _text(value, where)
        if "+" in named and not Path(named).is_dir():
            self._remarks.append(f"{where}: mergekit rounds model+adapter before it merges")
        return named

    def _parameters(self, value: object, where: str, *, inner: bool = False) -> Scope:
        """Read parameters; ``inner`` ones are those of a model, where only weights count."""
        wanted = PARAMETERS[self._method]
        scope: Scope = ()
        for key, setting in _mapping({} if value is None else value, where).items():
            at = f"{where}.{key}"
            if key == wanted:
                scope = _settings(setting, at)
            elif self._method == "task_arithmetic" and (
                key in _WITHOUT_EFFECT or (inner and key in _NEUTRAL)
            ):
                self._remarks.append(f"{at}: without effect, as in mergekit")
            elif self._method == "task_arithmetic" and key in _NEUTRAL:
                neutral, way = _NEUTRAL[str(key)]
                if isinstance(setting, bool) != isinstance(neutral, bool) or setting != neutral:
                    self._undone.append(f"{at} ({way})")
            else:
                self._undone.append(at)
        return scope

    def _dtype(self, fields: dict[object, object]) -> tuple[str, Arithmetic]:
        """Return the output's dtype and how the sum is formed."""
        computed, written = (self._dtype_name(fields, key) for key in ("dtype", "out_dtype"))
        output = written or computed or "auto"
        if output == "float64":
            self._undone.append("an output in float64")
        if computed == "float64":
            if self._method == "uipe" and output == "float32":
                return output, "wider"
            self._undone.append("dtype: float64 (float32 is)")
        if computed != "float32":
            said = (
                f"dtype: {computed}: mergekit rounds to it"
                if computed
                else ("no dtype: mergekit computes in the stored one")
            )
            where = "before, between and after its operations"
            self._remarks.append(f"{said} {where}; here it is float32, rounded once")
        return output, "task" if self._method == "task_arithmetic" else "single"

    def _dtype_name(self, fields: dict[object, object], key: str) -> str:
        name = _text(fields.get(key, ""), key).removeprefix("torch.")
        if name and name not in _DTYPES:
            self._undone.append(f"{key}: {name}")
        return name

    def _known(
        self, fields: dict[object, object], known: tuple[str, ...], where: str
    ) -> dict[object, object]:
        """Return what is said; a key without a value says nothing, one that is unknown too much."""
        said = {key: value for key, value in fields.items() if value is not None}
        for key in said:
            if key not in known:
                reason = _NOT_DONE.get(str(key)) if not where else None
                name = f"{where}.{key}" if where else str(key)
                self._undone.append(f"{name} ({reason})" if reason else name)
        return {key: value for key, value in said.items() if key in known}


def _settings(value: object, where: str) -> Scope:
    """Read a value, a list of values, or values with filters."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return (Setting("", (_number(value, where),)),)
    if not value:
        raise RecipeError(f"{where} is an empty list")
    if not all(isinstance(entry, dict) for entry in value):
        return (Setting("", tuple(_number(entry, where) for entry in value)),)
    found = []
    for number, entry in enumerate(value):
        at = f"{where}[{number}]"
        fields = _mapping(entry, at)
        if not {"value"} <= set(fields) <= {"value", "filter"}:
            raise RecipeError(f"{at} has not just value and filter")
        text = "" if fields.get("filter") is None else _text(fields["filter"], f"{at}.filter")
        values = fields["value"] if isinstance(fields["value"], list) else [fields["value"]]
        if not values:
            raise RecipeError(f"{at}.value is an empty list")
        found.append(
            Setting("" if text == "*" else text, tuple(_number(each, at) for each in values))
        )
    return tuple(found)


def _mapping(value: object, what: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise RecipeError(f"{what} is not a mapping of keys to values")
    return value


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{what} is not a list with something in it")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(
            f"{what} is {value!r:.60}, not a text" if value is not None else f"has no {what}"
        )
    return value


def _number(value: object, what: str) -> float:
    """Read a number, or a text that is one: YAML takes ``1e-3`` for a text, and mergekit does not."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{what} is {value!r:.60}, not a number", remedy="write it like 0.5")
    if not math.isfinite(value):
        raise RecipeError(f"{what} is {value}", remedy="give a finite number")
    return float(value)
