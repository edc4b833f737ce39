"""Whole merges of real files against the float64 reference, and what they report."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_tensors, run_here
from reference import (
    EIGHT_BITS,
    FLOATS,
    FORMATS,
    Models,
    assert_merged,
    doubles,
    dtype_id,
    mixed_pair,
    rounded,
)

import uipe_merge
from uipe_merge.plan import BLOCK, CELL

ALPHAS = [-1.0, 0.0, 0.1, 0.3, 2.0, 10.0, -0.5]
OUTPUTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES: list[tuple[int, ...]] = [(), (0, 3), (3, 0, 2), (1,), (1, 1), (7,), (2, 3, 5, 7)]


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Every pair of types and every shape, in one model."""
    pairs = {
        f"{dtype_id(one)} and {dtype_id(two)}": mixed_pair(one, two, (37, 311), seed=number)
        for number, (one, two) in enumerate(
            [
                *itertools.product(FLOATS, FLOATS),
                *((one, two) for one in FORMATS for two in EIGHT_BITS),
                *((one, two) for one in EIGHT_BITS for two in FLOATS),
            ]
        )
    }
    for dtype, shape in itertools.product(FLOATS, SHAPES):
        pairs[f"{dtype_id(dtype)} {shape}"] = mixed_pair(dtype, dtype, shape, seed=9)
    parts = [mixed_pair(torch.float32, torch.float32, (900, 2), seed=seed) for seed in (5, 6)]
    one, two = (torch.view_as_complex(part) for part in parts[0])
    pairs["complex"] = one.reshape(30, 30), two.reshape(30, 30)
    return Models(tmp_path_factory.mktemp("kinds"), pairs)


@pytest.mark.parametrize("dtype", ["auto", *OUTPUTS])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_pair_of_dtypes_and_every_shape_equals_the_reference(
    every_kind: Models, tmp_path: Path, alpha: float, dtype: str
) -> None:
    merged = every_kind.merge(tmp_path / "out", alpha, dtype)
    assert merged.keys() == every_kind.unlearned.keys()
    for name, two in every_kind.unlearned.items():
        converted = two.dtype in FLOATS and dtype != "auto"
        assert merged[name].dtype == (OUTPUTS[dtype] if converted else two.dtype), name
        if alpha == -1:  # the original itself, converted once
            one = every_kind.original[name]
            assert_merged(merged[name], one, one, 0.0)
        else:
            assert_merged(merged[name], every_kind.original[name], two, alpha)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize(
    "shape",
    [(CELL,), (CELL - 1,), (CELL + 1,), (BLOCK + CELL + 5,), (3, BLOCK // 3 + 1)],
    ids=["a cell", "less by one", "more by one", "no multiple of a block", "matrix over a block"],
)
def test_tensors_around_and_beyond_a_block_equal_the_reference(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pair = mixed_pair(dtype, dtype, shape)
    merged = Models(tmp_path, {"w": pair, "after": (pair[0][:1], pair[1][:1])})
    out = merged.merge(tmp_path / "out", 0.3)
    assert_merged(out["w"], *pair, 0.3)
    assert_merged(out["after"], pair[0][:1], pair[1][:1], 0.3)


# ---------------------------------------------------------------- what is reported


def reference_numbers(one: torch.Tensor, two: torch.Tensor, out: torch.Tensor) -> dict[str, float]:
    old, new, result = doubles(one), doubles(two), doubles(out)
    update = new - old
    return {
        "norm": float(np.linalg.norm(update)),
        "ratio": float(np.linalg.norm(update) / np.linalg.norm(new)),
        "effective_alpha": float((result - new) @ update / (update @ update)),
        "share_changed": float(np.mean(result != new)),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_norms_effective_alpha_and_share_changed_agree_with_float64(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    pairs = {
        "small": mixed_pair(dtype, dtype, (300,), seed=1),
        "large": mixed_pair(dtype, dtype, (3 * CELL + 11,), seed=2),
        "still": (torch.ones(40, dtype=dtype),) * 2,
    }
    models = Models(tmp_path, pairs)
    result = run_here(*models.paths, "--alpha", 0.3, "-o", tmp_path / "out", "--json", "-v")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    merged = read_tensors(tmp_path / "out")
    for name in ("small", "large"):
        record, wanted = document["tensors"][name], reference_numbers(*pairs[name], merged[name])
        assert {key: record[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
        assert (record["operation"], record["alpha"]) == ("extrapolate", 0.3)
    assert document["tensors"]["still"]["norm"] == 0
    assert document["tensors"]["still"]["effective_alpha"] is None
    whole = [
        torch.cat([tensors[name] for name in pairs])
        for tensors in (models.original, models.unlearned, merged)
    ]
    wanted = reference_numbers(*whole)
    assert {key: document["summary"][key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
    assert document["summary"]["unchanged"] == 1
    assert document["written_bytes"] > whole[0].nbytes
    manifest = json.loads((tmp_path / "out" / "uipe_merge.json").read_text())
    assert manifest["tensors"] == document["tensors"]
    assert manifest["summary"] == document["summary"]


def test_complex_tensors_report_shares_of_real_numbers(tmp_path: Path) -> None:
    one = torch.tensor([1 + 1j, 2, 3j])
    two = torch.tensor([2 + 2j, 2.5 + 1j, 4j])
    models = Models(tmp_path, {"c": (one, two)})
    report = uipe_merge.merge(*models.paths, tmp_path / "out", alpha=1, progress=False)
    assert report.tensors["c"]["share_changed"] == pytest.approx(5 / 6)
    assert report.summary.as_dict()["share_changed"] == pytest.approx(5 / 6)


# method.md, "Rounding": the share of the intended step that is realised along v.
REALISED = {
    (torch.bfloat16, 1e-4): {0.1: (0.07, 0.09), 0.25: (0.22, 0.26), 1.0: (0.995, 0.999)},
    (torch.bfloat16, 1e-3): {0.1: (0.07, 0.09), 0.25: (0.23, 0.27), 1.0: (0.995, 0.999)},
    (torch.bfloat16, 1e-2): {0.1: (0.50, 0.54), 0.25: (0.88, 0.92), 1.0: (0.995, 1.005)},
    (torch.float16, 1e-3): {0.1: (0.41, 0.45), 0.25: (0.81, 0.85), 1.0: (0.995, 1.005)},
}


@pytest.mark.parametrize(("dtype", "size"), REALISED, ids=dtype_id)
def test_16_bits_realise_of_an_update_what_the_method_says(
    tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    """W ~ N(0, 0.02²) and a Gaussian update with ‖v‖/‖θ‖ = size, a million elements."""
    rng = np.random.default_rng(0)
    theta = rounded(rng.normal(0, 0.02, 2**20), dtype)
    changed = rounded(theta + rng.normal(0, 0.02 * size, 2**20), dtype)
    pair = torch.from_numpy(theta).to(dtype), torch.from_numpy(changed).to(dtype)
    models = Models(tmp_path, {"w": pair})
    for alpha, (low, high) in REALISED[dtype, size].items():
        out = tmp_path / f"{alpha}"
        report = uipe_merge.merge(*models.paths, out, alpha=alpha, progress=False)
        wanted = reference_numbers(*pair, read_tensors(out)["w"])
        effective = report.summary.as_dict()["effective_alpha"]
        assert effective == pytest.approx(wanted["effective_alpha"], rel=1e-4)
        assert low <= wanted["effective_alpha"] / alpha <= high
        told = [warning for warning in report.warnings if "effective α" in warning]
        assert len(told) == (high < 0.95)
        if told:
            assert f"{1 - wanted['share_changed']:.0%} of the elements did not change" in told[0]


def test_at_half_an_ulp_bfloat16_realises_the_step_on_average_and_a_third_of_noise(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    theta = rounded(rng.normal(0, 0.02, 2**20), torch.bfloat16)
    changed = rounded(theta + rng.normal(0, 2e-5, 2**20), torch.bfloat16)
    pair = torch.from_numpy(theta).bfloat16(), torch.from_numpy(changed).bfloat16()
    report = uipe_merge.merge(
        *Models(tmp_path, {"w": pair}).paths, tmp_path / "out", alpha=0.5, progress=False
    )
    summary = report.summary.as_dict()
    assert summary["effective_alpha"] == pytest.approx(0.5, rel=0.02)
    out = doubles(read_tensors(tmp_path / "out")["w"])
    step = 0.5 * (changed - theta)
    assert np.linalg.norm(out - changed) / np.linalg.norm(step) == pytest.approx(1.33, abs=0.02)
    missed = float(np.linalg.norm(out - changed - step) / np.linalg.norm(step))
    assert summary["rounding_error"] == pytest.approx(missed, rel=1e-4)


def test_float32_output_keeps_the_whole_of_a_step_that_bfloat16_loses(tmp_path: Path) -> None:
    one = torch.ones(1000, dtype=torch.bfloat16)
    two = one + 2.0**-7
    models = Models(tmp_path, {"w": (one, two)})
    lost = uipe_merge.merge(*models.paths, tmp_path / "lost", alpha=0.1, progress=False)
    assert lost.tensors["w"]["effective_alpha"] == 0
    assert "effective α of 0 where 0.1" in lost.warnings[0]
    assert "100% of the elements did not change" in lost.warnings[0]
    assert "--dtype float32" in lost.warnings[0]
    kept = uipe_merge.merge(
        *models.paths, tmp_path / "kept", alpha=0.1, dtype="float32", progress=False
    )
    assert kept.tensors["w"]["effective_alpha"] == pytest.approx(0.1, rel=1e-3)
    assert kept.warnings == []
