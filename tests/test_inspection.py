"""inspect: numbers against float64, what it tells of odd pairs, JSON."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, contents, run_here, write_checkpoint
from reference import FLOATS, Models, doubles, dtype_id, mixed_pair, rounded, unrounded

import uipe_merge
from uipe_merge.inspected import Group, Inspection
from uipe_merge.inspection import DEFAULT_ALPHAS
from uipe_merge.naming import Place
from uipe_merge.plan import BLOCK, CELL

LAYERS = {
    "model.embed_tokens.weight": (40, 12),
    "model.layers.0.self_attn.q_proj.weight": (12, 12),
    "model.layers.0.mlp.experts.0.up_proj.weight": (9, 12),
    "model.layers.0.mlp.experts.1.up_proj.weight": (9, 12),
    "model.layers.1.self_attn.q_proj.weight": (12, 12),
    "model.layers.10.self_attn.q_proj.weight": (12, 12),
    "model.norm.weight": (12,),
    "scale": (),
    "empty": (0, 4),
}


def model(root: Path, dtype: torch.dtype = torch.bfloat16) -> Models:
    return Models(
        root,
        {
            name: mixed_pair(dtype, dtype, shape, seed=number)
            for number, (name, shape) in enumerate(LAYERS.items())
        },
    )


def inspected(models: Models, *alphas: float, dtype: str = "auto") -> Inspection:
    return uipe_merge.inspect(*models.paths, alphas=alphas or None, dtype=dtype, progress=False)


def assert_group(group: Group, models: Models, names: list[str], alphas: tuple[float, ...]) -> None:
    """Hold a group against numpy in float64; the output dtype is that of the tensors."""
    old, new = (
        np.concatenate([doubles(tensors[name]) for name in names])
        for tensors in (models.original, models.unlearned)
    )
    update = new - old
    assert (group.tensors, group.elements) == (len(names), len(new))
    assert group.norm == pytest.approx(float(np.linalg.norm(update)), rel=1e-5)
    ratio = float(np.linalg.norm(update) / np.linalg.norm(new)) if len(new) else None
    assert group.ratio == (None if ratio is None else pytest.approx(ratio, rel=1e-5))
    assert group.share_changed == (float(np.mean(update != 0)) if len(new) else 0)
    for alpha, effective in zip(alphas, group.effective_alphas, strict=True):
        if not update.any():
            assert effective is None
            continue
        out = [
            rounded(unrounded(models.original[name], models.unlearned[name], alpha), tensor.dtype)
            for name, tensor in models.unlearned.items()
            if name in names
        ]
        wanted = float((np.concatenate(out) - new) @ update / (update @ update))
        assert effective == pytest.approx(wanted, rel=2e-3, abs=1e-6)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_every_group_agrees_with_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    models = model(tmp_path, dtype)
    found = inspected(models)
    assert found.alphas == DEFAULT_ALPHAS
    assert found.tensors.keys() == LAYERS.keys()
    for name, group in found.tensors.items():
        assert_group(group, models, [name], found.alphas)
    assert list(found.layers) == [0, 1, 10, None]
    by_layer = {
        0: [name for name in LAYERS if ".layers.0." in name],
        1: [name for name in LAYERS if ".layers.1." in name],
        10: [name for name in LAYERS if ".layers.10." in name],
        None: [name for name in LAYERS if ".layers." not in name],
    }
    for layer, names in by_layer.items():
        assert_group(found.layers[layer], models, names, found.alphas)
    queries = [name for name in LAYERS if name.endswith("q_proj.weight")]
    assert_group(found.kinds["self_attn.q_proj"], models, queries, found.alphas)
    experts = [name for name in LAYERS if ".experts." in name]
    assert_group(found.cells[Place(0, "mlp.experts.*.up_proj")], models, experts, found.alphas)
    assert_group(found.total, models, list(LAYERS), found.alphas)
    assert found.mismatches == found.warnings == found.differing_integers == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["compiled", "torch"])
def test_tensors_beyond_a_block_are_measured_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    pair = mixed_pair(dtype, dtype, (BLOCK + CELL + 3,))
    models = Models(tmp_path, {"w": pair})
    found = inspected(models, 0.3)
    assert_group(found.tensors["w"], models, ["w"], (0.3,))
    one, many = (
        uipe_merge.inspect(*models.paths, alphas=(0.3,), threads=threads, progress=False)
        for threads in (1, 3)
    )
    assert one == many == found


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_the_effective_alpha_is_the_one_that_a_merge_then_reports(
    tmp_path: Path, dtype: str
) -> None:
    models = model(tmp_path)
    found = inspected(models, 0.1, 2.0, dtype=dtype)
    for number, alpha in enumerate(found.alphas):
        out = tmp_path / f"{alpha}"
        report = uipe_merge.merge(*models.paths, out, alpha=alpha, dtype=dtype, progress=False)
        for name, group in found.tensors.items():
            assert group.effective_alphas[number] == report.tensors[name]["effective_alpha"], name
        assert report.summary.total is not None
        assert found.total.effective_alphas[number] == report.summary.total.effective_alpha


def test_an_alpha_that_would_overflow_shows_none(tmp_path: Path) -> None:
    eight = torch.float8_e4m3fn
    models = Models(
        tmp_path,
        {
            "half": (torch.tensor([0.0, 1.0]).half(), torch.tensor([40000.0, 1.5]).half()),
            "eight": (torch.tensor([200.0, 1]).to(eight), torch.tensor([256.0, 1]).to(eight)),
            "fine": (torch.zeros(2).half(), torch.ones(2).half()),
        },
    )
    found = inspected(models, 0.5, 10.0)
    assert found.tensors["half"].effective_alphas[1] is None
    assert found.tensors["eight"].effective_alphas[1] is None
    assert found.total.effective_alphas[1] is None
    assert found.tensors["fine"].effective_alphas == (0.5, 10.0)
    assert found.tensors["half"].effective_alphas[0] == pytest.approx(0.5, rel=1e-3)
    assert found.tensors["eight"].effective_alphas[0] == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("same", [True, False])
def test_values_whose_squares_overflow_float32_are_measured(tmp_path: Path, same: bool) -> None:
    huge = torch.tensor([1e30, 1.0, -2e30]).bfloat16()
    pairs = {"huge": (huge, huge if same else huge * 2), "b": (torch.zeros(1), torch.ones(1))}
    models = Models(tmp_path, pairs)
    found = inspected(models, 2.0)
    for name in pairs:
        assert_group(found.tensors[name], models, [name], (2.0,))


def test_rounding_that_would_change_alpha_is_told(tmp_path: Path) -> None:
    one = torch.ones(64).bfloat16()
    models = Models(tmp_path, {"w": (one, one + 2.0**-7)})
    (warning,) = inspected(models, 0.1, 0.5, 2.0).rounding_warnings()
    assert "0.1 → 0" in warning
    assert "2 →" not in warning
    assert "--dtype float32" in warning
    assert inspected(models, 0.1, dtype="float32").rounding_warnings() == []


# ---------------------------------------------------------------- odd pairs


def odd(root: Path) -> tuple[Path, Path]:
    """A pair that cannot be merged, and of which some tensors match."""
    ids, still = torch.arange(6), torch.ones(5, dtype=torch.bfloat16)
    w = mixed_pair(torch.bfloat16, torch.float32, (30,))
    original = {
        "w": w[0],
        "still": still,
        "ids": ids,
        "mask": ids > 2,
        "embed": torch.zeros(4, 2),
        "kind": torch.zeros(3),
        "old": torch.zeros(1),
    }
    unlearned = {
        "w": w[1],
        "still": still,
        "ids": ids + 1,
        "mask": ids > 2,
        "embed": torch.zeros(6, 2),
        "kind": torch.zeros(3, dtype=torch.int32),
        "new": torch.zeros(1),
    }
    config = {"model_type": "llama", "hidden_size": 8}
    return (
        write_checkpoint(root / "original", original, config=config),
        write_checkpoint(root / "unlearned", unlearned, config={**config, "hidden_size": 9}),
    )


def test_mismatches_are_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    found = uipe_merge.inspect(*odd(tmp_path), progress=False)
    assert found.tensors.keys() == {"w", "still"}
    assert found.zero == ["still"]
    assert found.differing_integers == ["ids"]
    text = "\n".join(found.mismatches)
    assert len(found.mismatches) == 5
    assert "hidden_size is 8 and 9" in text
    assert f"'embed' is [4, 2] in {tmp_path / 'original'} and [6, 2]" in text
    assert "'kind' is F32" in text
    assert f"'old' is only in {tmp_path / 'original'}" in text
    assert f"'new' is only in {tmp_path / 'unlearned'}" in text
    assert any("BF16 in ORIGINAL and F32 in UNLEARNED" in warning for warning in found.warnings)


def test_the_command_line_reports_an_odd_pair_and_succeeds(tmp_path: Path) -> None:
    paths = odd(tmp_path)
    before = contents(tmp_path)
    result = run_here("inspect", *paths)
    assert result.code == 0
    assert result.out.count("mismatch: ") == 5
    assert "1 tensors with v = 0: still" in result.out
    assert "integer tensors that differ: ids" in result.out
    assert "warning: " in result.err
    assert contents(tmp_path) == before


def test_a_pair_without_a_common_tensor_is_refused(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", {"a": torch.ones(2)})
    two = write_checkpoint(tmp_path / "two", {"b": torch.ones(2)})
    assert_refused(run_here("inspect", one, two), 5, "'a' is only in", "'b' is only in")


@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, side: int) -> None:
    pair = [torch.ones(5).bfloat16(), torch.full((5,), 2.0).bfloat16()]
    pair[side][3] = math.nan
    paths = Models(tmp_path, {"w": (pair[0], pair[1])}).paths
    fragments = (f"{paths[side]}/model.safetensors: tensor 'w'", "1 values", "index 3")
    assert_refused(run_here("inspect", *paths), 7, *fragments)


@pytest.mark.parametrize(("alpha", "code"), [("nan", 3), ("inf", 3), ("1e30", 7), ("x", 2)])
def test_an_alpha_that_is_none_is_refused(tmp_path: Path, alpha: str, code: int) -> None:
    paths = model(tmp_path).paths
    assert_refused(run_here("inspect", *paths, "--alpha", 1, "--alpha", alpha), code, "alpha")


# ---------------------------------------------------------------- output


def test_json_holds_everything_and_is_json(tmp_path: Path) -> None:
    models = model(tmp_path)
    result = run_here("inspect", *models.paths, "--json", "-a", 0.5, "-a", 2)
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out, parse_constant=pytest.fail)
    found = inspected(models, 0.5, 2.0)
    assert document == found.as_dict()
    assert document["alphas"] == [0.5, 2.0]
    record = document["tensors"]["model.norm.weight"]
    group = found.tensors["model.norm.weight"]
    assert record == {
        "tensors": 1,
        "elements": 12,
        "norm": group.norm,
        "ratio": group.ratio,
        "share_changed": group.share_changed,
        "effective_alpha": {"0.5": group.effective_alphas[0], "2.0": group.effective_alphas[1]},
    }
    assert [row["layer"] for row in document["layers"]] == [0, 1, 10, None]
    assert {row["kind"] for row in document["kinds"]} == set(found.kinds)
    assert document["tensors"]["empty"]["ratio"] is None


def test_the_table_shows_layers_and_modules_and_with_v_every_tensor(tmp_path: Path) -> None:
    paths = model(tmp_path).paths
    brief, full = run_here("inspect", *paths), run_here("inspect", *paths, "-v")
    assert brief.code == full.code == 0
    for word in ("layer", "module", "10", "self_attn.q_proj", "‖v‖/‖θᵤ‖", "α=0.25", "model"):
        assert word in brief.out
    assert "model.layers.10.self_attn.q_proj.weight" not in brief.out
    assert all(name in full.out for name in LAYERS)


def test_quiet_prints_the_tables_and_no_warnings(tmp_path: Path) -> None:
    result = run_here("inspect", *odd(tmp_path), "--quiet")
    assert (result.code, result.err) == (0, "")
    assert "mismatch: " in result.out
