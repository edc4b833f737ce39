"""The benchmark's own parts: what it makes, how it counts, what it prints. No time is asserted."""

import re
import sys
from pathlib import Path

import cases
import checkpoints
import machine
import measuring
import numpy as np
import pairs
import peer
import pytest
import results
import run
import torch
import yaml
from comparing import compare
from helpers import bits, contents, read_tensors, write_checkpoint


def outcome(wall: float, peak: int = 0, seconds: float | None = None) -> measuring.Outcome:
    return measuring.Outcome(wall, 0.0, peak, seconds)


# ------------------------------------------------------------------- statistics


def test_a_series_shows_the_median_the_spread_and_the_worst_memory() -> None:
    series = measuring.Series(
        "x", [outcome(3.0, 10, 2.0), outcome(9.0, 30, 8.0), outcome(4.0, 20, 3.0)]
    )
    assert series.wall == 4.0
    assert series.spread == (3.0, 9.0)
    assert series.peak == 30
    assert series.seconds == 3.0


def test_a_program_that_says_nothing_has_no_figure_of_its_own() -> None:
    assert measuring.Series("x", [outcome(1.0)]).seconds is None


def test_contenders_take_turns_and_leave_only_the_last_round(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def contender(name: str) -> measuring.Contender:
        made = tmp_path / name
        script = 'test ! -e "$2" && mkdir "$2" && echo "$1" >> "$3"'
        return measuring.Contender(name, [["sh", "-c", script, "sh", name, made, log]], makes=made)

    said: list[str] = []
    found = measuring.interleave([contender("a"), contender("b")], 3, said.append)
    assert log.read_text().split() == ["a", "b"] * 3
    assert [len(found[name].outcomes) for name in "ab"] == [3, 3]
    assert (tmp_path / "a").is_dir()
    assert len(said) == 6


def test_the_times_of_several_commands_add_up_and_the_last_one_speaks() -> None:
    spoken = ["sh", "-c", """echo '{"seconds": 1.5}'"""]
    made = measuring.Contender("x", [["true"], spoken]).run()
    assert made.seconds == 1.5
    assert made.peak > 0


def test_a_program_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(measuring.FailedError, match=r"ended with 3:\nno luck"):
        measuring.run(["sh", "-c", "echo no luck >&2; exit 3"])


def test_peak_memory_is_that_of_the_child_in_bytes() -> None:
    peak = measuring.run([sys.executable, "-c", "b'x' * 1_200_000_000"]).peak
    assert 1_200_000_000 < peak < 1_300_000_000


# ----------------------------------------------------------------------- tables


def test_a_table_is_aligned_markdown() -> None:
    assert results.table([["what", "n"], ["long name", "1"]]).splitlines() == [
        "| what      | n   |",
        "| --------- | --- |",
        "| long name | 1   |",
    ]


@pytest.mark.parametrize(
    ("value", "word"), [(1.15, "met"), (1.1501, "**missed**")], ids=["at the bar", "above"]
)
def test_the_bar_itself_is_met(value: float, word: str) -> None:
    found = cases.Findings("all", [], [results.Check("ratio", value, 1.15)])
    assert results.check_table([found])[1] == ["ratio", "all", "≤ 1.15", "1.15", word]


def test_the_page_has_every_section_the_caution_and_the_command() -> None:
    series = measuring.Series("uipe-merge", [outcome(2.0, 2**20, 1.0), outcome(4.0, 2**21, 3.0)])
    found = cases.Findings("A whole model", [series], [results.Check("r", 1, 2)], ["Noted."])
    page = results.page([found], [("memory", "24 GB")], "make bench ARGS=x", "Only a trial.")
    headings = re.findall(r"^#+ .*$", page, re.MULTILINE)
    assert headings == [
        "# Performance",
        "## Against the bar",
        "## A whole model",
        "## How",
        "## Again",
        "## Machine",
    ]
    assert "| uipe-merge | 3.00 s (2.00–4.00) | 2.00 s " in page
    assert "\n- Noted.\n" in page
    assert "\n> Only a trial.\n" in page
    assert "\nmake bench ARGS=x\n" in page
    assert "\n\n\n" not in page


@pytest.mark.parametrize(
    ("arguments", "busy", "lines"),
    [("", 0, 0), ("--size 3GB", 0, 0), ("--runs 1", 0, 1), ("--size 1GB", 0, 1), ("", 2, 1)],
    ids=["default", "larger", "one round", "smaller", "busy machine"],
)
def test_a_run_says_if_it_does_not_count(arguments: str, busy: float, lines: int) -> None:
    assert len(run.caution(run.parse(arguments.split()), busy).splitlines()) == lines


@pytest.mark.parametrize(
    "arguments", [["--size", "lots"], ["--runs", "0"], ["--shards", "0"], ["--only", "nothing"]]
)
def test_senseless_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        run.parse(arguments)
    assert refused.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_what_was_not_measured_whole_leaves_the_page_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, page = tmp_path / "work", tmp_path / "performance.md"
    work.mkdir()
    run.measure(run.parse(["--only", "help"]), [], work, page)
    printed = capsys.readouterr()
    assert "## Starting" in printed.out
    assert "| uipe-merge --help | " in printed.out
    assert "performance.md is left as it is" in printed.err
    assert not page.exists()
    assert not list(work.iterdir())


# ---------------------------------------------------------------------- machine


def test_the_file_system_is_that_of_the_innermost_mount() -> None:
    mounts = """\
1 0 0:1 / / rw shared:1 - ext4 /dev/a rw
2 1 0:2 / /data rw - xfs /dev/b rw
3 1 0:3 / /data\\040set rw - btrfs /dev/c rw
4 2 0:4 / /data rw - tmpfs none rw
"""
    assert machine.file_system(Path("/data/x"), mounts) == "tmpfs"
    assert machine.file_system(Path("/data set/x"), mounts) == "btrfs"
    assert machine.file_system(Path("/database"), mounts) == "ext4"


def test_the_machine_is_described_without_its_names(tmp_path: Path) -> None:
    rows = dict(machine.describe(tmp_path, {"mergekit": "0.1.5"}))
    assert rows["torch"] == torch.__version__
    assert rows["mergekit"] == "0.1.5"
    assert machine.version_number("6.18.44-host-v1") == "6.18.44"
    assert re.fullmatch(r"\d+ cores, .+", rows["processor"])
    node = Path("/proc/sys/kernel/hostname").read_text().strip()
    assert not {node, str(tmp_path)} & set(rows.values())


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("nbytes", [4_000_000, 10**8, 25 * 10**8, 10**10, 14 * 10**10])
def test_a_geometry_takes_about_the_bytes_asked_for(nbytes: int) -> None:
    shape = checkpoints.geometry(nbytes)
    elements = sum(int(np.prod(dimensions)) for dimensions in shape.shapes().values())
    assert abs(elements * 2 - nbytes) < 0.02 * nbytes
    assert shape.heads % 4 == 0


@pytest.mark.parametrize("shards", [1, 2, 5, 9])
def test_shards_keep_the_order_and_are_of_about_equal_size(shards: int) -> None:
    shapes = checkpoints.geometry(10**9).shapes()
    groups = list(checkpoints.split(shapes, shards))
    assert [name for group in groups for name in group] == list(shapes)
    sizes = [sum(int(np.prod(shape)) for shape in group.values()) for group in groups]
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    assert max(sizes) <= sum(sizes) / shards + largest


def test_every_tensor_may_have_a_shard_but_no_shard_is_empty() -> None:
    shapes: checkpoints.Shapes = {"a": (9,), "b": (1,), "c": (1,)}
    assert list(checkpoints.split(shapes, 3)) == [{"a": (9,)}, {"b": (1,)}, {"c": (1,)}]
    with pytest.raises(ValueError, match="3 tensors cannot fill 4 shards"):
        list(checkpoints.split(shapes, 4))


def test_a_checkpoint_is_read_back_by_safetensors_and_is_the_same_every_time(
    tmp_path: Path,
) -> None:
    shape = checkpoints.geometry(4_000_000)
    totals = [
        checkpoints.write_checkpoint(tmp_path / name, shape.shapes(), shape.config(), shards=3)
        for name in ("one", "two")
    ]
    tensors = read_tensors(tmp_path / "one")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shape.shapes()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in tensors.values()) == totals[0] == totals[1]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    embedding = tensors["model.embed_tokens.weight"].float()
    assert 0.019 < float(embedding.std()) < 0.021


def test_only_the_tensors_that_were_moved_differ_and_by_a_small_update(tmp_path: Path) -> None:
    shapes: checkpoints.Shapes = {"still": (300, 700), "moved": (300, 700)}
    checkpoints.write_checkpoint(tmp_path / "original", shapes, {})
    checkpoints.write_checkpoint(tmp_path / "unlearned", shapes, {}, moved="moved".__eq__)
    original, unlearned = (read_tensors(tmp_path / name) for name in ("original", "unlearned"))
    assert np.array_equal(bits(original["still"]), bits(unlearned["still"]))
    update = unlearned["moved"].double() - original["moved"].double()
    ratio = float(update.norm() / original["moved"].double().norm())
    assert 0.005 < ratio < 0.02


def test_holes_have_real_headers_and_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    checkpoints.write_checkpoint(path, {"a": (5000, 1000), "b": (3,)}, {}, shards=2, holes=True)
    assert float(read_tensors(path)["a"].abs().max()) == 0
    assert sum(file.stat().st_blocks * 512 for file in path.iterdir()) < 1_000_000


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, np.float32)
    ties = np.array([1.00390625, 1.01171875, -1.00390625], np.float32)
    for case in (values, ties):
        expected = torch.from_numpy(case).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(checkpoints._to_bfloat16(case), expected)


def test_three_neighbouring_layers_are_updated_in_the_pair_like_rmus() -> None:
    shapes = checkpoints.geometry(10**9).shapes()
    assert pairs.few_updated(shapes) == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (6, 7, 8)
    }


def test_the_model_that_is_planned_has_as_many_tensors_as_it_says() -> None:
    assert len(pairs.sparse_shapes()) == pairs.SPARSE_TENSORS == 100_100


# -------------------------------------------------------------------- comparing


def test_differing_elements_are_counted_whatever_the_shards(tmp_path: Path) -> None:
    tensors = {name: torch.ones(50, 3, dtype=torch.bfloat16) for name in "abc"}
    write_checkpoint(tmp_path / "one", tensors, shards=2)
    tensors["b"] = tensors["b"].clone()
    tensors["b"][7, :2] = 3.0
    tensors["d"] = tensors.pop("c")
    write_checkpoint(tmp_path / "two", tensors)
    found = compare(tmp_path / "one", tmp_path / "two")
    assert (found.elements, found.differing, found.missing) == (300, 2, ["c", "d"])
    assert found.share == 2 / 300


def test_only_bfloat16_is_compared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="'a' is F32, not BF16"):
        compare(tmp_path / "one", tmp_path / "one")


# --------------------------------------------------------------------- mergekit


def test_the_recipe_for_mergekit_is_the_rule() -> None:
    document = yaml.safe_load(peer.recipe(Path("/o"), Path("/u"), 2.0, "float32"))
    assert document == {
        "merge_method": "task_arithmetic",
        "base_model": "/o",
        "models": [{"model": "/u", "parameters": {"weight": 3.0}}],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_mergekits_environment_is_pinned_whole_and_has_our_torch() -> None:
    lines = peer.CONSTRAINTS.read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    ours = (run.REPOSITORY / "constraints.txt").read_text()
    assert f"\ntorch=={pins['torch']}\n" in ours
    assert {"mergekit", "transformers", "numpy", "safetensors"} <= pins.keys()
