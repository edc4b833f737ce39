"""YAML, TOML and JSON read strictly: a key twice, an alias, a tag or deep nesting is an error.

Nothing in a file is ever run, and no scalar is guessed at: YAML's octals, base 60 and the like
are no numbers here.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, Any

from uipe_merge.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_DEEPEST = 10
_LARGEST = 1_000_000
_PLAIN = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF|nan|NaN|NAN))"
)


def read_bytes(path: Path) -> bytes:
    """Return the content of a recipe file.

    Raises:
        UsageError: There is no such file, or it cannot be read.
        RecipeError: It is larger than any recipe.
    """
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _LARGEST else b""
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(reason, file=path, remedy="name a recipe file") from None
    if size > _LARGEST:
        raise RecipeError(f"has {size} bytes, more than a recipe may have", file=path)
    return raw


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


READERS: dict[str, Callable[[bytes], object]] = {
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".toml": _from_toml,
    ".json": _from_json,
}
"""What reads a document, by the ending of its file."""
