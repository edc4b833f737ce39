"""Bytes that must not change: α = 0 and −1, no update, any threads, any block size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bits, contents, read_tensors, shards_written, write_checkpoint
from reference import FORMATS, Models, Tensors, assert_merged, dtype_id, mixed_pair

import uipe_merge
from uipe_merge.plan import BLOCK, CELL

# ---------------------------------------------------------------- α = 0 and α = −1


def all_patterns() -> Tensors:
    """Every finite value of the narrow types; the delicate ones of the wide types."""
    values = {}
    for dtype in FORMATS:
        if dtype.itemsize == 1:
            raw = torch.arange(256, dtype=torch.uint8).view(dtype)
        elif dtype.itemsize == 2:
            raw = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        else:
            info = torch.finfo(dtype)
            least = info.smallest_normal * info.eps
            some = [0.0, -0.0, least, -least, -info.smallest_normal, 1.0, info.max, -info.max]
            raw = torch.tensor(some, dtype=dtype)
        values[dtype_id(dtype)] = raw[torch.isfinite(raw.double())]
    return values


def backwards(tensor: torch.Tensor) -> torch.Tensor:
    """``flip``, which torch lacks for 8-bit floats."""
    return tensor[torch.arange(len(tensor) - 1, -1, -1)]


@pytest.mark.parametrize(
    ("alpha", "kept"), [(0.0, "unlearned"), (-0.0, "unlearned"), (-1, "original")]
)
def test_alpha_0_and_minus_1_give_the_bytes_of_an_input(
    tmp_path: Path, alpha: float, kept: str
) -> None:
    values = all_patterns()
    pairs = {name: (tensor, backwards(tensor)) for name, tensor in values.items()}
    pairs["ids"] = (torch.arange(9), torch.arange(9) + 2**40)
    pairs["mask"] = (torch.tensor([True, False]), torch.tensor([False, False]))
    pairs["complex"] = (torch.tensor([1 - 0j]), torch.tensor([-0.0 + 2j]))
    models = Models(tmp_path, pairs)
    merged = models.merge(tmp_path / "out", alpha)
    for name, tensor in getattr(models, kept).items():
        assert merged[name].dtype == tensor.dtype
        assert np.array_equal(bits(merged[name]), bits(tensor)), name


@pytest.mark.parametrize("alpha", [2.0, 0.1, -0.5])
def test_what_has_no_update_keeps_its_bytes_at_any_alpha(tmp_path: Path, alpha: float) -> None:
    values = all_patterns()
    moving = torch.ones(3, dtype=torch.bfloat16)
    models = Models(
        tmp_path, {**{name: (v, v) for name, v in values.items()}, "m": (moving, -moving)}
    )
    merged = models.merge(tmp_path / "out", alpha)
    for name, tensor in values.items():
        assert np.array_equal(bits(merged[name]), bits(tensor)), name


@pytest.mark.parametrize("dtype", [*FORMATS, torch.complex64], ids=dtype_id)
def test_one_changed_element_moves_alone_wherever_it_stands(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    values = torch.linspace(-1, 1, 2 * CELL + 3).to(dtype)
    values = torch.where(values == 0, torch.ones_like(values), values)
    pairs = {}
    for place in (0, 4100, CELL // 2 + 1, CELL - 1, CELL, 2 * CELL + 2):
        changed = values.clone()
        changed[place] = 2.0
        pairs[f"{place}"] = (values, changed)
    models = Models(tmp_path, {name: (one.clone(), two) for name, (one, two) in pairs.items()})
    report = uipe_merge.merge(*models.paths, tmp_path / "out", alpha=1, progress=False)
    merged = read_tensors(tmp_path / "out")
    for name, (one, two) in pairs.items():
        assert_merged(merged[name], one, two, 1.0)
        assert merged[name][int(name)] != 2.0
        share = 1 / (values.numel() * (2 if dtype.is_complex else 1))
        assert report.tensors[name]["share_changed"] == pytest.approx(share)


# ---------------------------------------------------------------- what is not computed


def test_integers_and_booleans_are_the_unlearned_ones_and_a_difference_is_told(
    tmp_path: Path,
) -> None:
    integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
    pairs = {}
    for number, dtype in enumerate(integers):
        one = torch.arange(2 * CELL + 3).remainder(2 + number).to(dtype)
        pairs[dtype_id(dtype)] = (one, one.roll(1))
    pairs["same"] = (torch.arange(5), torch.arange(5))
    pairs["w"] = mixed_pair(torch.bfloat16, torch.bfloat16, (5,))
    models = Models(tmp_path, pairs)
    report = uipe_merge.merge(
        *models.paths, tmp_path / "out", alpha=2, dtype="float32", progress=False
    )
    merged = read_tensors(tmp_path / "out")
    for name in set(pairs) - {"w"}:
        assert merged[name].dtype == models.unlearned[name].dtype
        assert np.array_equal(bits(merged[name]), bits(models.unlearned[name])), name
        differing = float((pairs[name][0] != pairs[name][1]).double().mean())
        assert report.tensors[name] == {
            "operation": "keep",
            "alpha": 2.0,
            "share_differing": differing,
        }
    (warning,) = report.warnings
    assert warning.startswith("integer tensors differ")
    assert "'same'" not in warning
    assert all(dtype_id(dtype) in warning for dtype in integers)


# ---------------------------------------------------------------- threads and blocks


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tensors of several blocks and of a few elements, in three shards, mixed types."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    shapes = [(BLOCK + 2 * CELL + 3,), (9, CELL), (5,), (), (0, 2), (CELL + 1,), (64, 100)]
    pairs = {
        f"{number}": mixed_pair(dtypes[number % 3], dtypes[number % 3], shape, seed=number)
        for number, shape in enumerate(shapes)
    }
    ids = torch.arange(2 * CELL)
    pairs |= {"ids": (ids, ids + 1), "mixed": (pairs["1"][0].float(), pairs["1"][1])}
    half = mixed_pair(torch.bfloat16, torch.bfloat16, (4 * CELL,), seed=50)
    half[0][CELL : 3 * CELL] = half[1][CELL : 3 * CELL]  # whole cells without an update
    return Models(tmp_path_factory.mktemp("large"), {**pairs, "half": half})


@pytest.mark.parametrize(("alpha", "dtype"), [(0.3, "auto"), (2.0, "bfloat16"), (0.0, "float32")])
def test_every_byte_of_the_directory_is_the_same_for_any_number_of_threads(
    large: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, dtype: str
) -> None:
    written = {}
    for threads in (1, 2, 3, 8):
        directory = tmp_path / f"{threads}"
        directory.mkdir()
        monkeypatch.chdir(directory)  # the card quotes the command, hence the output's name
        uipe_merge.merge(
            *large.paths, "out", alpha=alpha, dtype=dtype, threads=threads, progress=False
        )
        written[threads] = contents(directory / "out")
    assert len(written[1]) == 3 + len(["index", "config", "card", "manifest"])
    for threads in (2, 3, 8):
        assert written[threads].keys() == written[1].keys()
        for name, content in written[1].items():
            assert written[threads][name] == content, (threads, name)


def test_shards_and_sums_are_the_same_for_any_block_size(large: Models, tmp_path: Path) -> None:
    files, records = shards_written(large.paths, tmp_path / "whole", BLOCK, 1)
    assert len(files) == 3
    for block in (CELL, 2 * CELL, 3 * CELL, 8 * CELL):
        for width in (1, 3):
            output = tmp_path / f"{block} {width}"
            assert shards_written(large.paths, output, block, width) == (files, records)


def test_a_tensor_alone_in_a_model_gets_the_bytes_it_gets_among_others(
    large: Models, tmp_path: Path
) -> None:
    together = large.merge(tmp_path / "together", 0.3)
    for name in large.unlearned:
        pair = {name: (large.original[name], large.unlearned[name])}
        alone = Models(tmp_path / name, pair).merge(tmp_path / f"{name} alone", 0.3)
        assert np.array_equal(bits(alone[name]), bits(together[name])), name


def test_the_layout_of_either_input_changes_no_tensor(large: Models, tmp_path: Path) -> None:
    wanted = large.merge(tmp_path / "wanted", 2.0)
    for side, tensors in (("original", large.original), ("unlearned", large.unlearned)):
        shuffled = dict(sorted(tensors.items(), reverse=True))
        write_checkpoint(tmp_path / side, shuffled, shards=1 if side == "original" else 5)
    for size, shards in ((None, 5), ("7MB", 2), ("1GB", 1)):
        out = tmp_path / f"out {size}"
        uipe_merge.merge(
            tmp_path / "original",
            tmp_path / "unlearned",
            out,
            alpha=2,
            max_shard_size=size,
            progress=False,
        )
        assert len(list(out.glob("*.safetensors"))) == shards
        got = read_tensors(out)
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(bits(got[name]), bits(wanted[name])) for name in wanted)
