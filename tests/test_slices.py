"""A merge in slices: real processes at once, killed, finished, mixed up; the same bytes as one."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from fakes_output import FailingFileSystem
from helpers import Result, assert_refused, contents, run_cli, run_here
from runs import Child, Merge, interrupt

from uipe_merge import api, slicing
from uipe_merge.errors import OutputError, UipeMergeError, UsageError
from uipe_merge.executors import Serial
from uipe_merge.output.filesystem import FileSystem, LocalFileSystem
from uipe_merge.output.lock import hold
from uipe_merge.output.slices import Slice, Slices, parse_slice
from uipe_merge.output.staging import Staging
from uipe_merge.plan import Plan
from uipe_merge.progress import Silent
from uipe_merge.slicing import SliceReport, divide


class Sliced(NamedTuple):
    """A merge, and what it writes when one process does all of it."""

    merge: Merge
    complete: dict[str, bytes]

    def run(
        self, part: str, filesystem: FileSystem | None = None, *, overwrite: bool = False
    ) -> SliceReport:
        """Make a slice in this process."""
        plan = api.plan(
            *self.merge.inputs, self.merge.output, alpha=self.merge.alpha, overwrite=overwrite
        )
        return slicing.run_slice(
            plan, parse_slice(part), Serial(), filesystem or LocalFileSystem(), Silent()
        )

    def cli(self, *more: object) -> Result:
        return run_here(*self.merge.command(*map(str, more)))

    def slice_directory(self, part: str) -> Path:
        return self.merge.partial / "slices" / part.replace("/", "-of-")

    def recorded(self, part: str) -> int:
        """How many shards of a slice are done."""
        try:
            lines = (self.slice_directory(part) / "journal").read_bytes().count(b"\n")
        except OSError:
            return 0
        return max(lines - 1, 0)

    def has_recorded_one(self, part: str) -> bool:
        return self.recorded(part) == 1

    def assert_published(self) -> None:
        assert self.merge.state(self.complete) == "complete"
        assert self.merge.left_over() == []


def sliced(root: Path, shards: int, alpha: float = 0.0) -> Sliced:
    merge = Merge(root, alpha=alpha, shards=shards).write_inputs()
    return Sliced(merge, merge.undisturbed())


@pytest.fixture
def case(tmp_path: Path) -> Sliced:
    return sliced(tmp_path, shards=5)


class TestDividing:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        merge = Merge(tmp_path, shards=23).write_inputs()
        plan = api.plan(*merge.inputs, merge.output, alpha=1).plan
        sizes = [shard.size * (1 + index % 5) for index, shard in enumerate(plan.shards)]
        shards = [
            shard._replace(size=size, steps=[])
            for shard, size in zip(plan.shards, sizes, strict=True)
        ]
        return plan._replace(shards=shards)

    @pytest.mark.parametrize("total", [1, 2, 3, 7, 23, 40])
    def test_every_shard_is_in_one_slice(self, plan: Plan, total: int) -> None:
        slices = divide(plan, total)
        assert len(slices) == total
        assert sorted(index for indices in slices for index in indices) == list(range(23))
        assert slices == divide(plan, total)

    @pytest.mark.parametrize("total", [2, 3, 7])
    def test_no_slice_has_more_than_a_shard_more_than_another(self, plan: Plan, total: int) -> None:
        loads = [sum(plan.shards[at].size for at in part) for part in divide(plan, total)]
        assert max(loads) - min(loads) <= max(shard.size for shard in plan.shards)

    def test_what_is_copied_weighs_less_than_what_two_are_read_for(self, tmp_path: Path) -> None:
        merge = Merge(tmp_path, shards=4).write_inputs()
        rules = {f"model.layers.{layer}.*": 0.0 for layer in (0, 1)}  # read from one side alone
        plan = api.plan(*merge.inputs, merge.output, alpha=1, alpha_rules=rules).plan
        copied = {index for index, shard in enumerate(plan.shards) if not shard.steps[0].alpha}
        assert [len(copied & set(part)) for part in divide(plan, 2)] == [1, 1]

    @pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1/x"])
    def test_hazard_no_slice(self, text: str) -> None:
        with pytest.raises(UsageError, match="is no slice"):
            parse_slice(text)

    def test_a_slice(self) -> None:
        assert parse_slice("3/16") == Slice(3, 16)


class TestTogether:
    def test_processes_at_once_and_one_of_them_publishes(self, tmp_path: Path) -> None:
        case = sliced(tmp_path, shards=12, alpha=2.0)
        for _ in range(2):
            children = [
                Child(["merge", *case.merge.command("--slice", f"{number}/4")])
                for number in range(1, 5)
            ]
            assert [child.finish() for child in children] == [(0, "")] * 4
            case.assert_published()
            case.merge.clear()

    def test_all_finish_at_the_same_time(self, case: Sliced) -> None:
        # The lock of the whole is held until each of them waits for it.
        parts = [f"{number}/5" for number in range(1, 6)]
        case.run("1/5")
        with hold(case.merge.partial):
            children = [Child(case.merge.command("--slice", part)) for part in parts[1:]]
            for part, child in zip(parts[1:], children, strict=True):
                assert child.wait_for(partial(case.has_recorded_one, part))
            assert not case.merge.output.exists()
        assert [child.finish() for child in children] == [(0, "")] * 4
        case.assert_published()

    def test_one_after_the_other_in_any_order(self, case: Sliced) -> None:
        reports = [case.run(part) for part in ("3/3", "1/3", "2/3")]
        assert [report.published is not None for report in reports] == [False, False, True]
        assert reports[0].missing == {"1/3": 2, "2/3": 2}
        assert reports[1].missing == {"2/3": 2}
        assert [report.shards for report in reports] == [1, 2, 2]
        case.assert_published()

    def test_more_slices_than_shards(self, case: Sliced) -> None:
        assert case.run("9/9").shards == 0
        for number in range(1, 6):
            case.run(f"{number}/9")
        case.assert_published()

    def test_one_slice_is_the_whole(self, case: Sliced) -> None:
        assert case.run("1/1").published is not None
        case.assert_published()

    def test_a_model_is_replaced_at_the_end(self, case: Sliced) -> None:
        case.merge.output.mkdir()
        (case.merge.output / "uipe_merge.json").write_text("{}")
        case.run("1/2", overwrite=True)
        assert (case.merge.output / "uipe_merge.json").read_text() == "{}"
        case.run("2/2", overwrite=True)
        case.assert_published()

    @pytest.mark.parametrize("steering", ["--always", "--rank=2"])
    def test_what_a_steered_recipe_measures_is_measured_once_for_all(
        self, tmp_path: Path, steering: str
    ) -> None:
        merge = Merge(tmp_path, alpha=1.0, shards=4).write_inputs()
        options = ["--away-from", "original", "--granularity", "tensor", steering]
        assert run_here(*merge.command(*options)).code == 0
        complete = contents(merge.output)
        merge.clear()
        children = [Child(merge.command(*options, "--slice", f"{number}/2")) for number in (1, 2)]
        assert [child.finish() for child in children] == [(0, "")] * 2
        assert Sliced(merge, complete).assert_published() is None

    def test_what_is_printed(self, case: Sliced) -> None:
        words = [word for word in case.merge.command() if word != "-q"]
        first = run_here(*words, "--slice", "1/2")
        assert first.out.split("\n")[0].split() == ["slice", "1/2"]
        assert first.err == "not published yet: 2 shards are missing, of slices 2/2\n"
        planned = json.loads(run_here(*words, "--slice", "2/2", "--dry-run", "--json").out)
        assert len(planned["slice"]["shards"]) == 2
        assert "of this slice" in run_here(*words, "--slice", "2/2", "--dry-run").out
        again = json.loads(run_here(*words, "--slice", "1/2", "--json").out)
        assert (again["shards"], again["kept_shards"], again["missing"]) == (0, 3, {"2/2": 2})
        assert "written" in run_here(*words, "--slice", "2/2").out
        late = run_here(*words, "--slice", "2/2")
        assert (late.code, late.err) == (0, "published, or about to be, by another process\n")
        case.assert_published()


class TestKilled:
    @pytest.mark.parametrize("done", [0, 3, 7])
    def test_a_slice_is_killed_and_run_again(self, tmp_path: Path, done: int) -> None:
        case = sliced(tmp_path, shards=20)
        child = Child(case.merge.command("--slice", "1/2"))
        assert child.wait_for(
            lambda: case.slice_directory("1/2").exists() and case.recorded("1/2") >= done
        )
        child.send(signal.SIGKILL)
        assert child.finish()[0] == -signal.SIGKILL
        kept = case.recorded("1/2")
        assert case.run("2/2").missing == {"1/2": 10 - kept}
        assert not case.merge.output.exists()
        report = case.run("1/2")
        assert (report.kept, report.published is not None) == (kept, True)
        case.assert_published()

    def test_a_fault_at_any_call_of_the_last_slice(self, tmp_path: Path) -> None:
        case = sliced(tmp_path, shards=2)
        case.run("1/2")
        fake = FailingFileSystem(tmp_path)
        case.run("2/2", fake)
        calls = len(fake.calls)
        for fault in range(1, calls + 1):
            case.merge.clear()
            case.run("1/2")
            with pytest.raises(OutputError):
                case.run("2/2", FailingFileSystem(tmp_path, fault))
            assert case.merge.state(case.complete) in ("absent", "complete")
            # Any slice is run again: what is complete is published by whichever it is.
            case.run("2/2" if fault % 2 else "1/2")
            if case.merge.state(case.complete) == "absent":
                case.run("2/2")
            case.assert_published()

    def test_what_a_killed_attempt_had_in_hand_is_removed(self, case: Sliced) -> None:
        case.run("1/2")
        left = case.slice_directory("2/2") / "model.0123"
        left.mkdir(parents=True)
        (left / "x.safetensors.tmp").write_bytes(b"torn")
        case.run("2/2")
        case.assert_published()

    def test_a_shard_that_was_damaged_meanwhile_is_made_again(self, case: Sliced) -> None:
        case.run("1/2")
        damaged = min(case.merge.model.iterdir())
        damaged.write_bytes(bytes(damaged.stat().st_size))
        assert case.run("1/2").shards == 1
        case.run("2/2")
        case.assert_published()

    def test_a_shard_that_was_cut_is_missing(self, case: Sliced) -> None:
        case.run("1/2")
        cut = min(case.merge.model.iterdir())
        cut.write_bytes(cut.read_bytes()[:-1])
        assert case.run("2/2").missing == {"1/2": 1}
        case.run("1/2")
        case.assert_published()


class TestFinish:
    def test_what_is_missing_is_said(self, case: Sliced) -> None:
        case.run("2/3")
        case.run("3/3")
        refused = run_here("finish", case.merge.output)
        assert_refused(refused, 8, "2 shards are missing: 2 of slice 1/3", "run these slices again")
        case.run("1/3")
        case.assert_published()

    def test_what_is_there_is_published(self, case: Sliced) -> None:
        interrupted_publishing(case)
        done = run_cli("finish", case.merge.output)
        assert done.code == 0, done
        assert "written" in done.out
        case.assert_published()
        again = run_here("finish", case.merge.output)
        assert (again.code, again.out) == (0, "")
        assert "is published already" in again.err

    def test_what_was_removed_meanwhile_is_no_other_process(self, case: Sliced) -> None:
        case.run("1/2")
        merge = case.merge
        job = api.plan(*merge.inputs, merge.output, alpha=merge.alpha)
        shutil.rmtree(merge.partial)
        with pytest.raises(OutputError, match="what its slices had made was removed"):
            slicing.finish(job, 2, Serial(), LocalFileSystem(), Silent())
        assert not merge.output.exists()

    def test_paths_that_were_relative_mean_nothing_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Merge(tmp_path).write_inputs()
        monkeypatch.chdir(tmp_path)
        words = ("original", "unlearned", "--alpha", 0, "-o", "out")
        assert run_here(*words, "--slice", "1/2").code == 0
        monkeypatch.chdir("/")
        assert_refused(run_here("finish", tmp_path / "out"), 2, f"run it in {tmp_path}")
        monkeypatch.chdir(tmp_path)
        assert_refused(run_here("finish", "out"), 8, "1 shards are missing")

    def test_an_output_that_is_not_in_slices(self, case: Sliced) -> None:
        assert_refused(run_here("finish", case.merge.output), 2, "is not being made in slices")

    def test_inputs_that_changed_meanwhile(self, case: Sliced) -> None:
        interrupted_publishing(case)
        weights = min(case.merge.inputs[1].glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes())  # another time of modification
        assert_refused(run_here("finish", case.merge.output), 8, "another run", "unlearned")


def interrupted_publishing(case: Sliced) -> None:
    """Make all slices, and let the last fail when all but the publishing is done."""
    case.run("1/2")
    fake = FailingFileSystem(case.merge.root)
    case.run("2/2", fake)
    [fault] = [
        number
        for number, call in enumerate(fake.calls, 1)
        if call.name == "rename" and call.target == "out"
    ]
    case.merge.clear()
    case.run("1/2")
    with pytest.raises(OutputError):
        case.run("2/2", FailingFileSystem(case.merge.root, fault))


@contextmanager
def unchanged(case: Sliced) -> Iterator[None]:
    """What is in the partial directory stays as it is."""
    before = contents(case.merge.partial)
    yield
    assert contents(case.merge.partial) == before
    assert not case.merge.output.exists()


class TestRefused:
    def test_hazard_slices_of_another_recipe(self, case: Sliced) -> None:
        case.run("1/2")
        other = Merge(case.merge.root, alpha=-1.0, shards=5)
        with unchanged(case):
            for more in ((), ("--overwrite",)):
                words = other.command("--slice", "2/2", *more)
                assert_refused(run_here(*words), 8, "slices of another run", "alpha")
                assert_refused(run_here(*words, "--dry-run"), 8, "slices of another run")

    def test_hazard_another_number_of_slices(self, case: Sliced) -> None:
        case.run("1/2")
        with unchanged(case):
            assert_refused(case.cli("--slice", "2/3"), 8, "differs in slices")

    def test_hazard_other_inputs(self, case: Sliced) -> None:
        case.run("1/2")
        weights = min(case.merge.inputs[0].glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes())
        with unchanged(case):
            assert_refused(case.cli("--slice", "2/2"), 8, "slices of another run", "original")

    def test_hazard_the_whole_among_slices(self, case: Sliced) -> None:
        case.run("1/2")
        with unchanged(case):
            for more in ((), ("--overwrite",)):
                assert_refused(case.cli(*more), 8, "a run in slices", "finish")
        case.run("2/2")
        case.assert_published()

    def test_hazard_a_slice_of_an_unfinished_whole(self, case: Sliced) -> None:
        interrupt(case.merge, 2)
        with unchanged(case):
            assert_refused(case.cli("--slice", "1/2"), 8, "not in slices")
        case.merge.mend(case.complete)

    def test_hazard_a_slice_beside_a_running_whole(
        self, case: Sliced, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("uipe_merge.output.slices._BEGINNING", 0.0)
        with hold(case.merge.partial):
            assert_refused(case.cli("--slice", "1/2"), 9, "is writing this output")

    def test_hazard_the_same_slice_twice(self, tmp_path: Path) -> None:
        case = sliced(tmp_path, shards=20)
        child = Child(case.merge.command("--slice", "1/2"))
        assert child.stop_when(lambda: case.recorded("1/2") > 0)
        assert_refused(case.cli("--slice", "1/2"), 9, f"process {child.pid}")
        assert case.run("2/2").published is None  # another one goes on
        child.send(signal.SIGCONT)
        assert child.finish() == (0, "")
        case.assert_published()

    def test_what_runs_once_more_publishes_when_it_ends(self, case: Sliced) -> None:
        case.run("1/2")
        with hold(case.slice_directory("1/2")):
            report = case.run("2/2")
            assert (report.published, report.elsewhere, report.missing) == (None, True, {})
        assert case.run("1/2").published is not None
        case.assert_published()

    def test_hazard_a_value_that_is_not_finite_ends_its_slice_alone(self, tmp_path: Path) -> None:
        import torch
        from helpers import read_tensors, write_checkpoint

        case = sliced(tmp_path, shards=4, alpha=1.0)
        tensors = read_tensors(case.merge.inputs[1])
        tensors["model.layers.0.q_proj.weight"][0, 0] = torch.nan
        names = sorted(tensors, key=lambda name: (("down" in name), name))
        write_checkpoint(case.merge.inputs[1], {name: tensors[name] for name in names}, shards=4)
        codes = [case.cli("--slice", f"{number}/4").code for number in range(1, 5)]
        assert sorted(codes) == [0, 0, 0, 7]
        assert_refused(run_here("finish", case.merge.output), 8, "1 shards are missing")

    def test_hazard_an_output_by_url(self, case: Sliced) -> None:
        words = (*case.merge.inputs, "--alpha", 0, "-o", "memory://out", "--slice", "1/2")
        assert_refused(run_here(*words), 2, "is a URL", "--executor ray")

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--slice", "3/2"), "'3/2' is no slice"),
            (("--slice", "1/2", "--executor", "ray"), "choose one of the two"),
            (("--ray-address", "127.0.0.1:1"), "--ray-address without --executor ray"),
        ],
    )
    def test_hazard_options_that_make_no_sense(
        self, case: Sliced, more: tuple[str, ...], message: str
    ) -> None:
        assert_refused(case.cli(*more), 2, message)

    def test_hazard_too_little_room_for_what_is_left(
        self, case: Sliced, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("uipe_merge.output.place._MARGIN", 2**60)
        assert_refused(case.cli("--slice", "1/2"), 8, "are free")


def test_a_run_is_begun_once(tmp_path: Path) -> None:
    case = sliced(tmp_path, shards=2)
    case.run("1/2")
    filesystem = LocalFileSystem()
    slices = Slices(filesystem, Staging(filesystem, case.merge.output))
    with pytest.raises(UipeMergeError, match="differs in"):
        slices.enter({"alpha": "other"}, {}, "")
