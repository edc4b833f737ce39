"""The model card of the output: where it comes from, in the words the Hub understands."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from uipe_merge.checkpoint.hub import unpinned
from uipe_merge.checkpoint.storage import read_document
from uipe_merge.errors import OutputError, UipeMergeError, escape

if TYPE_CHECKING:
    from uipe_merge.checkpoint.model import Checkpoint
    from uipe_merge.recipe import Recipe
    from uipe_merge.report import Summary

CARD_NAME = "README.md"

_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_LICENCE_FIELDS = ("license", "license_name", "license_link")
_CARRIED_FIELDS = (*_LICENCE_FIELDS, "language")
_BAD_VALUES = (ValueError, LookupError, AttributeError, RecursionError)  # of tags, from PyYAML
_LARGEST_CARD = 2_000_000
_MODEL_TEXT = """\
θᵤ + α·(θᵤ − θ₀) with θ₀ = `{0}` and θᵤ = `{1}`: the unlearning update,
lengthened (UIPE, arXiv 2503.04693). Made by"""
_STEERED_TEXT = """\
θᵤ + s with θ₀ = `{0}`, θᵤ = `{1}` and a step s along the unlearning
update (UIPE, arXiv 2503.04693) that was steered as the command says. Made by"""
_ADAPTER_TEXT = """\
An adapter on θ₀ = `{0}`: θ₀ + (1 + α)·c·B·A with the factors of `{1}`, whose
unlearning update is lengthened (UIPE, arXiv 2503.04693) by scaling B alone. In the numbers
below v and θᵤ of a B are both B itself, so that their ratio is 1. Made by"""
_MERGEKIT_TEXT = """\
This command runs a recipe of mergekit's, `merge_method: {}`, which says:"""
_CACHE = re.compile(r"models--(.+?)--(.+)")


def hub_id(location: str) -> str | None:
    """Return the Hub id that a location is, or that a path of the Hub's cache tells."""
    if (named := unpinned(location)) != location:
        return named
    for part in PurePath(location).parts:
        if match := _CACHE.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return None


def model_id(location: str) -> str:
    """Return the Hub id that a location is or a path of the Hub's cache tells, else its name."""
    return hub_id(location) or PurePath(location).name or location


def card_metadata(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the metadata of a checkpoint's own card; empty where there is none to read."""
    if CARD_NAME not in checkpoint.names:
        return {}
    import yaml

    try:
        text = read_document(checkpoint.folder, CARD_NAME, _LARGEST_CARD).decode()
        match = _FRONT_MATTER.match(text)
        metadata = yaml.safe_load(match[1]) if match else {}
    except OutputError:
        raise  # a read error tells nothing about the card
    except (UipeMergeError, yaml.YAMLError, *_BAD_VALUES):
        return {}  # a broken card is no reason not to merge; nothing is carried over from it
    return metadata if isinstance(metadata, dict) else {}


def base_models(metadata: dict[str, object]) -> list[str]:
    """Return what a card calls its base models; anything but names is passed over.

    To print it could take for ever: with YAML's aliases a list of lists grows exponentially.
    """
    named = metadata.get("base_model", [])
    names = named if isinstance(named, list) else [named]
    return [name for name in names if isinstance(name, str)]


def encode_card(
    original: Checkpoint, unlearned: Checkpoint, command: str, summary: Summary, recipe: Recipe
) -> bytes:
    """Return the card: metadata for the Hub, one paragraph, the command, the numbers.

    Args:
        original: θ₀.
        unlearned: θᵤ.
        command: What made the output.
        summary: The numbers.
        recipe: What was asked for.
    """
    from huggingface_hub import ModelCardData

    ids = [model_id(original.location), model_id(unlearned.location)]
    fields: dict[str, Any] = {}
    for checkpoint in (original, unlearned):
        metadata = card_metadata(checkpoint)
        fields |= {name: metadata[name] for name in _CARRIED_FIELDS if _plain(metadata.get(name))}
    adapter = recipe.form == "adapter"
    text = _STEERED_TEXT if recipe.steering.active else _MODEL_TEXT
    fields |= {
        "base_model": ids[:1] if adapter else ids,
        "base_model_relation": "adapter" if adapter else "merge",
        "library_name": "peft" if adapter else "transformers",
        "tags": ["unlearning", "uipe", "lora" if adapter else "merge"],
    }
    data = ModelCardData(**fields)
    shown = [escape(name).replace("`", "'") for name in ids]  # names that stay in their line
    lines = [
        "---",
        data.to_yaml().rstrip("\n"),
        "---",
        "",
        f"# {shown[1]}, extrapolated with α = {summary.asked}",
        "",
        *(_ADAPTER_TEXT if adapter else text).format(*shown).split("\n"),
        "",
        "```bash",
        command,
        "```",
        "",
        *_recipe_of_mergekit(recipe),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in summary.rows()),
        "",
        "`uipe_merge.json` holds the inputs' fingerprints, the record of every tensor and the",
        "hash of every file; `uipe-merge verify` checks them.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")  # paths need not be UTF-8


def _recipe_of_mergekit(recipe: Recipe) -> list[str]:
    """Return the recipe of mergekit's that was run, indented: no text in it ends such a block."""
    if recipe.mergekit is None:
        return []
    lines = (f"    {line}".rstrip() for line in recipe.mergekit.text.splitlines())
    return [_MERGEKIT_TEXT.format(recipe.mergekit.method), "", *lines, ""]


def _plain(value: object) -> bool:
    """Tell whether a field of somebody else's card is a string or a list of strings."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )
