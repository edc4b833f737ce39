"""``--on-mismatch``: tensors that one side lacks or has in another shape, through the command line."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cli_tools import refuse_merge
from helpers import (
    CONFIG,
    Result,
    assert_refused,
    bits,
    contents,
    read_tensors,
    run_here,
    write_checkpoint,
)
from reference import assert_merged, mixed_pair

from uipe_merge.checkpoint.decisions import DECISIONS
from uipe_merge.plan import CELL

Tensors = dict[str, torch.Tensor]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, OLD, NEW = "model.norm.weight", "model.layers.0.old.bias", "model.layers.0.new.bias"
ALPHA = 0.7


def models(
    root: Path,
    original: Mapping[str, torch.Tensor],
    unlearned: Mapping[str, torch.Tensor],
    configs: tuple[Mapping[str, object], Mapping[str, object]] = (CONFIG, CONFIG),
) -> None:
    write_checkpoint(root / "original", original, config=configs[0])
    write_checkpoint(root / "unlearned", unlearned, config=configs[1])


def merged(root: Path, decision: str, alpha: float = ALPHA, *more: object) -> Tensors:
    """Merge and verify; the tensors of the output."""
    command = (root / "original", root / "unlearned", "--alpha", alpha, "-o", root / "out")
    result = run_here(*command, "--on-mismatch", decision, "--overwrite", *more)
    assert result.code == 0, result
    assert f"--on-mismatch {decision}: " in result.err
    assert run_here("verify", root / "out").code == 0
    return read_tensors(root / "out")


def common_rows(root: Path) -> Result:
    command = (root / "original", root / "unlearned", "--alpha", ALPHA, "-o", root / "out")
    return run_here(*command, "--on-mismatch", "common-rows")


def config(root: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((root / "out" / "config.json").read_text())
    return found


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (
        one.dtype == two.dtype and one.shape == two.shape and bool((bits(one) == bits(two)).all())
    )


@pytest.fixture
def lacking(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    """A pair in which each side has a tensor that the other lacks."""
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (40, 8))
    original = {EMBEDDING: one, OLD: one[0].clone()}
    unlearned = {EMBEDDING: two, NEW: two[1].clone()}
    models(tmp_path, original, unlearned)
    return tmp_path, original, unlearned


def test_by_default_everything_is_listed_with_the_flag_that_decides(
    lacking: tuple[Path, Tensors, Tensors],
) -> None:
    root, _, _ = lacking
    refuse_merge(root, 5, f"'{OLD}' is only in", f"'{NEW}' is only in", "--on-mismatch keep-unl")


def test_an_unknown_decision_is_a_usage_error(tmp_path: Path) -> None:
    models(tmp_path, {}, {})
    refuse_merge(tmp_path, 2, "'guess'", "common-rows", extra=("--on-mismatch", "guess"))


@pytest.mark.parametrize("decision", ["keep-unlearned", "common-rows"])
def test_what_one_side_lacks_is_kept_as_in_the_unlearned(
    lacking: tuple[Path, Tensors, Tensors], decision: str
) -> None:
    root, original, unlearned = lacking
    out = merged(root, decision)
    assert set(out) == {EMBEDDING, NEW}
    assert same(out[NEW], unlearned[NEW])
    assert_merged(out[EMBEDDING], original[EMBEDDING], unlearned[EMBEDDING], ALPHA)
    manifest = json.loads((root / "out" / "uipe_merge.json").read_text())
    assert manifest["tensors"][NEW] == {"operation": "copy", "alpha": ALPHA, "source": "unlearned"}
    assert manifest["recipe"]["on_mismatch"] == decision
    assert f"--on-mismatch {decision}" in manifest["command"]


@pytest.mark.parametrize("alpha", [ALPHA, 0.0, -1.0])
def test_what_one_side_lacks_is_kept_as_in_the_original(
    lacking: tuple[Path, Tensors, Tensors], alpha: float
) -> None:
    root, original, unlearned = lacking
    out = merged(root, "keep-original", alpha)
    assert set(out) == {EMBEDDING, OLD}
    assert same(out[OLD], original[OLD])
    assert_merged(out[EMBEDDING], original[EMBEDDING], unlearned[EMBEDDING], alpha)


def test_another_architecture_is_no_matter_of_decision(tmp_path: Path) -> None:
    one = {EMBEDDING: torch.ones(4, 2)}
    models(tmp_path, one, one, (CONFIG, {**CONFIG, "hidden_size": 3, "model_type": "gpt2"}))
    extra = ("--on-mismatch", "common-rows")
    result = refuse_merge(tmp_path, 5, "model_type", "merge two checkpoints of one", extra=extra)
    assert "--on-mismatch" not in result.err


# ------------------------------------------------------------- vocabulary rows

ROWS = [(32, 34), (34, 32), (3 * CELL // 8, 3 * CELL // 8 + 2)]
"""Added, padded in the original, and more than a cell of them."""


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize(("rows", "more"), ROWS)
def test_common_rows_are_extrapolated_and_the_rest_is_kept(
    tmp_path: Path, rows: int, more: int, dtypes: tuple[str, str]
) -> None:
    first, second = (getattr(torch, name) for name in dtypes)
    one, two = mixed_pair(first, second, (max(rows, more), 8))
    models(tmp_path, {EMBEDDING: one[:rows]}, {EMBEDDING: two[:more]})
    common = min(rows, more)
    runs = []
    for threads in (1, 3):
        out = merged(tmp_path, "common-rows", ALPHA, "--threads", threads)[EMBEDDING]
        assert out.shape == (more, 8)
        assert out.dtype == second
        assert_merged(out[:common], one[:common], two[:common], ALPHA)
        assert same(out[common:], two[common:more])
        runs.append(contents(tmp_path / "out"))
    assert runs[0] == runs[1]


def test_common_rows_at_alpha_minus_1_are_the_originals(tmp_path: Path) -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (10, 8))
    models(tmp_path, {EMBEDDING: one[:7]}, {EMBEDDING: two})
    out = merged(tmp_path, "common-rows", -1)[EMBEDDING]
    assert same(out[:7], one[:7])
    assert same(out[7:], two[7:])


def test_common_rows_of_other_columns_are_kept_as_in_the_unlearned(tmp_path: Path) -> None:
    one, two = torch.ones(4, 6), torch.ones(6, 4) * 2
    models(tmp_path, {EMBEDDING: one}, {EMBEDDING: two})
    assert same(merged(tmp_path, "common-rows")[EMBEDDING], two)


def test_a_value_that_is_not_finite_is_found_in_the_rows_that_are_kept(tmp_path: Path) -> None:
    one, two = torch.ones(4, 2), torch.ones(6, 2) * 2
    two[5, 1] = torch.nan
    models(tmp_path, {EMBEDDING: one}, {EMBEDDING: two})
    unlearned = str(tmp_path / "unlearned" / "model.safetensors")
    assert_refused(common_rows(tmp_path), 7, unlearned, EMBEDDING, "holds 1 values", "index 11")
    assert not (tmp_path / "out").exists()


def test_an_overflow_in_the_common_rows_is_counted(tmp_path: Path) -> None:
    one, two = torch.zeros(4, 2).half(), torch.full((6, 2), 6e4).half()
    models(tmp_path, {EMBEDDING: one}, {EMBEDDING: two})
    assert_refused(common_rows(tmp_path), 7, EMBEDDING, "8 values do not fit into F16")


def test_the_vocabulary_of_the_original_comes_with_its_config(tmp_path: Path) -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (34, 8))
    configs = ({**CONFIG, "vocab_size": 32}, {**CONFIG, "vocab_size": 34, "x": [1]})
    models(tmp_path, {EMBEDDING: one[:32]}, {EMBEDDING: two}, configs)
    assert same(merged(tmp_path, "keep-original")[EMBEDDING], one[:32])
    assert config(tmp_path) == {**CONFIG, "vocab_size": 32, "x": [1]}
    assert same(merged(tmp_path, "keep-unlearned")[EMBEDDING], two)
    assert config(tmp_path) == configs[1]


# ------------------------------------------------------------- tied heads


@pytest.fixture
def untied(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    """The original ties its head to the embedding; the unlearned has one of its own."""
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (32, 8))
    original, unlearned = {EMBEDDING: one}, {EMBEDDING: two, HEAD: two.flip(0).contiguous()}
    configs = ({**CONFIG, "tie_word_embeddings": True}, {**CONFIG, "tie_word_embeddings": False})
    models(tmp_path, original, unlearned, configs)
    return tmp_path, original, unlearned


def test_a_head_tied_on_one_side_is_refused_by_default(
    untied: tuple[Path, Tensors, Tensors],
) -> None:
    refuse_merge(untied[0], 5, HEAD, "--on-mismatch")


def test_a_head_tied_in_the_original_can_be_kept_dropped_or_extrapolated(
    untied: tuple[Path, Tensors, Tensors],
) -> None:
    root, original, unlearned = untied
    out = merged(root, "keep-unlearned")
    assert same(out[HEAD], unlearned[HEAD])
    assert config(root)["tie_word_embeddings"] is False
    out = merged(root, "keep-original")
    assert set(out) == {EMBEDDING}
    assert config(root)["tie_word_embeddings"] is True
    shutil.rmtree(root / "out")
    assert common_rows(root).code == 0
    out = read_tensors(root / "out")
    assert_merged(out[HEAD], original[EMBEDDING], unlearned[HEAD], ALPHA)


def test_a_head_that_only_the_original_has_comes_with_its_config(tmp_path: Path) -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (32, 8))
    configs = ({**CONFIG, "tie_word_embeddings": False}, {**CONFIG, "tie_word_embeddings": True})
    models(tmp_path, {EMBEDDING: one, HEAD: one.flip(0).contiguous()}, {EMBEDDING: two}, configs)
    assert set(merged(tmp_path, "keep-unlearned")) == {EMBEDDING}
    assert config(tmp_path)["tie_word_embeddings"] is True
    assert set(merged(tmp_path, "keep-original")) == {EMBEDDING, HEAD}
    assert config(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize("decision", DECISIONS[1:])
def test_what_the_original_adds_to_a_sharded_model_is_in_its_index(
    tmp_path: Path, decision: str
) -> None:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (6, 8))
    names = [f"model.layers.{number}.a" for number in range(6)]
    write_checkpoint(
        tmp_path / "original", dict(zip([*names, "b"], [*one, one[0].clone()], strict=True))
    )
    write_checkpoint(tmp_path / "unlearned", dict(zip(names, two, strict=True)), shards=3)
    out = merged(tmp_path, decision)
    assert ("b" in out) == (decision == "keep-original")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(out)


def test_integers_of_another_kind_are_kept_from_the_chosen_side(tmp_path: Path) -> None:
    one, two = torch.arange(4), torch.ones(4)
    models(tmp_path, {"ids": one}, {"ids": two})
    refuse_merge(tmp_path, 5, "'ids' is I64", "F32", "--on-mismatch")
    assert same(merged(tmp_path, "keep-original")["ids"], one)
    for decision in ("keep-unlearned", "common-rows"):
        assert same(merged(tmp_path, decision)["ids"], two)


def test_an_interrupted_run_of_another_decision_is_not_gone_on_with(
    lacking: tuple[Path, Tensors, Tensors],
) -> None:
    root, _, _ = lacking
    partial = root / ".out.uipe-partial"
    merged(root, "keep-original")
    first = contents(root / "out")
    assert not partial.exists()
    merged(root, "keep-unlearned")
    assert contents(root / "out") != first


def test_an_adapter_has_nothing_to_decide(tmp_path: Path) -> None:
    models(tmp_path, {EMBEDDING: torch.ones(2, 2)}, {EMBEDDING: torch.ones(2, 2)})
    extra = ("--as", "adapter", "--on-mismatch", "keep-unlearned")
    refuse_merge(tmp_path, 2, "nothing to decide", "--as model", extra=extra)


def test_advice_that_was_followed_is_not_given_again(tmp_path: Path) -> None:
    one = {EMBEDDING: torch.ones(2, 2)}
    models(tmp_path, one, one, (CONFIG, {**CONFIG, "model_type": "gpt2"}))
    extra = ("--on-mismatch", "keep-unlearned")
    result = refuse_merge(tmp_path, 5, "model_type", extra=extra)
    assert "decide with" not in result.err


def test_what_was_kept_keeps_the_two_from_being_called_identical(tmp_path: Path) -> None:
    same = torch.ones(2, 2)
    models(tmp_path, {EMBEDDING: same}, {EMBEDDING: same, NEW: torch.ones(3)})
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1, "-o", tmp_path / "out")
    result = run_here(*command, "--on-mismatch", "keep-unlearned")
    assert result.code == 0
    assert "identical" not in result.err
