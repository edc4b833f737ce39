"""Disks, descriptors and file sizes that do not suffice: before the run, and during it."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from fakes_output import FailingFileSystem
from helpers import Result, assert_refused, contents
from runs import Child, Merge, count_calls

from uipe_merge.errors import OutputError

Mount = Callable[[str], Path]

LIMITED = (
    "import os, resource, sys\n"
    "resource.setrlimit(int(sys.argv[1]), (int(sys.argv[2]),) * 2)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'uipe_merge', *sys.argv[3:]])"
)


def run_limited(limit: int, value: int, arguments: list[str]) -> Result:
    """The program under a resource limit."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), str(value), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_hazard_rlimit_fsize_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    merge = Merge(tmp_path, shards=2).write_inputs(size=1000)
    complete = merge.undisturbed()
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run_limited(resource.RLIMIT_FSIZE, 50_000, merge.command())
    assert_refused(result, 8, str(tmp_path), "files are limited to 50000", "raise `ulimit -f`")
    assert "lower --max-shard-size" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    result = run_limited(resource.RLIMIT_FSIZE, 70_000, merge.command())
    assert result.code == 0, result.err
    assert merge.state(complete) == "complete"


@pytest.mark.parametrize("alpha", [0.0, 2.0], ids=["copying", "arithmetic"])
def test_hazard_rlimit_nofile_16_with_60_shards_a_side(tmp_path: Path, alpha: float) -> None:
    merge = Merge(tmp_path, alpha, shards=60).write_inputs()
    complete = merge.undisturbed()
    arguments = merge.command()
    at = arguments.index("--threads")
    for options in ([], arguments[at : at + 2]):  # by default, and with one thread
        result = run_limited(resource.RLIMIT_NOFILE, 16, [*arguments[:at], "-q", *options])
        assert result.code == 0, result.err
        assert merge.state(complete) == "complete"
        merge.clear()


@pytest.mark.sweep
def test_hazard_rlimit_nofile_16_with_500_shards_a_side(tmp_path: Path) -> None:
    merge = Merge(tmp_path, shards=500).write_inputs(size=1)
    complete = merge.undisturbed()
    result = run_limited(resource.RLIMIT_NOFILE, 16, merge.command())
    assert result.code == 0, result.err
    assert merge.state(complete) == "complete"


@pytest.mark.sweep
@pytest.mark.parametrize("alpha", [0.0, 2.0], ids=["copying", "arithmetic"])
def test_hazard_memory_is_capped(tmp_path: Path, alpha: float) -> None:
    """384 MiB of addresses, libraries included, are less than the 512 MiB of the two inputs."""
    merge = Merge(tmp_path, alpha, shards=2, threads=2).write_inputs(size=2**21)
    result = run_limited(resource.RLIMIT_AS, 384 * 2**20, merge.command())
    assert result.code == 0, result.err
    capped = contents(merge.output)
    merge.clear()
    merge.run()
    assert contents(merge.output) == capped


@pytest.mark.found("where memory for a buffer was missing, the message named standard output")
def test_hazard_memory_that_does_not_suffice_is_one_line(tmp_path: Path) -> None:
    """As much as starting takes, and then less and less than the buffers."""
    merge = Merge(tmp_path, 2.0, shards=2, threads=8).write_inputs(size=2**17)
    complete = merge.undisturbed()
    codes = set()
    for cap in (2000, 400, 300, 200):
        result = run_limited(resource.RLIMIT_AS, cap * 2**20, merge.command())
        codes.add(result.code)
        if result.code:
            assert_refused(result, 8, "out of memory; use fewer --threads")
            break
        merge.clear()
    assert codes == {0, 8}
    assert merge.state(complete) == "absent"
    merge.mend(complete)


def test_more_threads_than_descriptors_is_one_line_and_can_be_continued(tmp_path: Path) -> None:
    merge = Merge(tmp_path, shards=60, threads=16).write_inputs()
    complete = merge.undisturbed()
    result = run_limited(resource.RLIMIT_NOFILE, 16, merge.command())
    assert_refused(result, 8, "too many open files; raise the limit of open files (`ulimit -n`)")
    assert merge.state(complete) == "absent"
    merge.run()
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


# ---------------------------------------------------------------- a small disk


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Makes a file system in memory of a given size, for the output."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    with ExitStack() as stack:
        yield lambda options: stack.enter_context(mounted(tmp_path / "disk", options))


def free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def fill(disk: Path) -> Path:
    """Take every free byte of a disk; removing the file gives them back."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**20))
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x")
    assert free(disk) == 0
    return ballast


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["merge", "dry run"])
def test_hazard_no_bytes_left_preflight_says_needed_and_free(
    tmp_path: Path, mount: Mount, more: list[str]
) -> None:
    merge = Merge(tmp_path, shards=2, disk=mount("size=20m")).write_inputs(size=2**16)
    code, err = Child(merge.command(*more)).finish()
    assert (code, err.count("\n")) == (8, 1), err
    found = re.search(r"disk: needs (\d+) bytes, (\d+) are free; free some disk space", err)
    assert found, err
    weights = 2 * 2 * 2**16 * 16 * 2
    assert weights < int(found[1]) < weights + 20 * 10**6
    assert int(found[2]) == 20 * 2**20
    assert merge.left_over() == []


def test_hazard_no_inodes_left_preflight_says_needed_and_free(tmp_path: Path, mount: Mount) -> None:
    merge = Merge(tmp_path, shards=30, disk=mount("size=60m,nr_inodes=30")).write_inputs()
    code, err = Child(merge.command()).finish()
    assert (code, err.count("\n")) == (8, 1), err
    found = re.search(r"disk: needs (\d+) files, (\d+) can be made; remove files", err)
    assert found, err
    assert int(found[1]) > 30 > int(found[2])
    assert merge.left_over() == []


@pytest.mark.parametrize("threads", [1, 2])
def test_hazard_enospc_mid_run_can_be_continued(tmp_path: Path, mount: Mount, threads: int) -> None:
    disk = mount("size=60m")
    merge = Merge(tmp_path, shards=30, threads=threads, disk=disk).write_inputs(size=500)
    complete = merge.undisturbed()
    child = Child(merge.command())
    assert child.stop_when(lambda: merge.lines() > 3)
    ballast = fill(disk)
    child.send(signal.SIGCONT)
    code, err = child.finish()
    assert (code, err.count("\n")) == (8, 1), err
    assert f"error: {merge.partial}" in err
    assert "no space left on device; free some disk space and run the same command again" in err
    assert merge.state(complete) == "absent"
    code, err = Child(merge.command()).finish()  # still full: refused before it begins
    assert (code, err.count("\n")) == (8, 1), err
    ballast.unlink()
    assert merge.run().resumed >= 3
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


def test_what_an_interrupted_run_left_counts_as_room(tmp_path: Path, mount: Mount) -> None:
    """The disk holds the model once: the half of it that lies there already is no obstacle."""
    merge = Merge(tmp_path, shards=1, disk=mount("size=40m")).write_inputs(size=2**18)
    complete = merge.undisturbed()
    fake = FailingFileSystem(tmp_path, count_calls(merge, "size")[0])
    with pytest.raises(OutputError):
        merge.run(fake)
    weights = 2 * 2**18 * 16 * 2
    assert (merge.model / "model.safetensors.tmp").stat().st_size > weights
    assert free(merge.output.parent) < weights + 16 * 10**6
    assert merge.run().resumed == 0
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []
