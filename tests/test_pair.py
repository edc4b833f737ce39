"""Pairing by name, from headers alone."""

from pathlib import Path

import pytest
import torch
from helpers import write_checkpoint

from uipe_merge.checkpoint.model import Checkpoint, open_checkpoint
from uipe_merge.checkpoint.pair import match, refuse_swapped
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.errors import IncompatibleModelsError, UsageError

Shapes = dict[str, tuple[int, ...]]


def checkpoint(
    path: Path,
    shapes: Shapes,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **config: object,
) -> Checkpoint:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return open_checkpoint(
        LocalFolder(write_checkpoint(path, tensors, shards=shards, config=config))
    )


SHAPES: Shapes = {"b": (2, 3), "a": (4,), "c": ()}


def test_tensors_are_paired_by_name_whatever_their_shards(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "o", SHAPES, shards=3)
    unlearned = checkpoint(tmp_path / "u", SHAPES)
    pairing = match(original, unlearned)
    assert list(pairing.pairs) == list(unlearned.tensors)
    for name, (one, two) in pairing.pairs.items():
        assert one is original.tensors[name]
        assert two is unlearned.tensors[name]
    assert pairing.mismatches == pairing.warnings == []
    pairing.require_match(original, unlearned)


def test_what_matches_is_paired_though_something_else_does_not(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "o", {**SHAPES, "d": (2, 2)})
    unlearned = checkpoint(tmp_path / "u", {**SHAPES, "a": (5,), "e": (1,)})
    pairing = match(original, unlearned)
    assert set(pairing.pairs) == {"b", "c"}
    assert len(pairing.mismatches) == 3
    with pytest.raises(IncompatibleModelsError) as caught:
        pairing.require_match(original, unlearned)
    for mismatch in pairing.mismatches:
        assert mismatch in str(caught.value)


def test_mismatches_come_in_the_order_of_the_checkpoints(tmp_path: Path) -> None:
    many: Shapes = {f"x{number}": (1,) for number in range(9)}
    original = checkpoint(tmp_path / "o", {**SHAPES, **many})
    pairing = match(original, checkpoint(tmp_path / "u", SHAPES))
    names = [line.split("'")[1] for line in pairing.mismatches]
    assert names == [name for name in original.tensors if name in many]


@pytest.mark.parametrize(
    ("one", "two", "hint"),
    [
        ((8, 4), (9, 4), "rows added or padded"),
        ((8,), (9,), "rows added or padded"),
        ((8, 4), (4, 8), "(transposed)"),
        ((8, 4), (32,), None),
        ((), (1,), None),
    ],
)
def test_a_differing_shape_comes_with_a_hint(
    tmp_path: Path, one: tuple[int, ...], two: tuple[int, ...], hint: str | None
) -> None:
    pairing = match(checkpoint(tmp_path / "o", {"a": one}), checkpoint(tmp_path / "u", {"a": two}))
    (mismatch,) = pairing.mismatches
    assert str(list(one)) in mismatch
    assert mismatch.endswith(")") == (hint is not None)
    assert hint is None or hint in mismatch


def test_dtypes_that_differ_are_counted_by_kind(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "o", SHAPES, dtype=torch.float64)
    pairing = match(original, checkpoint(tmp_path / "u", SHAPES, dtype=torch.float16))
    assert pairing.warnings == [
        (
            "3 tensors are F64 in ORIGINAL and F16 in UNLEARNED; the update is formed in the "
            "wider arithmetic"
        )
    ]
    original = checkpoint(tmp_path / "o", SHAPES, dtype=torch.int64)
    pairing = match(original, checkpoint(tmp_path / "u", SHAPES, dtype=torch.uint8))
    assert pairing.warnings == ["3 tensors are I64 in ORIGINAL and U8 in UNLEARNED; they are kept"]
    assert pairing.mismatches == []


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight"])
def test_tied_head_is_paired_with_the_embedding(tmp_path: Path, name: str) -> None:
    original = checkpoint(tmp_path / "o", {name: (8, 4)}, tie_word_embeddings=True)
    shapes: Shapes = {name: (8, 4), "lm_head.weight": (8, 4)}
    unlearned = checkpoint(tmp_path / "u", shapes, tie_word_embeddings=True)
    pairing = match(original, unlearned)
    assert pairing.pairs["lm_head.weight"][0] is original.tensors[name]
    assert pairing.mismatches == []
    (warning,) = pairing.warnings
    assert "lm_head.weight" in warning
    assert name in warning


def test_tied_head_is_no_match_where_two_tensors_could_be_its_embedding(tmp_path: Path) -> None:
    shapes: Shapes = {"a.embed_tokens.weight": (8, 4), "b.embed_tokens.weight": (8, 4)}
    original = checkpoint(tmp_path / "o", shapes, tie_word_embeddings=True)
    more: Shapes = {**shapes, "lm_head.weight": (8, 4)}
    unlearned = checkpoint(tmp_path / "u", more, tie_word_embeddings=True)
    (mismatch,) = match(original, unlearned).mismatches
    assert "'lm_head.weight' is only in" in mismatch


@pytest.mark.parametrize(
    ("claims", "swapped"),
    [
        (["u"], True),
        (["org/else", "u"], True),
        ([], False),
        (["o"], False),
        ([""], False),
        (["."], False),
        (["org/u"], False),  # another model that happens to have this name
    ],
)
def test_swapped(tmp_path: Path, claims: list[str], swapped: bool) -> None:
    original, unlearned = (checkpoint(tmp_path / side, SHAPES) for side in "ou")
    if swapped:
        with pytest.raises(UsageError, match="swap the two arguments"):
            refuse_swapped(original, unlearned, claims)
    else:
        refuse_swapped(original, unlearned, claims)


def test_swapped_by_the_config_and_by_the_whole_path(tmp_path: Path) -> None:
    unlearned = checkpoint(tmp_path / "u", SHAPES)
    original = checkpoint(tmp_path / "o", SHAPES, _name_or_path=str(tmp_path / "u"))
    with pytest.raises(UsageError, match="was made from"):
        refuse_swapped(original, unlearned, [])
    refuse_swapped(unlearned, original, [])


def test_models_of_one_name_in_two_places_are_not_taken_for_swapped(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "base" / "model", SHAPES, _name_or_path="model")
    unlearned = checkpoint(tmp_path / "npo" / "model", SHAPES, _name_or_path="model")
    refuse_swapped(original, unlearned, ["model"])
    refuse_swapped(unlearned, original, ["model"])
