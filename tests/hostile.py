"""For the hazard tests of damaged inputs: refusals by a process of its own, and its memory."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cli_tools import tree
from helpers import Result, assert_refused, run_cli

MEMORY = 512 * 2**20
"""Resident bytes that the program stays below, whatever it is given."""


def refuse_started(root: Path, code: int, *fragments: str) -> Result:
    """Start the program on ``root/original`` and ``root/unlearned``; show that it refuses.

    One line says so; nothing was written, beside the output or at it; the inputs are as they
    were; and it ends at all.
    """
    before = tree(root)
    output = root / "out"
    result = run_cli(root / "original", root / "unlearned", "--alpha", 2, "-o", output, timeout=60)
    assert_refused(result, code, *fragments)
    assert result.err.count("\n") == 1
    assert len(result.err) < 12_000
    assert result.out == ""
    assert tree(root) == before
    return result


def refuse_within_memory(root: Path, code: int, *fragments: str) -> None:
    """Show that the program refuses, and how little it needed for that.

    A small process in between starts it: Linux counts as a program's what the process held
    that became it, and this one holds torch.
    """
    before = tree(root)
    between = (
        "import resource, subprocess, sys\n"
        "ended = subprocess.run([sys.executable, '-m', 'uipe_merge', *sys.argv[1:]])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, ended.returncode)\n"
    )
    arguments = [root / "original", root / "unlearned", "--alpha", 2, "-o", root / "out"]
    ended = subprocess.run(
        [sys.executable, "-S", "-c", between, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    kibibytes, exit_code = map(int, ended.stdout.split())
    assert_refused(Result(exit_code, "", ended.stderr), code, *fragments)
    assert kibibytes * 1024 < MEMORY, f"{kibibytes // 1024} MiB"
    assert tree(root) == before


def numbered(form: str) -> Iterator[str]:
    """``form`` with 0, 1, 2 … in place of each #, without end."""
    number = 0
    while True:
        yield form.replace("#", str(number))
        number += 1


def filled(entries: Iterator[str], longest: int) -> bytes:
    """A JSON object of as many entries as fit into ``longest`` bytes."""
    parts: list[str] = []
    length = 2
    for part in entries:
        length += len(part) + 1
        if length > longest:
            break
        parts.append(part)
    return f"{{{','.join(parts)}}}".encode()
