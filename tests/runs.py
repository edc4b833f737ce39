"""Merges for the tests of crashes: in this process or in a child, disturbed or not."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from fakes_output import FailingFileSystem
from helpers import contents, moved, write_checkpoint

from uipe_merge import api, running
from uipe_merge.errors import OutputError
from uipe_merge.executors import Serial, Threads
from uipe_merge.output.filesystem import FileSystem, LocalFileSystem
from uipe_merge.progress import Progress, Silent
from uipe_merge.report import MergeReport

State = Literal["absent", "old", "complete"]

SIDECARS = {
    "README.md": "---\nlicense: mit\n---\n# Unlearned\n",
    "tokenizer.json": "{}\n",
    "code/modeling_own.py": "# carried as data\n",
    "code/deep/notes.txt": "carried as data\n",
}


@dataclass(frozen=True)
class Merge:
    """One merge of a small pair, as often as a test likes.

    Attributes:
        root: The directory of everything: the inputs, the output and the partial directory.
        alpha: 0 and −1 need no torch, and start in a fraction of the time.
        disk: Where the output goes instead, if not into ``root``.
    """

    root: Path
    alpha: float = 0.0
    shards: int = 3
    threads: int = 1
    options: dict[str, str] = field(default_factory=dict)
    disk: Path | None = None

    @property
    def inputs(self) -> tuple[Path, Path]:
        return self.root / "original", self.root / "unlearned"

    @property
    def output(self) -> Path:
        return (self.disk or self.root) / "out"

    @property
    def partial(self) -> Path:
        return self.output.with_name(".out.uipe-partial")

    @property
    def model(self) -> Path:
        return self.partial / "model"

    @property
    def journal(self) -> Path:
        return self.partial / "journal"

    def write_inputs(self, size: int = 8) -> "Merge":
        """Write the pair: two tensors a shard, of ``size`` × 16 elements."""
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"model.layers.{number}.{kind}.weight": torch.randn(
                size, 16, generator=generator
            ).bfloat16()
            for kind in ("q_proj", "down_proj")
            for number in range(self.shards)
        }
        original, unlearned = self.inputs
        write_checkpoint(original, tensors, shards=self.shards)
        write_checkpoint(unlearned, moved(tensors), shards=self.shards, files=SIDECARS)
        return self

    def run(
        self,
        filesystem: FileSystem | None = None,
        progress: Progress | None = None,
        *,
        overwrite: bool = False,
    ) -> MergeReport:
        """Merge in this process."""
        plan = api.plan(
            *self.inputs, self.output, alpha=self.alpha, overwrite=overwrite, dtype=self.dtype
        )
        executor = Serial() if self.threads == 1 else Threads(self.threads)
        return running.run(plan, executor, filesystem or LocalFileSystem(), progress or Silent())

    def mend(self, complete: dict[str, bytes], *, overwrite: bool = False) -> int:
        """Run the same command after one that died; return the shards not written again.

        A run that died when its output was complete and its journal gone has nothing to go on
        with: then the same command is refused like any other that finds an output, and tidies up.
        """
        finished = self.output.exists() and not self.journal.exists()
        resumed = 0
        if finished and not overwrite:
            with pytest.raises(OutputError, match="exists and is not empty"):
                self.run()
        else:
            resumed = self.run(overwrite=overwrite).resumed
        assert self.state(complete) == "complete"
        assert self.left_over() == []
        return resumed

    @property
    def dtype(self) -> str:
        return self.options.get("--dtype", "auto")

    def command(self, *more: str) -> list[str]:
        """The command line of the same merge."""
        words = [*map(str, self.inputs), "--alpha", str(self.alpha), "-o", str(self.output)]
        options = [word for option in self.options.items() for word in option]
        return [*words, "--threads", str(self.threads), "-q", *options, *more]

    def undisturbed(self) -> dict[str, bytes]:
        """Every file of the output of a run that is left alone; the output is removed again."""
        self.run()
        expected = contents(self.output)
        self.clear()
        return expected

    def clear(self) -> None:
        """Remove the output and the partial directory."""
        for path in (self.output, self.partial):
            shutil.rmtree(path, ignore_errors=True)

    def state(self, complete: dict[str, bytes], old: dict[str, bytes] | None = None) -> State:
        """What is at the output path; anything but the three fails."""
        if not os.path.lexists(self.output):
            return "absent"
        found = contents(self.output)
        if old is not None and found == old:
            return "old"
        assert [name for name in found | complete if found.get(name) != complete.get(name)] == []
        return "complete"

    def lines(self) -> int:
        """How far a run is: the whole lines of its journal, the header and one a shard."""
        try:
            return self.journal.read_bytes().count(b"\n")
        except OSError:
            return 0

    def left_over(self) -> list[str]:
        """What lies beside the inputs and the output."""
        known = (*self.inputs, self.output)
        return sorted(path.name for path in self.output.parent.iterdir() if path not in known)


@contextmanager
def in_memory(fallback: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a sweep of faults need not wait for a disk."""
    memory = Path("/dev/shm")  # noqa: S108 - only the place of a directory with a random name
    if not os.access(memory, os.W_OK):
        yield fallback
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def count_calls(merge: Merge, name: str) -> list[int]:
    """The numbers of the calls of this name in an undisturbed run, which is cleared away."""
    fake = FailingFileSystem(merge.root)
    merge.run(fake)
    merge.clear()
    return [number for number, call in enumerate(fake.calls, 1) if call.name == name]


def interrupt(merge: Merge, shards: int) -> None:
    """Leave behind what a run leaves that dies after this many shards."""
    fault = count_calls(merge, "append")[shards]
    try:
        merge.run(FailingFileSystem(merge.root, fault))
    except OutputError:
        return
    raise AssertionError("the run was to be interrupted")


class Child:
    """The program in a process of its own, to be watched, stopped and killed."""

    def __init__(
        self,
        arguments: list[str],
        stderr: int = subprocess.PIPE,
        ignored: tuple[signal.Signals, ...] = (),
    ) -> None:
        """Start it; signals are ``ignored`` as under nohup, whatever this process ignores."""
        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in asking}
        for number in asking:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uipe_merge", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        for number, handler in before.items():
            signal.signal(number, handler)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so, or the process has ended; tell whether it runs still."""
        while self._process.poll() is None:
            if condition():
                return True
            time.sleep(0.0005)
        return False

    def send(self, *signals: signal.Signals) -> None:
        for number in signals:
            self._process.send_signal(number)

    def stop_when(self, condition: Callable[[], bool]) -> bool:
        """Freeze the process as soon as something is so; tell whether it had not ended."""
        running = self.wait_for(condition)
        if running:
            self.send(signal.SIGSTOP)
        return running

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return the code (negative: the signal) and stderr."""
        _, err = self._process.communicate(timeout=120)
        return self._process.returncode, (err or b"").decode()
