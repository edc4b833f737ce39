"""Many merges in a row in one process: nothing grows, and what was global is as it was found."""

import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from helpers import write_pair
from test_families import FAMILIES, make_pair

from uipe_merge import Deep, api, load
from uipe_merge.errors import UsageError
from uipe_merge.steering import Steering

TRACED, RESIDENT, ALONE = 2**20, 24 * 2**20, 6 * 2**20
"""Bytes that memory may grow by after the warm-up, whatever the number of runs: what Python counts,
what the system counts, and the same where the C library keeps one pool for all threads. With several,
each comes to hold what a run needs at most, one after the other."""


class Held(NamedTuple):
    """What a process has."""

    descriptors: list[str]
    threads: list[str]
    traced: int
    resident: int


def held() -> Held:
    gc.collect()
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return Held(
        sorted(os.readlink(link) for link in links if os.path.exists(link)),
        sorted(thread.name for thread in threading.enumerate()),
        tracemalloc.get_traced_memory()[0],
        psutil.Process().memory_info().rss,
    )


def soak(once: Callable[[int], None], warm_up: int, runs: int, resident: int) -> None:
    """Run something again and again, and compare what is held before and after."""
    tracemalloc.start()
    try:
        for number in range(warm_up):
            once(number)
        before = held()
        for number in range(warm_up, warm_up + runs):
            once(number)
        after = held()
    finally:
        tracemalloc.stop()
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.traced - before.traced < TRACED
    assert after.resident - before.resident < resident


class Runs:
    """What a program that merges all day calls."""

    def __init__(self, root: Path, *, models: bool) -> None:
        self._pair = write_pair(root, shards=2)
        self._root = root
        self._models = make_pair(FAMILIES["Llama, tied"], root / "models") if models else None
        self._model = load(*self._models, alpha=1.0) if self._models else None

    def __call__(self, number: int) -> None:
        output = self._root / "out"
        steering = Steering(control="random") if number % 3 == 0 else Steering()
        alpha = 1 + number / 100
        api.merge(
            *self._pair,
            output,
            alpha=alpha,
            steering=steering,
            overwrite=True,
            threads=1 + number % 3,
            progress=False,
        )
        if number % 4 == 0:
            found = api.verify(output, deep=Deep(1.0), progress=False)
            assert found.problems == []
            api.inspect(*self._pair, progress=False)
        if number % 8 == 0:
            grid = self._root / "grid"
            api.grid(*self._pair, grid, [0.0, 2.0], overwrite=True, progress=False)
            with pytest.raises(UsageError):
                api.merge(*self._pair, output, progress=False)
        if self._model is not None and number % 10 == 0:
            self._model.set_alpha(alpha)


def test_nothing_grows(tmp_path: Path) -> None:
    soak(Runs(tmp_path, models=False), warm_up=5, runs=20, resident=RESIDENT)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_nothing_grows_in_200_runs(tmp_path: Path) -> None:
    """In a process of its own, which takes its memory from one pool."""
    code = (
        "import pathlib, sys, test_soak as soak\n"
        "runs = soak.Runs(pathlib.Path(sys.argv[1]), models=True)\n"
        "soak.soak(runs, warm_up=40, runs=200, resident=soak.ALONE)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_has_its_threads_afterwards(tmp_path: Path, threads: int) -> None:
    pair = write_pair(tmp_path)
    found: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        given: dict[str, Any] = {"threads": threads, "progress": False}
        runs: list[Callable[[], object]] = [
            lambda: api.merge(*pair, tmp_path / "merge", alpha=2.0, dtype="float16", **given),
            lambda: api.grid(*pair, tmp_path / "grid", [1.0], **given),
            lambda: api.inspect(*pair, dtype="float16", **given),
        ]
        for run in runs:
            run()
            other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            other.start()
            other.join()
            found.append(torch.get_num_threads())
        api.verify(tmp_path / "merge", deep=True, progress=False)
        found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == [3] * 7
