"""Runs programs and measures them: wall time, processor time, peak memory.

Memory is what the kernel says of the child that ended (``wait4``). That figure starts at the
peak of the process that started it, so this process must stay small: whatever takes memory,
making checkpoints and comparing them, is done ``aside``, in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_READ = 2**20


class FailedError(RuntimeError):
    """A program under measurement did not end well."""


class Outcome(NamedTuple):
    """One run of a program, or of several one after another.

    Attributes:
        wall: Seconds from start to end.
        processor: Seconds of user and system time.
        peak: Resident bytes at most; the largest of several.
        seconds: What the program itself said it took: ``seconds`` of the JSON it printed.
    """

    wall: float
    processor: float
    peak: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing to measure.

    Attributes:
        name: How the tables call it.
        commands: What is run, one after another; the times add up.
        reads: Directories whose files are read beforehand, so that the page cache is warm.
        makes: The directory the commands make, removed before every run.
    """

    name: str
    commands: Sequence[Sequence[str | Path]]
    reads: Sequence[Path] = ()
    makes: Path | None = None

    def clean(self) -> None:
        """Remove what a run made."""
        if self.makes is not None:
            shutil.rmtree(self.makes, ignore_errors=True)

    def run(self) -> Outcome:
        """Run it once, from a clean start.

        Raises:
            FailedError: A command ended with another code than 0.
        """
        self.clean()
        warm(self.reads)
        os.sync()  # or the write-back of what came before competes with this run
        outcomes = [run(command) for command in self.commands]
        return Outcome(
            sum(outcome.wall for outcome in outcomes),
            sum(outcome.processor for outcome in outcomes),
            max(outcome.peak for outcome in outcomes),
            outcomes[-1].seconds,
        )


@dataclass(frozen=True, slots=True)
class Series:
    """The runs of one contender.

    Attributes:
        name: How the tables call it.
        outcomes: One for each run, in order; never empty.
    """

    name: str
    outcomes: Sequence[Outcome]

    @property
    def wall(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(outcome.wall for outcome in self.outcomes)

    @property
    def spread(self) -> tuple[float, float]:
        """Shortest and longest wall time in seconds."""
        times = [outcome.wall for outcome in self.outcomes]
        return min(times), max(times)

    @property
    def processor(self) -> float:
        """Median processor time in seconds."""
        return statistics.median(outcome.processor for outcome in self.outcomes)

    @property
    def seconds(self) -> float | None:
        """Median of what the program said it took; ``None`` where it says nothing."""
        said = [outcome.seconds for outcome in self.outcomes if outcome.seconds is not None]
        return statistics.median(said) if said else None

    @property
    def peak(self) -> int:
        """Peak resident bytes of the worst run: a bound has to hold every time."""
        return max(outcome.peak for outcome in self.outcomes)


def interleave(
    contenders: Iterable[Contender], runs: int, say: Callable[[str], None]
) -> dict[str, Series]:
    """Run all contenders in turn, A B C A B C …, so that a slow minute hits all alike.

    What they made in the last round is left there.
    """
    entrants = list(contenders)
    outcomes: dict[str, list[Outcome]] = {entrant.name: [] for entrant in entrants}
    for number in range(1, runs + 1):
        for entrant in entrants:
            outcome = entrant.run()
            outcomes[entrant.name].append(outcome)
            if number < runs:
                entrant.clean()
            said = "" if outcome.seconds is None else f" (says {outcome.seconds:.2f} s)"
            say(f"{number}/{runs} {entrant.name}: {outcome.wall:.2f} s{said}")
    return {name: Series(name, made) for name, made in outcomes.items()}


def run(command: Sequence[str | Path], extra: Mapping[str, str] | None = None) -> Outcome:
    """Run one command to its end and measure it.

    Raises:
        FailedError: It ended with another code than 0; with the end of what it printed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **(extra or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        printed = [_content(stream.fileno()) for stream in (out, err)]
    if child.returncode:
        tail = "\n".join("".join(printed).splitlines()[-8:])
        raise FailedError(f"'{' '.join(map(str, command))}' ended with {child.returncode}:\n{tail}")
    processor = usage.ru_utime + usage.ru_stime
    return Outcome(wall, processor, usage.ru_maxrss * 1024, _seconds(printed[0]))


def warm(directories: Iterable[Path]) -> None:
    """Read every file of these directories, so that the next reader finds them in memory."""
    buffer = bytearray(_READ)
    for directory in directories:
        for path in sorted(directory.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def aside(
    function: Callable[Parameters, Returned],
    *args: Parameters.args,
    **kwargs: Parameters.kwargs,
) -> Returned:
    """Call a function of an importable module in a fresh process; return what it returns."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _content(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode(errors="replace")


def _seconds(printed: str) -> float | None:
    """Return ``seconds`` of a JSON object, if that is what was printed."""
    if not printed.startswith("{"):
        return None
    said = json.loads(printed).get("seconds")
    return float(said) if isinstance(said, int | float) else None
