"""States that a power cut may leave, reopened by the program: nothing, the old model, or all.

The states are those of ``crash_twin``, at every boundary of the durable write. `make test` looks
at a thousand of each scenario and runs the command again from some of them; the sweep looks at
all, and runs it again from every one but a part of the grid's.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from crash_twin import Seen, State, Twin, materialise, sampled
from helpers import contents, moved, read_tensors, write_checkpoint
from runs import Merge, in_memory, interrupt

from uipe_merge import api, gridding, grids, running
from uipe_merge.executors import Serial
from uipe_merge.inputs import open_inputs
from uipe_merge.output.filesystem import FileSystem, LocalFileSystem
from uipe_merge.output.lock import nothing_left
from uipe_merge.output.place import partial_directory
from uipe_merge.progress import Progress, Silent
from uipe_merge.recipe import Recipe
from uipe_merge.report import MergeReport
from uipe_merge.steering import Steering, Update

Record = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(1800)

LOOKED_AT, RERUN = 1000, 100
"""Of the states of a scenario, in `make test`."""


@dataclass(frozen=True)
class Steered(Merge):
    """A merge whose step depends on what is measured first, with factors or without."""

    rank: int | None = None

    def write_inputs(self, size: int = 8) -> "Steered":
        super().write_inputs(size)
        tensors = read_tensors(self.inputs[0])
        write_checkpoint(self.root / "related", moved(tensors, seed=5), shards=self.shards)
        return self

    def run(
        self,
        filesystem: FileSystem | None = None,
        progress: Progress | None = None,
        *,
        overwrite: bool = False,
    ) -> MergeReport:
        related = (Update(str(self.root / "related")),)
        plan = api.plan(
            *self.inputs,
            self.output,
            alpha=1.0,
            steering=Steering(along=related, rank=self.rank),
            overwrite=overwrite,
        )
        return running.run(plan, Serial(), filesystem or LocalFileSystem(), progress or Silent())


class Scenario:
    """A command, what lies on the disk before it, and what may lie there after it died.

    Args:
        merge: The command; its disk holds nothing but what it makes.
        prepare: Puts in place what is there before.
        overwrite: Whether that is a model to be replaced.
        exchanges: Whether the system can swap directories.
    """

    def __init__(
        self,
        merge: Merge,
        prepare: Callable[[Merge], None] = Merge.clear,
        *,
        overwrite: bool = False,
        exchanges: bool = True,
    ) -> None:
        assert merge.disk is not None
        self.merge = merge
        self.disk = merge.disk
        self.overwrite = overwrite
        self.exchanges = exchanges
        self.complete = merge.undisturbed()
        prepare(merge)
        self.before = _state(merge.disk)
        self.old = contents(merge.output) if overwrite else None

    def states(self, seed: int) -> list[State]:
        """Run the command, and return what a power cut on the way could leave."""
        seen: Seen = {}
        twin = Twin(self.disk, seen, seed=seed, exchanges=self.exchanges)
        self.merge.run(twin, overwrite=self.overwrite)
        twin.finish()
        assert self.merge.state(self.complete) == "complete"
        return list(seen.values())

    def look(self) -> str:
        """Hold what lies on the disk against the promise."""
        found = self.merge.state(self.complete, self.old)
        if found == "absent" and self.old is not None:
            # Only where the system cannot swap; the old model then stands aside, whole.
            assert not self.exchanges
            assert contents(self.merge.model.with_name("model.old")) == self.old
        if found == "complete" and not self.overwrite:
            # The command would be refused: without the journal nobody knows what else is there.
            assert self.merge.journal.exists() or nothing_left(self.merge.partial)
        assert self.merge.left_over() in ([], [self.merge.partial.name])
        return found

    def verify(self) -> None:
        """What is at the output path is what its manifest says."""
        if self.merge.output.exists():
            assert api.verify(self.merge.output, progress=False).problems == []

    def mend(self) -> None:
        self.merge.mend(self.complete, overwrite=self.overwrite)


@dataclass(frozen=True)
class Grid(Merge):
    """A grid of two models, as one output."""

    @property
    def variants(self) -> list[Path]:
        return [self.output / name for name in ("uipe-minus1", "uipe-2")]

    def run(
        self,
        filesystem: FileSystem | None = None,
        progress: Progress | None = None,
        *,
        overwrite: bool = False,
    ) -> MergeReport:
        recipe = Recipe(1.0)
        opened = open_inputs(*self.inputs, recipe)
        planned = grids.plan_grid(opened, self.output, [-1.0, 2.0], recipe)
        gridding.require_grid_place(planned)
        done = gridding.run_grid(
            planned, Serial(), filesystem or LocalFileSystem(), progress or Silent()
        )
        return next(iter(done.reports.values()), None)  # type: ignore[return-value] # unused here


class GridScenario(Scenario):
    """The same of a grid: each of its models keeps the promise by itself."""

    def __init__(self, merge: Grid) -> None:
        super().__init__(merge)
        self.grid = merge

    def look(self) -> str:
        found = set()
        for variant in self.grid.variants:
            if not os.path.lexists(variant):
                found.add("absent")
                continue
            prefix = f"{variant.name}/"
            model = {
                name.removeprefix(prefix): content
                for name, content in self.complete.items()
                if name.startswith(prefix)
            }
            assert contents(variant) == model
            partial = partial_directory(variant)
            assert (partial / "journal").exists() or nothing_left(partial)
            found.add("complete")
        document = self.merge.output / "grid.json"
        if document.exists():
            assert len(json.loads(document.read_bytes())["variants"]) == len(self.grid.variants)
        return "absent" if "absent" in found else "complete"

    def verify(self) -> None:
        for variant in filter(Path.exists, self.grid.variants):
            assert api.verify(variant, progress=False).problems == []

    def mend(self) -> None:
        self.merge.run()
        assert contents(self.merge.output) == self.complete
        assert self.merge.left_over() == []


def _state(disk: Path) -> State:
    """What lies on a disk now."""
    return {
        entry.relative_to(disk).as_posix(): (
            entry.stat().st_ino if entry.is_dir() else entry.read_bytes()
        )
        for entry in sorted(disk.rglob("*"))
    }


def replaced(merge: Merge) -> None:
    Merge(merge.root, alpha=-1.0, shards=merge.shards, disk=merge.disk).run()


def half(merge: Merge) -> None:
    interrupt(merge, shards=1)


def grid(root: Path, disk: Path) -> Scenario:
    merge = Grid(root, shards=1, disk=disk)
    merge.write_inputs()
    return GridScenario(merge)


def pair(root: Path, disk: Path, shards: int = 2) -> Merge:
    return Merge(root, shards=shards, disk=disk).write_inputs()


SCENARIOS: dict[str, Callable[[Path, Path], Scenario]] = {
    "fresh": lambda root, disk: Scenario(pair(root, disk, shards=3)),
    "overwrite": lambda *at: Scenario(pair(*at), replaced, overwrite=True),
    "overwrite by renames": lambda *at: Scenario(
        pair(*at), replaced, overwrite=True, exchanges=False
    ),
    "resumed": lambda *at: Scenario(pair(*at), half),
    "steered": lambda root, disk: Scenario(Steered(root, shards=2, disk=disk).write_inputs()),
    "low rank": lambda root, disk: Scenario(
        Steered(root, shards=1, disk=disk, rank=2).write_inputs()
    ),
    "grid": grid,
}


def scenario(root: Path, name: str) -> Scenario:
    (root / "disk").mkdir()
    return SCENARIOS[name](root, root / "disk")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as directory:
        yield directory


def check(case: Scenario, states: list[State], seed: int, rerun: int) -> set[str]:
    """Look at every state, and run the command again from some; return what there is."""
    found = set()
    for state in states:
        materialise(state, case.disk)
        found.add(case.look())
    for state in sampled(states, rerun, seed):
        materialise(state, case.disk)
        case.verify()
        case.mend()
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_hazard_every_state_of_a_power_cut_keeps_the_promise(
    memory: Path, name: str, record_property: Record
) -> None:
    case = scenario(memory, name)
    states = case.states(seed=0)
    assert len(states) > LOOKED_AT
    some = sampled(states, LOOKED_AT, seed=0)
    found = check(case, some, 0, RERUN)
    record_property("cases", len(some))
    assert found >= {"old" if case.overwrite else "absent"}


@pytest.mark.parametrize("name", ["fresh", "overwrite", "steered"])
def test_a_power_cut_in_the_run_that_goes_on_after_one(
    memory: Path, name: str, record_property: Record
) -> None:
    again(memory, name, first=3, second=100, rerun=10, record=record_property)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_state_of_a_power_cut_is_gone_on_from(
    memory: Path, name: str, seed: int, record_property: Record
) -> None:
    case = scenario(memory, name)
    states = case.states(seed)
    found = check(case, states, seed, rerun=1500)
    record_property("cases", len(states))
    assert found == {"complete", "old" if case.overwrite else "absent"} | (
        set() if case.exchanges else {"absent"}
    )


@pytest.mark.sweep
@pytest.mark.parametrize("name", SCENARIOS)
def test_power_cut_after_power_cut(memory: Path, name: str, record_property: Record) -> None:
    again(memory, name, first=15, second=300, rerun=30, record=record_property)


def again(memory: Path, name: str, *, first: int, second: int, rerun: int, record: Record) -> None:
    """Let the power fail in the run that goes on after it failed, at ``first`` of the states."""
    case = scenario(memory, name)
    count = 0
    for number, state in enumerate(sampled(case.states(seed=2), first, seed=2)):
        materialise(state, case.disk)
        if case.look() == "complete" and not case.overwrite:
            continue  # the command has nothing to do, and says so
        states = sampled(case.states(seed=number), second, seed=number)
        check(case, states, number, rerun)
        count += len(states)
    record("cases", count)
    assert count > second
