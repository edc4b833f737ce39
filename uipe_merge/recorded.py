"""What a manifest says of how its model was made, for making it again; any of it may be wrong."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, cast

from uipe_merge.errors import (
    CorruptInputError,
    IncompatibleModelsError,
    RecipeError,
    UsageError,
    listed,
)
from uipe_merge.mergekit_file import parse_config
from uipe_merge.opening import is_there
from uipe_merge.plan import NUMERICS
from uipe_merge.recipe_file import parse_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.drawing import Deep
    from uipe_merge.recipe import Recipe


class Record:
    """A manifest, asked for what a merge needs; anything in it may be wrong."""

    def __init__(self, manifest: Mapping[str, object], path: str) -> None:
        """Take one of our numeric code; ``path`` is for messages.

        Raises:
            CorruptInputError: It is of another.
        """
        self._manifest = manifest
        self._path = path
        tool = self.mapping("tool")
        if tool.get("numerics") != NUMERICS:
            raise CorruptInputError(
                f"was made with numeric code {str(tool.get('numerics'))[:20]}, this version has "
                f"{NUMERICS}: other bytes would come out",
                file=path,
                remedy=f"use uipe-merge {str(tool.get('version'))[:20]} for --deep",
            )

    def mapping(self, name: str) -> Mapping[str, object]:
        """Return one of its parts; nothing where it has none of that name."""
        value = self._manifest.get(name, {})
        if not isinstance(value, dict):
            raise self.damaged(name)
        return value

    def damaged(self, what: str) -> CorruptInputError:
        """Return the error for a part that is not what this tool writes."""
        return CorruptInputError(
            f"its {what} is damaged, so that nothing can be computed from it", file=self._path
        )

    def recipe(self, moved: Mapping[str, str]) -> Recipe:
        """Return the recipe, with further checkpoints where they are now."""
        said = dict(self.mapping("recipe"))
        size = said.pop("max_shard_bytes", None)
        if size is not None:
            said["max_shard_size"] = size
        try:
            said["alpha_rules"] = [
                {"match": match, "alpha": alpha}
                for match, alpha in cast("list[list[object]]", said.get("alpha_rules", []))
            ]
            knots = cast("list[tuple[object, object]]", said.get("alpha_layers", []))
            said["alpha_layers"] = dict(knots)
        except (TypeError, ValueError):
            raise self.damaged("recipe") from None
        for key in ("along", "away_from", "add"):
            if key in said:
                said[key] = _renamed(said[key], moved)
        try:
            return parse_recipe(said)
        except (RecipeError, UsageError) as error:
            raise CorruptInputError(
                f"its recipe is damaged: {error.message}", file=self._path
            ) from None

    def arguments(self, deep: Deep, recipe: Recipe) -> tuple[str, str]:
        """Return the two inputs: those that were given now, or those that the command names.

        Raises:
            UsageError: One that the command names is not there.
        """
        if deep.original is not None and deep.unlearned is not None:
            return deep.original, deep.unlearned
        try:
            _, *words = shlex.split(str(self._manifest.get("command", "")))
        except ValueError:
            words = []
        if len(words) < 2:
            raise self.damaged("command")
        if recipe.mergekit is not None:
            merge = parse_config(recipe.mergekit.text.encode(), recipe.mergekit.config)
            words = [merge.original, merge.unlearned]
        for given, named, option in zip(
            (deep.original, deep.unlearned), words, ("--original", "--unlearned"), strict=False
        ):
            if given is None and not is_there(named):
                raise UsageError(
                    "is where this model was made from, and is not there",
                    file=named,
                    remedy=f"say where it is now with {option}, or run in the directory of then",
                )
        return deep.original or words[0], deep.unlearned or words[1]

    def require_inputs(self, sides: Sequence[Checkpoint]) -> None:
        """Refuse other checkpoints than those that the model was made from.

        Raises:
            IncompatibleModelsError: A weight file has another name, size or header.
        """
        inputs = self.mapping("inputs")
        further = inputs.get("further", [])
        entries = [inputs.get("original"), inputs.get("unlearned")]
        entries += further if isinstance(further, list) else [further]
        if len(entries) != len(sides):
            raise self.damaged("record of the inputs")
        for entry, checkpoint in zip(entries, sides, strict=True):
            shards = entry.get("shards") if isinstance(entry, dict) else None
            if not isinstance(shards, list) or not all(isinstance(each, dict) for each in shards):
                raise self.damaged("record of the inputs")
            # Of any type, in a manifest that was changed: only texts are sure to be hashable.
            then = {
                (str(each.get("name")), str(each.get("size")), str(each.get("header_sha256")))
                for each in shards
            }
            now = {
                (shard.name, str(shard.stamp.size), shard.header_sha256)
                for shard in checkpoint.shards
            }
            if then != now:
                names = sorted({name for name, *_ in then ^ now})
                raise IncompatibleModelsError(
                    f"is not what the model was made from: {listed(names)} had another size or "
                    "header then, or was not there",
                    file=checkpoint.location,
                    remedy="name the checkpoint of then with --original, --unlearned or --moved",
                )


def _renamed(value: object, moved: Mapping[str, str]) -> object:
    if isinstance(value, list):
        return [_renamed(each, moved) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: moved.get(name, name) if key in ("new", "old") and isinstance(name, str) else name
        for key, name in value.items()
    }
