"""For the hazard tests: refusals that leave no trace, trees compared, privileges given up."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Result, assert_refused, run_here

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def tree(path: Path) -> dict[str, tuple[int, int, str | bytes]]:
    """Every entry below ``path`` and ``path`` itself: mode, modification time, content.

    A file that was created and removed again shows in the time of its directory.
    """
    found: dict[str, tuple[int, int, str | bytes]] = {}
    for entry in [path, *sorted(path.rglob("*"))]:
        status = entry.lstat()
        content: str | bytes = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(entry)
        elif stat.S_ISREG(status.st_mode):
            content = entry.read_bytes()
        found[str(entry)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def refuse(root: Path, code: int, *fragments: str, arguments: tuple[object, ...]) -> Result:
    """Run the program and show that it refused in one line and changed nothing below ``root``."""
    before = tree(root)
    result = run_here(*arguments, cwd=root)
    assert_refused(result, code, *fragments)
    assert result.err.count("\n") == 1, result.err
    assert result.out == ""
    assert tree(root) == before
    return result


def refuse_merge(root: Path, code: int, *fragments: str, extra: tuple[object, ...] = ()) -> Result:
    """Show that merging ``root/original`` and ``root/unlearned`` is refused."""
    arguments = (root / "original", root / "unlearned", "--alpha", 1, "-o", root / "out", *extra)
    return refuse(root, code, *fragments, arguments=arguments)


def merge_command(root: Path, output: object, *extra: object) -> tuple[object, ...]:
    """The arguments that copy ``root/unlearned`` to an output: α = 0 needs no arithmetic."""
    return (root / "original", root / "unlearned", "--alpha", 0, "-o", output, *extra)


def merged(root: Path, *extra: object, alpha: float = 1) -> Result:
    """Merge ``root/original`` and ``root/unlearned`` into ``root/out``, which must succeed."""
    arguments = (root / "original", root / "unlearned", "--alpha", alpha, "-o", root / "out")
    result = run_here(*arguments, *extra, cwd=root)
    assert result.code == 0, result
    assert "Traceback" not in result.err
    return result


def require_binding_permissions(directory: Path) -> None:
    """Skip the test where file permissions bind nobody who runs it."""
    probe = directory / "probe"
    probe.touch(mode=0)
    finished = subprocess.run(
        [sys.executable, "-c", "import sys; open(sys.argv[1])", str(probe)],
        preexec_fn=bind_by_permissions,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    probe.unlink()
    if finished.returncode == 0:
        pytest.skip("file permissions do not bind this user, whatever it gives up")


def bind_by_permissions() -> None:
    """In a child of root: let file permissions count, as they do for everybody else.

    The interpreter may lie where another user cannot reach it, so the user stays and the two
    capabilities that override permissions go. For other users this does nothing.
    """
    libc = ctypes.CDLL(None)
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
