"""A recipe in a file: YAML, TOML or JSON, read strictly and written.

::

    alpha: 2                    # of what nothing below decides
    alpha_rules:                # the first pattern that matches a tensor's name decides
      - {match: 'model.layers.*.mlp.*', alpha: 3}
    alpha_layers: {0: 0, 16: 2, 31: 1}   # linear between; or gradient: [0, 2, 1]
    dtype: auto
    max_shard_size: 5GB
    on_mismatch: error
    as: model
    rounding: nearest           # or stochastic, with a seed
    along: [{new: related}]     # and min_cos, max_alpha; a pair may have its own old
    away_from: {new: repaired, old: unlearned}   # or original; and always
    rank: 16                    # or energy: 0.9; and rank_all
    control: random
    granularity: layer
    add: [{new: repaired, old: unlearned, beta: 0.5}]

A key that is not known, given twice, or of another type is an error, as are aliases, tags and
nesting that no recipe needs: nothing in the file is ever run or guessed at.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_merge.errors import RecipeError, UsageError
from uipe_merge.mergekit_file import parse_config
from uipe_merge.recipe import Recipe, parse_size
from uipe_merge.recipe_formats import READERS, read_bytes
from uipe_merge.steering import (
    GRANULARITY,
    MAX_ALPHA,
    MIN_COS,
    ORIGINAL_ITSELF,
    Steering,
    Update,
    parse_protected,
    parse_update,
)

if TYPE_CHECKING:
    import os

_KEYS = (
    "alpha",
    "alpha_rules",
    "alpha_layers",
    "gradient",
    "dtype",
    "max_shard_size",
    "on_mismatch",
    "as",
    "rounding",
    "seed",
    "along",
    "min_cos",
    "max_alpha",
    "away_from",
    "always",
    "rank",
    "energy",
    "rank_all",
    "control",
    "granularity",
    "add",
    "mergekit",  # written where α came from a recipe of mergekit's, not meant for hands
)


def read_recipe(named: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a ``.yaml``, ``.yml``, ``.toml`` or ``.json`` file.

    Raises:
        UsageError: There is no such file, or it has another ending.
        RecipeError: It is malformed, or says what no recipe can say.
        NumericError: An α is too large.
    """
    path = Path(named)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        endings = ", ".join(READERS)
        raise UsageError("is no recipe by its name", file=path, remedy=f"call it {endings}")
    raw = read_bytes(path)
    try:
        return parse_recipe(reader(raw))
    except (RecipeError, UsageError) as error:
        raise type(error)(error.message, file=path, remedy=error.remedy) from None
    except RecursionError:
        raise RecipeError("is nested too deeply", file=path) from None
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"is malformed: {' '.join(str(error).split())}", file=path) from None


def write_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML that ``read_recipe`` reads back equal."""
    import yaml

    document: dict[str, object] = {"alpha": recipe.alpha}
    if recipe.rules:
        document["alpha_rules"] = [{"match": name, "alpha": alpha} for name, alpha in recipe.rules]
    if recipe.layers:
        document["alpha_layers"] = dict(recipe.layers)
    if recipe.gradient:
        document["gradient"] = list(recipe.gradient)
    document |= {"dtype": recipe.dtype, "on_mismatch": recipe.on_mismatch, "as": recipe.form}
    document |= {"rounding": recipe.rounding, "seed": recipe.seed}
    if recipe.max_shard_bytes is not None:
        document["max_shard_size"] = recipe.max_shard_bytes
    document |= recipe.steering.document()
    if recipe.mergekit is not None:
        document["mergekit"] = recipe.mergekit.document()
    return yaml.safe_dump(document, sort_keys=False)


def parse_recipe(document: object) -> Recipe:
    """Return the recipe that a parsed document is.

    Raises:
        RecipeError: It is malformed, or says what no recipe can say.
        UsageError: A name in it is none that is known.
        NumericError: An α is too large.
    """
    fields = _mapping(document, "the recipe")
    for key in fields:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(_KEYS)}"
            raise RecipeError(f"has the unknown key '{key}'", remedy=remedy)
    steering = _steering(fields)
    if "alpha" not in fields and not steering.along:
        raise RecipeError("has no alpha", remedy="give the α of what no rule decides")
    rules = []
    for number, rule in enumerate(_list(fields.get("alpha_rules", []), "alpha_rules"), 1):
        entry = _mapping(rule, f"rule {number}")
        if set(entry) != {"match", "alpha"}:
            raise RecipeError(f"rule {number} has not just match and alpha")
        match = _text(entry["match"], f"match of rule {number}")
        rules.append((match, _number(entry["alpha"], f"alpha of rule {number}")))
    layers = _mapping(fields.get("alpha_layers", {}), "alpha_layers")
    gradient = _list(fields.get("gradient", []), "gradient")
    size: int | None = None
    if "max_shard_size" in fields:
        asked = fields["max_shard_size"]
        size = asked if type(asked) is int else parse_size(_text(asked, "max_shard_size"))
    decision: Any = _text(fields.get("on_mismatch", "error"), "on_mismatch")  # checked by Recipe
    form: Any = _text(fields.get("as", "model"), "as")
    rounding: Any = _text(fields.get("rounding", "nearest"), "rounding")
    seed = _whole(fields.get("seed", 0), "seed")
    if "mergekit" in fields:
        said = _mapping(fields["mergekit"], "mergekit")
        config = _text(said.get("config"), "config of mergekit").encode()
        named = _text(said.get("file"), "file of mergekit")
        return replace(
            parse_config(config, named).recipe,
            max_shard_bytes=size,
            on_mismatch=decision,
            rounding=rounding,
            seed=seed,
        )
    return Recipe(
        alpha=_number(fields.get("alpha", 1.0), "alpha"),
        dtype=_text(fields.get("dtype", "auto"), "dtype"),
        max_shard_bytes=size,
        on_mismatch=decision,
        rules=tuple(rules),
        layers=tuple((_layer(key), _number(at, f"layer {key}")) for key, at in layers.items()),
        gradient=tuple(_number(alpha, "gradient") for alpha in gradient),
        form=form,
        rounding=rounding,
        seed=seed,
        steering=steering,
    )


def _steering(fields: dict[object, object]) -> Steering:
    along = _list(fields.get("along", []), "along")
    protected = fields.get("away_from")
    control: Any = _text(fields.get("control", "none"), "control")  # checked by Steering
    granularity: Any = _text(fields.get("granularity", GRANULARITY), "granularity")
    added = []
    for number, entry in enumerate(_list(fields.get("add", []), "add"), 1):
        update = dict(_mapping(entry, f"update {number} of add"))
        beta = _number(update.pop("beta", None), f"beta of update {number}")
        added.append((_update(update, f"update {number} of add"), beta))
    rank, energy = fields.get("rank"), fields.get("energy")
    return Steering(
        along=tuple(_update(each, f"update {at} of along") for at, each in enumerate(along, 1)),
        min_cos=_number(fields.get("min_cos", MIN_COS), "min_cos"),
        max_alpha=_number(fields.get("max_alpha", MAX_ALPHA), "max_alpha"),
        away_from=None if protected is None else _protected(protected),
        always=_truth(fields.get("always", False), "always"),
        rank=None if rank is None else _whole(rank, "rank"),
        energy=None if energy is None else _number(energy, "energy"),
        rank_all=_truth(fields.get("rank_all", False), "rank_all"),
        control=control,
        granularity=granularity,
        add=tuple(added),
    )


def _update(value: object, what: str) -> Update:
    """Read ``{new, old}``, or a text as on the command line."""
    if isinstance(value, str):
        return parse_update(value)
    pair = _mapping(value, what)
    if not {"new"} <= set(pair) <= {"new", "old"}:
        raise RecipeError(f"{what} has not just new and old")
    new, old = (_text(pair.get(key, ""), f"{key} of {what}") for key in ("new", "old"))
    if not new:
        raise RecipeError(f"new of {what} is empty")
    return Update("./original" if new == ORIGINAL_ITSELF.new else new, old)


def _protected(value: object) -> Update:
    return parse_protected(value) if isinstance(value, str) else _update(value, "away_from")


def _whole(value: object, what: str) -> int:
    if type(value) is not int:
        raise RecipeError(f"{what} is {value!r:.60}, not a whole number")
    return value


def _truth(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{what} is {value!r:.60}, neither true nor false")
    return value


def _mapping(value: object, what: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise RecipeError(f"{what} is not a mapping of keys to values")
    return value


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise RecipeError(f"{what} is not a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{what} is {value!r:.60}, not a text")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{what} is {value!r:.60}, not a number", remedy="write it like 0.5")
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(f"{what} is no number that a float holds") from None


def _layer(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdecimal():  # keys of TOML and JSON
        key = int(key)
    if type(key) is not int:
        raise RecipeError(f"'{key!s:.60}' of alpha_layers is not the number of a layer")
    return key
