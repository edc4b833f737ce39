"""Numbers that must stop a run, group F of the hazards: refused with 7 (or 3), or warned of."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import tree
from helpers import (
    Result,
    assert_refused,
    bits,
    contents,
    random_tensors,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
    write_pair,
)

import uipe_merge
from uipe_merge.plan import BLOCK, CELL

Q = "model.layers.0.self_attn.q_proj.weight"


def pair(root: Path, original: torch.Tensor, unlearned: torch.Tensor) -> None:
    """Two models of one interesting tensor and a harmless one in another shard."""
    for side, tensor in (("original", original), ("unlearned", unlearned)):
        write_checkpoint(root / side, {"a": torch.ones(8), Q: tensor}, shards=2)


def refuse_numbers(
    root: Path,
    alpha: object,
    *fragments: str,
    extra: tuple[object, ...] = (),
    code: int = 7,
    run: Callable[..., Result] = run_here,
) -> None:
    """Refused in one line; inputs as they were, no output, nothing of the run left behind."""
    before = tree(root / "original"), tree(root / "unlearned")
    arguments = (root / "original", root / "unlearned", "--alpha", alpha, "-o", root / "out")
    result = run(*arguments, *extra)
    assert_refused(result, code, *fragments)
    assert result.err.count("\n") == 1, result.err
    assert result.out == ""
    assert (tree(root / "original"), tree(root / "unlearned")) == before
    assert sorted(path.name for path in root.iterdir()) == ["original", "unlearned"]


def merged(root: Path, *extra: object, alpha: float = 1) -> Result:
    """Merge the two models, which must succeed."""
    arguments = (root / "original", root / "unlearned", "--alpha", alpha, "-o", root / "out")
    result = run_here(*arguments, *extra)
    assert result.code == 0, result
    return result


# ---------------------------------------------------------------- NaN/Inf in an input


def broken(side: str, bad: dict[int, float], dtype: torch.dtype, elements: int) -> torch.Tensor:
    values = torch.linspace(0.5, 1.0, elements).to(dtype)
    for index, value in bad.items() if side == "broken" else ():
        values[index] = value
    return values


ROWS = {
    "NaN in the unlearned input": ("unlearned", 1, {3: math.nan}, torch.bfloat16, 8),
    "Inf in the original": ("original", 1, {0: math.inf, 7: -math.inf}, torch.float32, 8),
    "NaN where both agree": ("both", 0.3, {5: math.nan}, torch.bfloat16, 8),
    "NaN in what alpha 0 copies": ("unlearned", 0, {2: math.nan, 6: math.inf}, torch.float16, 8),
    "Inf in what alpha -1 copies": ("original", -1, {1: -math.inf}, torch.float64, 8),
    "NaN of 8 bits": ("original", 2, {4: math.nan}, torch.float8_e4m3fn, 8),
    "NaN in several blocks": (
        "unlearned",
        2,
        {CELL + 1: math.nan, CELL + 2: math.inf, BLOCK + 9: math.nan},
        torch.bfloat16,
        BLOCK + 10,
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_an_input_that_is_not_finite_is_refused_with_count_and_first_index(
    tmp_path: Path, row: str
) -> None:
    side, alpha, bad, dtype, elements = ROWS[row]
    one, two = (
        broken("broken" if side in (name, "both") else "", bad, dtype, elements)
        for name in ("original", "unlearned")
    )
    pair(tmp_path, one, two)
    shown = "original" if side == "both" else side
    refuse_numbers(
        tmp_path,
        alpha,
        f"{tmp_path / shown}/model-00002-of-00002.safetensors: tensor '{Q}': ",
        f"holds {len(bad)} values that are NaN or infinite, the first at index {min(bad)}; ",
        "this checkpoint is broken",
    )


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_complex_number_that_is_not_finite_counts_once(
    tmp_path: Path, alpha: float, dtype: str
) -> None:
    values = [1 + 0j] * 9
    values[4], values[7] = complex(math.nan, math.inf), complex(0, math.nan)
    two = torch.tensor(values, dtype=torch.complex64)
    pair(tmp_path, torch.ones(9, dtype=torch.complex64), two)
    with pytest.raises(uipe_merge.NumericError, match=r"holds 2 values .* first at index 4;"):
        uipe_merge.merge(
            tmp_path / "original",
            tmp_path / "unlearned",
            tmp_path / "out",
            alpha=alpha,
            dtype=dtype,
            progress=False,
        )


def test_an_input_that_alpha_does_not_need_is_not_read(tmp_path: Path) -> None:
    pair(tmp_path, torch.full((4,), math.nan), torch.ones(4))
    uipe_merge.merge(
        tmp_path / "original", tmp_path / "unlearned", tmp_path / "out", alpha=0, progress=False
    )
    assert torch.equal(read_tensors(tmp_path / "out")[Q], torch.ones(4))


# ---------------------------------------------------------------- overflow


def test_fp16_40000_plus_1_times_40000(tmp_path: Path) -> None:
    one = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float16)
    two = torch.tensor([40000.0, 2.0, -44000.0, 30000.0], dtype=torch.float16)
    pair(tmp_path, one, two)
    refuse_numbers(
        tmp_path,
        1,
        f"tensor '{Q}': 2 values do not fit into F16 at alpha 1, the largest at 88000; ",
        "choose a smaller alpha, or write with --dtype bfloat16 or float32",
        run=run_cli,
    )


def test_fp16_overflow_is_gone_with_the_remedy(tmp_path: Path) -> None:
    pair(tmp_path, torch.zeros(2).half(), torch.tensor([40000.0, -1.0]).half())
    assert merged(tmp_path, "--dtype", "bfloat16").err == ""
    got = read_tensors(tmp_path / "out")[Q]
    assert got.tolist() == [79872.0, -2.0]  # 80000 to 8 significant bits


def test_f8_past_448(tmp_path: Path) -> None:
    one = torch.tensor([100.0, 1.0, 416.0]).to(torch.float8_e4m3fn)
    two = torch.tensor([288.0, 1.0, 448.0]).to(torch.float8_e4m3fn)
    pair(tmp_path, one, two)
    refuse_numbers(
        tmp_path,
        1,
        f"tensor '{Q}': 2 values do not fit into F8_E4M3 at alpha 1, the largest at 480; ",
        "choose a smaller alpha",
    )


def test_overflow_counts_the_whole_tensor_not_a_block(tmp_path: Path) -> None:
    two = torch.zeros(BLOCK + CELL, dtype=torch.float16)
    two[[5, CELL, BLOCK + 7]] = torch.tensor([-60000.0, 30000.0, 50000.0]).half()
    pair(tmp_path, torch.zeros_like(two), two)
    refuse_numbers(tmp_path, 1, "2 values do not fit", "the largest at 120000")


@pytest.mark.parametrize(
    ("alpha", "count", "largest"), [(0, 3, "300000"), (-1, 1, "70000"), (1, 3, "530000")]
)
def test_conversion_to_a_type_that_cannot_hold_the_values(
    tmp_path: Path, alpha: float, count: int, largest: str
) -> None:
    one, two = torch.zeros(BLOCK + 9), torch.zeros(BLOCK + 9)
    one[0] = 70000
    two[0], two[4], two[BLOCK + 8] = 300000, -70000, 80000
    pair(tmp_path, one, two)
    shown = tmp_path / ("original" if alpha == -1 else "unlearned")
    refuse_numbers(
        tmp_path,
        alpha,
        f"{shown}/model-00002-of-00002.safetensors: tensor '{Q}': {count} values do not fit "
        f"into F16 at alpha {alpha}, the largest at {largest}; ",
        "write with --dtype bfloat16 or float32",
        extra=("--dtype", "float16"),
    )


def test_a_double_too_large_for_float32_is_told_to_stay_one(tmp_path: Path) -> None:
    pair(tmp_path, *(torch.tensor([1e39], dtype=torch.float64) for _ in range(2)))
    fragments = ("1 values do not fit into F32", "keep the stored type with --dtype auto")
    refuse_numbers(tmp_path, 0, *fragments, extra=("--dtype", "float32"))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1e30), (torch.float32, 1e30), (torch.float64, 1e200)]
)
def test_values_whose_squares_overflow_merge_all_the_same(
    tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    one = torch.tensor([1.0, 4.0, -2.0, 0.5], dtype=dtype) * size
    two = torch.tensor([1.5, 4.0, -1.0, 1.0], dtype=dtype) * size
    pair(tmp_path, one, two)
    result = merged(tmp_path, "--json", "-v")
    assert result.err == ""
    got = read_tensors(tmp_path / "out")[Q].double() / size
    assert got.tolist() == pytest.approx([2.0, 4.0, 0.0, 1.5], rel=1e-2)
    assert "Infinity" not in result.out
    assert "NaN" not in result.out
    record = json.loads(result.out)["tensors"][Q]
    assert record["share_changed"] == 0.75
    if size < 1e150:
        assert record["norm"] == pytest.approx(1.5**0.5 * size, rel=1e-2)
        assert record["effective_alpha"] == pytest.approx(1, rel=1e-2)
    else:  # no float64 holds the square, so there is nothing to tell
        assert record["norm"] is record["ratio"] is record["effective_alpha"] is None


# ---------------------------------------------------------------- α


@pytest.mark.parametrize(
    ("alpha", "code"),
    [("nan", 3), ("inf", 3), ("-inf", 3), ("1e400", 3), ("1e30", 7), ("-1e30", 7)],
)
def test_alpha_that_is_no_usable_number(tmp_path: Path, alpha: str, code: int) -> None:
    write_pair(tmp_path)
    refuse_numbers(
        tmp_path, alpha, "alpha", "choose" if code == 7 else "--alpha 2", code=code, run=run_cli
    )


def test_a_negative_alpha_is_a_value_and_not_an_option(tmp_path: Path) -> None:
    pair(tmp_path, torch.zeros(3), torch.ones(3))
    merged(tmp_path, alpha=-0.5)
    assert torch.equal(read_tensors(tmp_path / "out")[Q], torch.full((3,), 0.5))


@pytest.mark.parametrize(("alpha", "kept"), [(0, "unlearned"), (-1, "original")])
def test_alpha_0_and_minus_1_are_byte_identical(tmp_path: Path, alpha: float, kept: str) -> None:
    least = torch.finfo(torch.bfloat16).smallest_normal * torch.finfo(torch.bfloat16).eps
    delicate = torch.tensor([0.0, -0.0, least, -least, 1.0, -3e38]).bfloat16()
    pair(tmp_path, delicate, delicate.flip(0))
    merged(tmp_path, alpha=alpha)
    got, wanted = read_tensors(tmp_path / "out"), read_tensors(tmp_path / kept)
    assert np.array_equal(bits(got[Q]), bits(wanted[Q]))


# ---------------------------------------------------------------- rounding, threads


def test_update_rounded_away_is_warned_of_with_the_share(tmp_path: Path) -> None:
    one = torch.ones(1000).bfloat16()
    pair(tmp_path, one, one + 2.0**-7)
    err = merged(tmp_path, alpha=0.25).err
    assert "effective α of" in err
    assert "where 0.25 was asked for" in err
    assert "% of the elements did not change" in err
    assert "--dtype float32" in err


def test_1_or_n_threads_write_identical_bytes(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["wide"] = torch.linspace(-1, 1, 3 * CELL + 1).bfloat16()
    write_checkpoint(tmp_path / "original", tensors, shards=3)
    changed = {name: (tensor * 1.01).to(tensor.dtype) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "unlearned", changed, shards=2)
    merged(tmp_path, "--threads", 1, alpha=0.3)
    wanted = contents(tmp_path / "out")
    merged(tmp_path, "--threads", 5, "--overwrite", alpha=0.3)
    assert contents(tmp_path / "out") == wanted


def test_a_refusal_of_inputs_leaves_an_older_output_alone(tmp_path: Path) -> None:
    pair(tmp_path, torch.zeros(2), torch.ones(2))
    merged(tmp_path)
    before = contents(tmp_path / "out")
    write_checkpoint(
        tmp_path / "unlearned", {"a": torch.ones(8), Q: torch.tensor([1, math.nan])}, shards=2
    )
    arguments = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1)
    result = run_here(*arguments, "-o", tmp_path / "out", "--overwrite")
    assert_refused(result, 7, Q, "index 1")
    assert contents(tmp_path / "out") == before
