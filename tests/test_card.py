"""Model cards of the inputs: read for what they say, never a reason to fail or to hang."""

from pathlib import Path

import pytest
from cli_tools import merged
from fakes import MemoryFolder
from helpers import write_pair

from uipe_merge.checkpoint.model import Checkpoint
from uipe_merge.output.card import base_models, card_metadata


def checkpoint(card: str | bytes | None) -> Checkpoint:
    content = card.encode() if isinstance(card, str) else card
    files = {} if content is None else {"README.md": content}
    folder = MemoryFolder(files)
    return Checkpoint(folder, sorted(files), [], {}, {}, [], {"": folder})


def card(metadata: str) -> str:
    return f"---\n{metadata}\n---\n# A model\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("base_model: org/name", ["org/name"]),
        ("base_model: [org/a, org/b]", ["org/a", "org/b"]),
        ("base_model:\n- org/a\n", ["org/a"]),
        ("license: mit", []),
        ("base_model: null", []),
        ("base_model: {a: b}", []),
        ("base_model: [[org/a], 3, org/b]", ["org/b"]),
        ("base_model: &a [*a]", []),
    ],
)
def test_base_models(text: str, names: list[str]) -> None:
    assert base_models(card_metadata(checkpoint(card(text)))) == names


@pytest.mark.parametrize(
    "broken",
    [
        *[None, "", "# Only text", "---\nno end", b"---\n\xff: 1\n---\n", card("[]"), card("text")],
        *[card(text) for text in ("a: [", "a: b: c", "\t- x", "a: *none", "[a]: {b: ", "\0: 1")],
        *[card(f"a: {tag}") for tag in ("!!timestamp x", "!!bool x", '!!int ""', "!!float x")],
        *[card(f"a: {tag}") for tag in ("!!python/object:os.system x", "!!binary é", "!x y")],
        card("a: " + "[" * 5_000),
        card("a: " + "9" * 5_000),
        card("x" * 2_000_000),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_broken_card_says_nothing(broken: str | bytes | None) -> None:
    assert card_metadata(checkpoint(broken)) == {}


def test_a_card_whose_aliases_grow_exponentially(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = card("\n".join([*lines, "base_model: *a11", "license: *a11", "language: [*a11]"]))
    for model in write_pair(tmp_path):
        (model / "README.md").write_text(text)
    merged(tmp_path, alpha=0)
    assert (tmp_path / "out" / "README.unlearned.md").read_text() == text
    assert (tmp_path / "out" / "README.md").stat().st_size < 10_000
