"""Grids: every variant as merge would write it, read once, continued, and what is refused."""

import hashlib
import json
import math
import os
import resource
import shlex
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import (
    assert_refused,
    contents,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
    write_pair,
)
from hypothesis import given
from hypothesis import strategies as st
from test_adapter_output import Family

import uipe_merge
from uipe_merge import engine
from uipe_merge.checkpoint.storage import LocalFile
from uipe_merge.errors import UsageError
from uipe_merge.grids import parse_alphas
from uipe_merge.output.staging import Staging
from uipe_merge.recipe import Recipe
from uipe_merge.steering import Steering, Update

VARIANTS = {"uipe-0": 0.0, "uipe-0.5": 0.5, "uipe-2": 2.0, "uipe-minus1": -1.0}
NAMED = {"README.md", "uipe_merge.json"}  # they say where the output is


def make(root: Path, *extra: object, alphas: str = "2,0,0.5,-1") -> dict[str, object]:
    words = ("grid", root / "original", root / "unlearned", "--alphas", alphas)
    done = run_here(*words, "-o", root / "grid", "--json", *extra)
    assert done.code == 0, done
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


def listed(root: Path) -> dict[str, dict[str, object]]:
    document = json.loads((root / "grid" / "grid.json").read_text())
    assert document["schema"] == 1
    return {each["name"]: each for each in document["variants"]}


def single(root: Path, name: str, *options: object) -> dict[str, bytes]:
    """The same model by merge, at the same place of another directory."""
    other = root / "single"
    other.mkdir(exist_ok=True)
    words = (root / "original", root / "unlearned", "-o", other / name, "-q")
    done = run_here(*words, *options)
    assert done.code == 0, done
    return contents(other / name)


def assert_same(one: dict[str, bytes], two: dict[str, bytes]) -> None:
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= NAMED


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--dtype", "float32", "--max-shard-size", "5KB"),
        ("--rounding", "stochastic", "--seed", 3),
        ("--alpha-rule", "*q_proj*=1.5", "--alpha-rule", "lm_head*=0"),
        ("--rank", 2, "--along", "{unlearned}", "--granularity", "tensor"),
        ("--away-from", "original", "--add", "{unlearned}=0.25"),
    ],
    ids=["plain", "dtype", "stochastic", "rules", "rank-along", "away-add"],
)
def test_every_variant_is_what_merge_writes(tmp_path: Path, options: tuple[object, ...]) -> None:
    write_pair(tmp_path, shards=3)
    words = [str(word).format(unlearned=tmp_path / "unlearned") for word in options]
    make(tmp_path, *words)
    variants = listed(tmp_path)
    assert {name: each["alpha"] for name, each in variants.items()} == VARIANTS
    for name, alpha in VARIANTS.items():
        found = contents(tmp_path / "grid" / name)
        assert_same(found, single(tmp_path, name, "--alpha", alpha, *words))
        digest = hashlib.sha256(found["uipe_merge.json"]).hexdigest()
        assert variants[name]["manifest_sha256"] == digest
        assert run_here("verify", tmp_path / "grid" / name).code == 0
    names = {*VARIANTS, "grid.json"}
    assert {entry.name for entry in (tmp_path / "grid").iterdir()} == names


def test_the_command_in_the_document_makes_the_grid_again(tmp_path: Path) -> None:
    write_pair(tmp_path)
    make(
        tmp_path, "--dtype", "float16", "--with-references", "--seed", 4, "--rounding", "stochastic"
    )
    command = json.loads((tmp_path / "grid" / "grid.json").read_text())["command"]
    words = shlex.split(command)
    assert words[:2] == ["uipe-merge", "grid"]
    assert words[-2:] == ["-o", str(tmp_path / "grid")]
    done = run_here(*words[1:], "--json")
    assert done.code == 0, done
    assert set(json.loads(done.out)["kept"]) == listed(tmp_path).keys()


def test_both_checkpoints_are_read_once(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, shards=2)
    read: list[int] = []
    plain = LocalFile.read_into

    def counted(self: LocalFile, buffer: memoryview, offset: int) -> None:
        if self.path.endswith(".safetensors"):
            read.append(len(buffer))
        plain(self, buffer, offset)

    totals = []
    for alphas in ((0.5,), (0.5, 1.0, 2.0, 3.0)):
        read.clear()
        with patch.object(LocalFile, "read_into", counted):
            uipe_merge.grid(*pair, tmp_path / str(len(alphas)), alphas, progress=False)
        totals.append(sum(read))
    assert totals[0] == totals[1]


def plain_pair(root: Path, old: float, new: float, dtype: torch.dtype) -> tuple[Path, Path]:
    """A tensor of ordinary values with one that is not, in the middle, and another beside it."""
    rng = torch.Generator().manual_seed(5)
    tensors = {"a": torch.randn(700, 300, generator=rng), "b": torch.randn(31, generator=rng)}
    moved = {name: each * 1.01 for name, each in tensors.items()}
    tensors["a"][350, 7], moved["a"][350, 7] = old, new
    sides = [{name: each.to(dtype) for name, each in side.items()} for side in (tensors, moved)]
    return write_checkpoint(root / "original", sides[0]), write_checkpoint(
        root / "unlearned", sides[1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_more_variants_than_one_pass_takes(tmp_path: Path, dtype: torch.dtype) -> None:
    pair = plain_pair(tmp_path, 0.5, 1.0, dtype)
    alphas = [-1.0, *(0.25 * number for number in range(23))]
    report = uipe_merge.grid(*pair, tmp_path / "grid", alphas, progress=False, threads=2)
    assert len(report.reports) == 24
    for name, alpha in (("minus1", -1.0), ("0.25", 0.25), ("5.5", 5.5)):
        assert_same(
            contents(tmp_path / "grid" / f"uipe-{name}"),
            single(tmp_path, f"uipe-{name}", "--alpha", alpha),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_squares_that_overflow_change_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    """The values fit, the moments of the compiled pass do not."""
    pair = plain_pair(tmp_path, 5e36, 1e37, dtype)
    uipe_merge.grid(*pair, tmp_path / "grid", [0.5, 2.0, 3.0], progress=False)
    for alpha in ("0.5", "2", "3"):
        found = contents(tmp_path / "grid" / f"uipe-{alpha}")
        assert_same(found, single(tmp_path, f"uipe-{alpha}", "--alpha", alpha))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (2e37, 1e38, ("'a'", "1 values do not fit", "at alpha 4", "smaller alpha")),
        (1.0, math.nan, ("'a'", "NaN", "index 105007", "/unlearned/")),
        (-math.inf, 1.0, ("'a'", "infinite", "index 105007", "/original/")),
    ],
    ids=["overflow", "nan", "inf"],
)
def test_what_is_not_finite_is_reported_as_merge_does(
    tmp_path: Path, old: float, new: float, words: tuple[str, ...]
) -> None:
    """Of eight α, 2 is the last whose results fit."""
    pair = plain_pair(tmp_path, old, new, torch.bfloat16)
    alphas = "0.25,0.5,1,1.5,2,4,8,16"
    grid = run_here("grid", *pair, "--alphas", alphas, "-o", tmp_path / "grid", "--threads", 1)
    assert_refused(grid, 7, *words)
    alone = run_here(*pair, "--alpha", 4, "-o", tmp_path / "alone")
    assert alone.err == grid.err


@pytest.mark.parametrize("threads", [1, 3])
def test_references_and_controls(tmp_path: Path, threads: int) -> None:
    write_pair(tmp_path)
    make(tmp_path, "--with-references", "--threads", threads, alphas="0,1,2")
    families = {name: (each["family"], each["alpha"]) for name, each in listed(tmp_path).items()}
    assert families == {
        "reference-unlearned": ("reference", 0.0),
        "reference-original": ("reference", -1.0),
        "uipe-1": ("uipe", 1.0),
        "uipe-2": ("uipe", 2.0),
        "control-2": ("control", 2.0),
    }
    for name, side in (("unlearned", "unlearned"), ("original", "original")):
        found = contents(tmp_path / "grid" / f"reference-{name}")
        weights = {file: each for file, each in found.items() if file.endswith(".safetensors")}
        theirs, ours = (
            read_tensors(tmp_path / side),
            read_tensors(tmp_path / "grid" / f"reference-{name}"),
        )
        assert weights
        assert all(theirs[tensor].equal(ours[tensor]) for tensor in theirs)
    control = single(tmp_path, "control-2", "--alpha", 2, "--control", "random")
    assert_same(contents(tmp_path / "grid" / "control-2"), control)
    make(tmp_path, "--control", "random", alphas="0,1,2")
    assert {"control-1", "control-2", "uipe-0"} <= listed(tmp_path).keys()
    assert "control-0" not in listed(tmp_path)


def test_an_adapter_makes_adapters(tmp_path: Path) -> None:
    family = Family(tmp_path)
    words = ("grid", family.base, family.adapter, "--alphas", "0.5,2", "--as", "adapter")
    done = run_here(*words, "-o", tmp_path / "grid")
    assert done.code == 0, done
    for alpha in (0.5, 2):
        out = tmp_path / f"alone-{alpha}"
        alone = (family.base, family.adapter, "--alpha", alpha, "--as", "adapter", "-o", out)
        assert run_here(*alone).code == 0
        assert_same(contents(tmp_path / "grid" / f"uipe-{alpha}"), contents(out))


def test_a_grid_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Killed between two publications: what is there stays, what was written is used."""
    write_pair(tmp_path, shards=3)
    make(tmp_path)
    whole = contents(tmp_path / "grid")
    publish = Staging.publish
    calls: list[Path] = []

    def stopped(self: Staging, *, overwrite: bool) -> None:
        calls.append(self.output)
        if len(calls) == 2:
            raise KeyboardInterrupt
        publish(self, overwrite=overwrite)

    again = tmp_path / "again"
    for name in ("original", "unlearned"):
        again.mkdir(exist_ok=True)
        (again / name).symlink_to(tmp_path / name)
    pair = (again / "original", again / "unlearned")
    alphas = list(VARIANTS.values())
    with patch.object(Staging, "publish", stopped), pytest.raises(KeyboardInterrupt):
        uipe_merge.grid(*pair, again / "grid", alphas, progress=False)
    [there] = [name for name in VARIANTS if (again / "grid" / name).is_dir()]
    stamp = (again / "grid" / there / "uipe_merge.json").stat().st_mtime_ns
    report = uipe_merge.grid(*pair, again / "grid", alphas, progress=False)
    assert list(report.kept) == [there]
    assert (again / "grid" / there / "uipe_merge.json").stat().st_mtime_ns == stamp
    assert all(each.resumed == 3 for each in report.reports.values())
    found = contents(again / "grid")
    assert found.keys() == whole.keys()
    weights = [name for name in whole if name.endswith(".safetensors")]
    assert all(found[name] == whole[name] for name in weights)


def test_further_alphas_add_to_a_grid_and_other_recipes_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    make(tmp_path, alphas="1,2")
    found = make(tmp_path, alphas="1,2,3")
    assert found["kept"] == ["uipe-1", "uipe-2"]
    words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1,2,3")
    refused = run_here(*words, "-o", tmp_path / "grid", "--dtype", "float32")
    assert_refused(refused, 8, "uipe-1", "--overwrite")
    make(tmp_path, "--dtype", "float32", "--overwrite", alphas="1,2,3")
    assert all(
        str(tensor.dtype) == "torch.float32"
        for tensor in read_tensors(tmp_path / "grid" / "uipe-2").values()
        if tensor.is_floating_point()
    )


def test_a_dry_run_writes_nothing_and_refuses_what_the_run_would(tmp_path: Path) -> None:
    write_pair(tmp_path)
    found = make(tmp_path, "--dry-run", alphas="1,2")
    assert not (tmp_path / "grid").exists()
    assert [each["name"] for each in found["variants"]] == ["uipe-1", "uipe-2"]  # type: ignore[attr-defined]
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "thesis.tex").write_text("mine")
    words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1,2")
    for extra in ((), ("--dry-run",)):
        refused = run_here(*words, "-o", tmp_path / "grid", *extra)
        assert_refused(refused, 8, "thesis.tex", "another directory")
    assert os.listdir(tmp_path / "grid") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("alphas", "code"), [("", 2), ("1,x", 2), ("0:1:0", 2), ("0:1:-1", 2), ("nan", 3), ("1e30", 7)]
)
def test_what_is_no_alpha(tmp_path: Path, alphas: str, code: int) -> None:
    write_pair(tmp_path)
    words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", alphas)
    assert_refused(run_here(*words, "-o", tmp_path / "grid"), code, "alpha")
    assert not (tmp_path / "grid").exists()


@given(st.integers(-20, 20), st.integers(1, 40), st.integers(1, 9))
def test_a_range_has_its_ends(first: int, count: int, step: int) -> None:
    text = f"{first / 10}:{(first + count * step) / 10}:{step / 10}"
    assert parse_alphas(text) == [(first + step * number) / 10 for number in range(count + 1)]


def test_a_list_is_taken_as_it_is() -> None:
    assert parse_alphas("2,0.25,1e-3") == [2.0, 0.25, 0.001]
    with pytest.raises(UsageError):
        parse_alphas("0:1e9:1")


def test_a_recipe_from_python(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    steering = Steering(along=(Update(str(pair[1])),))
    recipe = Recipe(7.0, "float32", steering=steering)
    report = uipe_merge.grid(*pair, tmp_path / "grid", [1.0, 2.0], recipe=recipe, progress=False)
    alphas = {name: each.summary.alpha for name, each in report.reports.items()}
    assert alphas == {"uipe-1": 1.0, "uipe-2": 2.0}


class TestScripts:
    def scripted(self, root: Path, harness: str, *extra: object) -> str:
        write_pair(root)
        make(root, "--eval", harness, *extra, alphas="1,2")
        return (root / "grid" / "evaluate.sh").read_text()

    def test_a_command_is_run_for_every_variant(self, tmp_path: Path) -> None:
        root = tmp_path / "a place with spaces"
        root.mkdir()
        self.scripted(root, "cp {model}/uipe_merge.json {out}/scores.json")
        for name in ("uipe-1", "uipe-2"):
            subprocess.run(["sh", root / "grid" / "evaluate.sh", name], check=True, cwd="/")
            scores = (root / "grid" / "scores" / name / "scores.json").read_bytes()
            assert scores == (root / "grid" / name / "uipe_merge.json").read_bytes()
        subprocess.run(["sh", root / "grid" / "evaluate.sh"], check=True, cwd="/")
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
        (root / "grid" / "scores" / "uipe-2" / "scores.json").unlink()
        subprocess.run(
            ["sh", root / "grid" / "evaluate.slurm"], check=True, cwd="/", env=environment
        )
        assert (root / "grid" / "scores" / "uipe-2" / "scores.json").exists()
        make(root, alphas="1,2")  # the scores are no strays

    @pytest.mark.parametrize("harness", ["open-unlearning", "muse", "wmdp", "lm-eval"])
    def test_what_is_written_is_a_script(self, tmp_path: Path, harness: str) -> None:
        logs = ("--retain-logs", "a b='c'.json") if harness == "open-unlearning" else ()
        text = self.scripted(tmp_path, harness, *logs)
        for name in ("evaluate.sh", "evaluate.slurm"):
            subprocess.run(["sh", "-n", tmp_path / "grid" / name], check=True)
        assert '"$model' in text or "$model'" in text or "=$model" in text
        if logs:
            assert "retain_logs_path=" in text

    def test_what_is_no_harness(self, tmp_path: Path) -> None:
        write_pair(tmp_path)
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1")
        for extra in (("--eval", "tofu"), ("--eval", "lm-eval", "--retain-logs", "x")):
            assert_refused(run_here(*words, "-o", tmp_path / "grid", *extra), 2, extra[1])
        assert not (tmp_path / "grid").exists()


class TestWhatAReaderFound:
    """Each of these went wrong once."""

    @pytest.mark.found("a control alone had no groups of its own")
    def test_a_control_alone_has_groups_of_its_own(self, tmp_path: Path) -> None:
        write_pair(tmp_path)
        make(tmp_path, "--control", "random", "--granularity", "tensor", alphas="1")
        assert listed(tmp_path).keys() == {"uipe-1", "control-1"}

    @pytest.mark.found("references were asked for of adapters, which have no original")
    def test_adapters_have_no_original_to_refer_to(self, tmp_path: Path) -> None:
        family = Family(tmp_path)
        words = ("grid", family.base, family.adapter, "--alphas=-1,1", "--as", "adapter")
        done = run_here(*words, "-o", tmp_path / "grid", "--with-references", "--dry-run", "--json")
        assert done.code == 0, done
        names = [each["name"] for each in json.loads(done.out)["variants"]]
        assert names == ["reference-unlearned", "uipe-minus1", "uipe-1"]

    @pytest.mark.found("a variant that was published and not cleaned up was never cleaned up")
    def test_what_was_published_and_not_cleaned_up_is_cleaned_up(self, tmp_path: Path) -> None:
        pair = write_pair(tmp_path)
        uipe_merge.grid(*pair, tmp_path / "grid", [1.0, 2.0], progress=False)
        wide = Recipe(1.0, "float32")

        def killed(self: Staging) -> None:
            raise KeyboardInterrupt

        with patch.object(Staging, "settle", killed), pytest.raises(KeyboardInterrupt):
            uipe_merge.grid(
                *pair, tmp_path / "grid", [1.0, 2.0], recipe=wide, overwrite=True, progress=False
            )
        left = [name for name in os.listdir(tmp_path / "grid") if name.endswith("-partial")]
        assert left
        uipe_merge.grid(
            *pair, tmp_path / "grid", [1.0, 2.0], recipe=wide, overwrite=True, progress=False
        )
        assert {entry.name for entry in (tmp_path / "grid").iterdir()} == {
            "grid.json",
            "uipe-1",
            "uipe-2",
        }

    @pytest.mark.found("a grid that was killed between two publications was refused ever after")
    @pytest.mark.parametrize("locked", [True, False])
    def test_what_a_kill_leaves_of_a_variant_that_is_done_is_no_obstacle(
        self, tmp_path: Path, locked: bool
    ) -> None:
        write_pair(tmp_path)
        make(tmp_path)
        whole = contents(tmp_path / "grid")
        partial = tmp_path / "grid" / ".uipe-2.uipe-partial"
        partial.mkdir()
        if locked:
            (partial / "lock").write_bytes(b"{}")
        before = sorted(partial.iterdir())
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "2,0,0.5,-1")
        done = run_here(*words, "-o", tmp_path / "grid", "--dry-run")
        assert done.code == 0, done
        assert sorted(partial.iterdir()) == before
        make(tmp_path)
        assert contents(tmp_path / "grid") == whole
        assert not partial.exists()

    @pytest.mark.found("grid.json named what was refused and forgot what was there")
    def test_the_document_keeps_what_is_there_and_says_nothing_that_was_refused(
        self, tmp_path: Path
    ) -> None:
        write_pair(tmp_path)
        make(tmp_path, alphas="1,2")
        before = (tmp_path / "grid" / "grid.json").read_bytes()
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1,2,8")
        assert run_here(*words, "-o", tmp_path / "grid", "--dtype", "float32").code == 8
        assert (tmp_path / "grid" / "grid.json").read_bytes() == before
        make(tmp_path, alphas="4")
        assert listed(tmp_path).keys() == {"uipe-1", "uipe-2", "uipe-4"}

    @pytest.mark.found("a damaged variant was taken for one that is made")
    def test_a_damaged_variant_is_not_taken_for_made(self, tmp_path: Path) -> None:
        write_pair(tmp_path, shards=2)
        make(tmp_path, alphas="1,2")
        shard = next((tmp_path / "grid" / "uipe-2").glob("*.safetensors"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1])
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1,2")
        assert_refused(run_here(*words, "-o", tmp_path / "grid"), 8, "uipe-2", "--overwrite")
        make(tmp_path, "--overwrite", alphas="1,2")
        assert shard.read_bytes() == whole
        (tmp_path / "grid" / "uipe-2" / "uipe_merge.json").write_text("{")
        assert_refused(run_here(*words, "-o", tmp_path / "grid"), 4, "uipe_merge.json")
        make(tmp_path, "--overwrite", alphas="1,2")
        assert run_here("verify", tmp_path / "grid" / "uipe-2").code == 0

    @pytest.mark.found("more models were begun than files may be open")
    def test_more_models_than_files_may_be_open(self, tmp_path: Path) -> None:
        write_pair(tmp_path)
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "-o", tmp_path / "grid")

        def few() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

        refused = run_cli(*words, "--alphas", "0:4:0.1", before=few)
        assert_refused(refused, 8, "41 models", "ulimit -n", "at a time")
        made = [name for name in os.listdir(tmp_path / "grid") if not name.startswith(".")]
        assert made == []
        assert run_cli(*words, "--alphas", "0:1:0.1", before=few).code == 0

    def test_logs_are_where_the_user_says(self, tmp_path: Path) -> None:
        write_pair(tmp_path)
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1")
        out = ("-o", tmp_path / "grid", "--retain-logs", "logs.json")
        done = run_cli(*words, *out, "--eval", "open-unlearning", cwd=tmp_path)
        assert done.code == 0, done
        assert f"{tmp_path}/logs.json" in (tmp_path / "grid" / "evaluate.sh").read_text()
        assert_refused(run_here(*words, *out), 2, "--retain-logs", "--eval")

    @pytest.mark.found("a dry run did not see an unfinished run of another command")
    def test_a_dry_run_sees_an_unfinished_run(self, tmp_path: Path) -> None:
        write_pair(tmp_path)
        words = ("grid", tmp_path / "original", tmp_path / "unlearned", "--alphas", "1")

        def killed(self: Staging, *, overwrite: bool) -> None:
            raise KeyboardInterrupt

        pair = (tmp_path / "original", tmp_path / "unlearned")
        with patch.object(Staging, "publish", killed), pytest.raises(KeyboardInterrupt):
            uipe_merge.grid(*pair, tmp_path / "grid", [1.0], progress=False)
        for extra in (("--dry-run",), ()):
            refused = run_here(*words, "-o", tmp_path / "grid", "--dtype", "float32", *extra)
            assert_refused(refused, 8, "unfinished run", "dtype")

    @pytest.mark.found("what was measured of another checkpoint with the same stamps was used")
    def test_another_checkpoint_with_the_same_stamps_is_measured_anew(self, tmp_path: Path) -> None:
        """Files of one size and time, as archives unpack them, in two directories."""
        pair = write_pair(tmp_path, shards=2)
        updates = []
        for name, factor in (("one", 0.5), ("two", 2.0)):
            tensors = {key: each * factor for key, each in read_tensors(pair[1]).items()}
            updates.append(write_checkpoint(tmp_path / name, tensors, shards=2))
        for path in tmp_path.rglob("*"):
            os.utime(path, (10**9, 10**9))

        def killed(*arguments: object, **named: object) -> None:
            raise KeyboardInterrupt

        def merge(update: Path, out: Path, *, overwrite: bool = False) -> None:
            steering = Steering(along=(Update(str(update)),), min_cos=-1)
            uipe_merge.merge(*pair, out, steering=steering, overwrite=overwrite, progress=False)

        with patch.object(engine, "write_shards", killed), pytest.raises(KeyboardInterrupt):
            merge(updates[0], tmp_path / "out")
        merge(updates[1], tmp_path / "out", overwrite=True)
        merge(updates[1], tmp_path / "fresh")
        assert_same(contents(tmp_path / "out"), contents(tmp_path / "fresh"))
