"""The power fails at every call of the durable write, and takes what was not synced with it."""

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes_output import VolatileFileSystem
from helpers import contents
from runs import Merge, in_memory, interrupt

from uipe_merge.errors import OutputError


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as directory:
        yield directory


def prepare(merge: Merge, before: str) -> dict[str, bytes] | None:
    """Put in place what is there before the run: nothing, an old model, or half a run."""
    merge.clear()
    if before == "interrupted":
        interrupt(merge, shards=1)
    if before == "overwrite":
        Merge(merge.root, alpha=-1.0, shards=merge.shards).run()
        return contents(merge.output)
    return None


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("before", ["fresh", "overwrite", "interrupted"])
def test_hazard_power_cut_at_each_boundary(
    memory: Path, before: str, seed: int, record_property: Callable[[str, object], None]
) -> None:
    merge = Merge(memory / "root", shards=2).write_inputs()
    overwrite = before == "overwrite"
    complete = merge.undisturbed()
    chance = random.Random(seed)
    seen = set()
    lost = 0
    for number in itertools.count(1):
        old = prepare(merge, before)
        shutil.rmtree(memory / "grave", ignore_errors=True)
        (memory / "grave").mkdir()
        disk = VolatileFileSystem(merge.root, number, memory / "grave", merge.partial)
        with suppress(OutputError):
            merge.run(disk, overwrite=overwrite)
        undone = chance.choice([0, disk.unsynced_names, chance.randint(0, disk.unsynced_names)])
        lost += undone
        disk.power_cut(undone, zeros=chance.random() < 0.5)
        seen.add(merge.state(complete, old))
        merge.mend(complete, overwrite=overwrite)
        if not disk.failed:
            break
    record_property("cases", number)
    assert number > 50, "the run survived too early"
    assert lost > 50, "the power cuts took nothing away"
    assert seen == {"complete", "old" if overwrite else "absent"}


def test_a_finished_run_outlives_a_power_cut(memory: Path) -> None:
    merge = Merge(memory / "root").write_inputs()
    complete = merge.undisturbed()
    (memory / "grave").mkdir()
    disk = VolatileFileSystem(merge.root, 10**9, memory / "grave", merge.partial)
    merge.run(disk)
    disk.power_cut(disk.unsynced_names, zeros=True)
    assert merge.state(complete) == "complete"
