"""SIGKILL at any moment, and the same command again: the same bytes as without it."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers import contents
from runs import Child, Merge

Record = Callable[[str, object], None]

SHARDS = 40
PHASES = SHARDS + 8  # after the last shard comes, slower, the rest: card, manifest, publishing


class Killer:
    """Kills runs of one merge at random moments, and looks at what each leaves behind."""

    def __init__(self, root: Path, *, seed: int, alpha: float = 0.0, threads: int = 1) -> None:
        self.merge = Merge(root, alpha, SHARDS, threads).write_inputs()
        self.complete = self.merge.undisturbed()
        self.inputs = [contents(path) for path in self.merge.inputs]
        self.random = random.Random(seed)
        Merge(root, alpha=-1.0, shards=SHARDS).run()
        self.replaced = self.merge.output.rename(root.parent / f"{root.name}-old")
        self.old = contents(self.replaced)

    def put_old_model(self) -> None:
        """Put a finished model of another α at the output path."""
        shutil.copytree(self.replaced, self.merge.output)

    def kill(self, *more: str, ahead: int = PHASES) -> int:
        """Kill a run at a random moment; return the shards that were recorded before it.

        The moment is a place in the run, at most ``ahead`` shards further than the last one
        came, and a random while after it. A run that ends before it is killed does not count.
        """
        while True:
            begun = self.merge.lines()
            place = self.random.randrange(begun, min(begun + ahead, PHASES))
            lines = min(place, SHARDS + 1)
            pause = self.random.uniform(0, 0.005 if place == lines else 0.05 * (place - lines))
            recorded = 0
            child = Child(self.merge.command(*more))
            if child.wait_for(partial(self._reached, lines)):
                recorded = max(self.merge.lines() - 1, 0)
                time.sleep(pause)
                child.send(signal.SIGKILL)
            code, err = child.finish()
            if code == -signal.SIGKILL:
                self._look(old="--overwrite" in more)
                return recorded
            assert (code, err) == (0, "")
            assert self.merge.state(self.complete) == "complete"
            self.merge.clear()
            if "--overwrite" in more:
                self.put_old_model()

    def _reached(self, lines: int) -> bool:
        return self.merge.partial.exists() and self.merge.lines() >= lines

    def _look(self, *, old: bool) -> None:
        """The output path is absent, untouched or complete; beside it is at most one thing."""
        state = self.merge.state(self.complete, self.old if old else None)
        assert state in ("complete", "old" if old else "absent")
        assert self.merge.left_over() in ([], [self.merge.partial.name])

    def finish(self, *more: str) -> int:
        """Run the same command to its end; return the shards that were not written again."""
        resumed = self.merge.mend(self.complete, overwrite="--overwrite" in more)
        assert [contents(path) for path in self.merge.inputs] == self.inputs
        return resumed


def kill_and_rerun(killer: Killer, kills: int) -> None:
    """Each kill is followed by a rerun to completion, every other one replaces a model."""
    for number in range(kills):
        killer.merge.clear()
        more = ["--overwrite"] if number % 2 else []
        if more:
            killer.put_old_model()
        recorded = killer.kill(*more)
        to_do = killer.merge.journal.exists()
        resumed = killer.finish(*more)
        assert resumed >= recorded or not to_do, "recorded shards were written again"


def kill_in_a_row(killer: Killer, kills: int) -> None:
    """Each run goes on with what the one before left, and is killed a little further on."""
    killer.merge.clear()
    for _ in range(kills):
        killer.kill(ahead=SHARDS // kills)
        if killer.merge.output.exists():  # killed after all was done: begin again
            killer.finish()
            killer.merge.clear()
    code, err = Child(killer.merge.command()).finish()
    assert (code, err) == (0, "")
    killer.finish()


@pytest.mark.parametrize("seed", range(4))
def test_hazard_sigkill_at_random_moments_then_run_again_same_bytes(
    tmp_path: Path, seed: int, record_property: Record
) -> None:
    record_property("cases", 10)
    kill_and_rerun(Killer(tmp_path, seed=seed), kills=10)


@pytest.mark.parametrize("threads", [1, 2])
def test_hazard_sigkill_again_and_again_with_arithmetic_same_bytes(
    tmp_path: Path, threads: int, record_property: Record
) -> None:
    record_property("cases", 5)
    kill_in_a_row(Killer(tmp_path, seed=100 + threads, alpha=2.0, threads=threads), kills=5)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_three_hundred_kills(tmp_path: Path, seed: int, record_property: Record) -> None:
    record_property("cases", 20 + 5 + 5)
    threads = 1 + seed % 3
    kill_and_rerun(Killer(tmp_path / "copy", seed=seed, threads=threads), kills=20)
    killer = Killer(tmp_path / "arithmetic", seed=seed, alpha=2.0, threads=threads)
    kill_and_rerun(killer, kills=5)
    kill_in_a_row(killer, kills=5)
