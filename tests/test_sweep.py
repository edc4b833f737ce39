"""Every system call of a run, one after the other: killed at it, or told that it failed.

Needs strace. The calls are counted in one undisturbed run; since nothing in a run is left to
chance on one thread, the N-th call of the next run is the same one.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import contents
from runs import Merge, in_memory

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(3600)]

Record = Callable[[str, object], None]

STRACE = shutil.which("strace")

CHANGING = [
    *("mkdir", "openat", "flock", "link", "linkat", "write", "pwrite64", "fsync", "close"),
    *("rename", "renameat2", "unlink", "unlinkat", "rmdir"),
]
_LINE = re.compile(r"(\d+) +(\w+)\((.*)")


def strace(merge: Merge, *options: str, overwrite: bool) -> tuple[int, str]:
    """Run the program under strace; return how it ended and what it printed on stderr."""
    assert STRACE is not None
    more = ["--overwrite"] if overwrite else []
    done = subprocess.run(
        [STRACE, "-f", "-qq", *options, sys.executable, "-m", "uipe_merge", *merge.command(*more)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def _traceable(tmp_path_factory: pytest.TempPathFactory) -> None:
    if STRACE is None:
        pytest.skip("strace is not installed")
    done = subprocess.run([STRACE, "-o", os.devnull, "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.decode().strip()}")


class Sweep:
    """A merge of two shards, its bytes, and the calls in which it touches its files."""

    def __init__(self, root: Path, *, overwrite: bool) -> None:
        self.merge = Merge(root, shards=2)
        self.overwrite = overwrite
        self.old_merge = Merge(root, alpha=-1.0, shards=2).write_inputs()
        self.complete = self.merge.undisturbed()
        self.inputs = [contents(path) for path in self.merge.inputs]
        self.old: dict[str, bytes] | None = None

    def reset(self) -> None:
        self.merge.clear()
        if self.overwrite:
            self.old_merge.run()
            self.old = contents(self.merge.output)

    def numbers(self, call: str) -> list[int]:
        """Which calls of this name, counted from 1, have to do with the merge's files."""
        self.reset()
        log = self.merge.root.parent / "strace.log"
        code, err = strace(
            self.merge, "-y", "-o", str(log), "-e", f"trace={call}", overwrite=self.overwrite
        )
        assert code == 0, err
        matches = [match for line in log.read_text().splitlines() if (match := _LINE.match(line))]
        main = [match for match in matches if match[1] == matches[0][1]]
        mine = str(self.merge.root)
        numbers = [number for number, match in enumerate(main, 1) if mine in match[3]]
        if not numbers:
            pytest.skip(f"a run makes no {call} call here")
        return numbers

    def check(self, what: str) -> None:
        """Absent, untouched or complete; a rerun makes it complete; nothing else is left."""
        self.merge.state(self.complete, self.old)
        assert self.merge.left_over() in ([], [self.merge.partial.name]), what
        self.merge.mend(self.complete, overwrite=self.overwrite)
        assert [contents(path) for path in self.merge.inputs] == self.inputs, what


def inject(sweep: Sweep, call: str, number: int, fault: str) -> tuple[int, str]:
    sweep.reset()
    rule = f"inject={call}:{fault}:when={number}"
    options = ("-o", os.devnull, "-e", f"trace={call}", "-e", rule)
    return strace(sweep.merge, *options, overwrite=sweep.overwrite)


@pytest.mark.usefixtures("_traceable")
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("call", CHANGING)
def test_sigkill_at_every_system_call_then_run_again_same_bytes(
    tmp_path: Path, call: str, overwrite: bool, record_property: Record
) -> None:
    with in_memory(tmp_path) as memory:
        sweep = Sweep(memory / "merge", overwrite=overwrite)
        numbers = sweep.numbers(call)
        record_property("cases", len(numbers))
        for number in numbers:
            code, err = inject(sweep, call, number, "signal=KILL")
            assert code == -signal.SIGKILL, (call, number, code, err)
            sweep.check(f"{call} {number}")


ERRORS = {
    "mkdir": ["ENOSPC", "EIO"],
    "openat": ["EMFILE", "ENOSPC", "EIO", "EINTR"],
    "flock": ["ENOLCK"],
    "link": ["EPERM", "EIO"],
    "linkat": ["EPERM", "EIO"],
    "write": ["ENOSPC", "EIO", "EINTR"],
    "pwrite64": ["ENOSPC", "EDQUOT", "EIO", "EINTR"],
    "fsync": ["EIO", "ENOSPC", "EINTR"],
    "close": ["EIO", "ENOSPC", "EINTR"],
    "rename": ["EIO", "ENOSPC", "EROFS"],
    "renameat2": ["EIO", "ENOSYS", "EINVAL"],
    "unlink": ["EIO"],
    "unlinkat": ["EIO"],
    "rmdir": ["EIO"],
    "preadv": ["EIO", "EINTR"],
    "preadv2": ["EIO", "EINTR"],
}


@pytest.mark.usefixtures("_traceable")
@pytest.mark.parametrize(
    ("call", "error"), [(call, error) for call, errors in ERRORS.items() for error in errors]
)
def test_error_of_every_system_call_is_one_line_and_can_be_continued(
    tmp_path: Path, call: str, error: str, record_property: Record
) -> None:
    replacing = call in ("renameat2", "unlinkat", "rmdir")
    with in_memory(tmp_path) as memory:
        sweep = Sweep(memory / "merge", overwrite=replacing)
        numbers = sweep.numbers(call)
        record_property("cases", len(numbers))
        for number in numbers:
            code, err = inject(sweep, call, number, f"error={error}")
            what = f"{call} {number} {error}: {code} {err}"
            # Some errors are no obstacle: an interrupted call is repeated, a lock has two legs.
            assert code in (0, 8), what
            assert "Traceback" not in err, what
            assert len(err.splitlines()) == (1 if code else 0), what
            if not code:
                assert sweep.merge.state(sweep.complete) == "complete", what
            sweep.check(what)
