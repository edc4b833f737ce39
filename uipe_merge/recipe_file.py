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

A key that is not known, given twice, or of another type is an error, as are aliases, tags and
nesting that no recipe needs: nothing in the file is ever run or guessed at.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_merge.errors import RecipeError, UsageError
from uipe_merge.recipe import Recipe, parse_size

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

_LARGEST, _DEEPEST = 1_000_000, 8
_PLAIN = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF|nan|NaN|NAN))"
)
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
)


def read_recipe(named: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a ``.yaml``, ``.yml``, ``.toml`` or ``.json`` file.

    Raises:
        UsageError: There is no such file, or it has another ending.
        RecipeError: It is malformed, or says what no recipe can say.
        NumericError: An α is too large.
    """
    path = Path(named)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        endings = ", ".join(_READERS)
        raise UsageError("is no recipe by its name", file=path, remedy=f"call it {endings}")
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _LARGEST else b""
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(reason, file=path, remedy="name a recipe file") from None
    if size > _LARGEST:
        raise RecipeError(f"has {size} bytes, more than a recipe may have", file=path)
    try:
        return _recipe(reader(raw))
    except RecipeError as error:
        raise RecipeError(error.message, file=path, remedy=error.remedy) from None
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
    return yaml.safe_dump(document, sort_keys=False)


def _recipe(document: object) -> Recipe:
    fields = _mapping(document, "the recipe")
    for key in fields:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(_KEYS)}"
            raise RecipeError(f"has the unknown key '{key}'", remedy=remedy)
    if "alpha" not in fields:
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
    seed = fields.get("seed", 0)
    if type(seed) is not int:
        raise RecipeError(f"seed is {seed!r:.60}, not a whole number")
    return Recipe(
        alpha=_number(fields["alpha"], "alpha"),
        dtype=_text(fields.get("dtype", "auto"), "dtype"),
        max_shard_bytes=size,
        on_mismatch=decision,
        rules=tuple(rules),
        layers=tuple((_layer(key), _number(at, f"layer {key}")) for key, at in layers.items()),
        gradient=tuple(_number(alpha, "gradient") for alpha in gradient),
        form=form,
        rounding=rounding,
        seed=seed,
    )


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


def _from_yaml(raw: bytes) -> object:
    import yaml

    depth = 0
    try:
        for event in yaml.parse(raw, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError("uses an anchor or an alias", remedy="write the value out")
            if tag := getattr(event, "tag", None):
                raise RecipeError(f"uses the tag {tag}", remedy="leave it out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecipeError("is nested too deeply")
        return _unique(yaml.compose(raw, Loader=yaml.SafeLoader), yaml.SafeLoader(b""))
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _unique(node: Any, loader: Any) -> object:  # noqa: ANN401 - PyYAML's nodes have no types
    """Build what a node of YAML says; a key given twice is an error."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        found: dict[object, object] = {}
        for key_node, value_node in node.value:
            key = _unique(key_node, loader)
            _refuse_twice(found, key)
            found[key] = _unique(value_node, loader)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_unique(item, loader) for item in node.value]
    return None if node is None else _scalar(node, loader)


def _scalar(node: Any, loader: Any) -> object:  # noqa: ANN401 - as above
    """Build a text, a truth value or a number; YAML's octals and base 60 are no numbers here."""
    if node.tag.endswith((":int", ":float")) and not _PLAIN.fullmatch(node.value):
        raise RecipeError(
            f"'{node.value:.40}' is not written as a plain number", remedy="write it like 0.5"
        )
    return loader.construct_object(node)


def _from_json(raw: bytes) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            _refuse_twice(found, key)
            found[key] = value
        return found

    return json.loads(raw, object_pairs_hook=unique)


def _from_toml(raw: bytes) -> object:
    return tomllib.loads(raw.decode())


def _refuse_twice(found: dict[Any, object], key: object) -> None:
    try:
        twice = key in found
    except TypeError:  # a list or a mapping
        raise RecipeError("has a key that is no text and no number") from None
    if twice:
        raise RecipeError(f"has the key '{key}' twice")


_READERS: dict[str, Callable[[bytes], object]] = {
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".toml": _from_toml,
    ".json": _from_json,
}
