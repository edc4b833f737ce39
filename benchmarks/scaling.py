"""What a second worker brings on this machine: threads, slices and Ray workers, in turn.

    python benchmarks/scaling.py                 # half a gigabyte, three rounds
    python benchmarks/scaling.py --size 2.5GB

Every round takes one after the other of all that is measured, so that a slow minute hits all of
them alike. The seconds are those that the program reports: without its own start, but with that of
the Ray workers, which every run starts anew. Those of slices are from the first start to the last end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import geometry
from machine import load
from pairs import Pair, write_model_pair

from uipe_merge.recipe import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE, SHARDS, ROUNDS = "500MB", 8, 3

Measured = dict[str, "Callable[[int], float]"]


class Merge:
    """The merge that is measured.

    Attributes:
        output: Where it writes; removed before every run.
    """

    def __init__(self, pair: Pair) -> None:
        """Write the model beside the pair."""
        self._pair = pair
        self.output = pair.original.parent / "out"

    def command(self, *more: str) -> list[str]:
        """Return a command line."""
        words = [*map(str, self._pair.both()), "--alpha", "2", "-o", str(self.output), "--json"]
        return [sys.executable, "-m", "uipe_merge", *words, *more]

    def threads(self, number: int) -> float:
        """Merge with threads; return the seconds."""
        return self._seconds("--threads", str(number))

    def ray(self, address: str, number: int) -> float:
        """Merge on a cluster; return the seconds."""
        where = ("--executor", "ray", "--ray-address", address, "--threads", str(number))
        return self._seconds(*where)

    def slices(self, number: int) -> float:
        """Merge in slices at once, each in one thread; return the seconds until all have ended."""
        self._clear()
        parts = [f"{part}/{number}" for part in range(1, number + 1)]
        began = time.monotonic()
        running = [
            subprocess.Popen(
                self.command("--slice", part, "--threads", "1"), stdout=subprocess.DEVNULL
            )
            for part in parts
        ]
        codes = [process.wait() for process in running]
        seconds = time.monotonic() - began
        if any(codes):
            sys.exit("a slice failed")
        return seconds

    def _seconds(self, *more: str) -> float:
        self._clear()
        done = subprocess.run(self.command(*more), check=True, capture_output=True)
        seconds = json.loads(done.stdout)["seconds"]
        assert isinstance(seconds, float)  # noqa: S101 - the program's own figure
        return seconds

    def _clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        os.sync()


@contextmanager
def ray_address() -> Iterator[str | None]:
    """Run a cluster of one node on this machine, if Ray is installed."""
    if importlib.util.find_spec("ray") is None:
        yield None
        return
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    cluster: Any = Cluster()
    cluster.add_node(
        num_cpus=2,
        node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=80 * 2**20,
    )
    try:
        # Ray takes the loopback by its usual name for another address of this machine.
        yield cluster.address.replace("127.0.0.1", "[::ffff:127.0.0.1]")
    finally:
        cluster.shutdown()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default=SIZE, help="bytes of a checkpoint [%(default)s]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="[%(default)s]")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=Path.cwd()))
    try:
        pair = Pair(work / "original", work / "unlearned")
        write_model_pair(pair, geometry(parse_size(asked.size)), SHARDS)
        merge = Merge(pair)
        with ray_address() as address:
            measured: Measured = {"threads": merge.threads, "slices at once": merge.slices}
            if address is not None:
                measured["Ray workers"] = lambda number: merge.ray(address, number)
            show(asked.size, measured, asked.rounds)
    finally:
        shutil.rmtree(work)


def show(size: str, measured: Measured, rounds: int) -> None:
    """Take turns, and print the medians and their ratios."""
    times: dict[tuple[str, int], list[float]] = {
        (name, number): [] for name in measured for number in (1, 2)
    }
    busy = load()
    for name, number in list(times) * rounds:
        times[name, number].append(measured[name](number))
    processors = len(os.sched_getaffinity(0))
    lines = [
        f"{size} in {SHARDS} shards, {processors} processors, medians of {rounds}, load {busy:.1f}",
        "",
        "| what | 1 | 2 | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name in measured:
        one, two = (statistics.median(times[name, number]) for number in (1, 2))
        lines.append(f"| {name} | {one:.2f} s | {two:.2f} s | {one / two:.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
