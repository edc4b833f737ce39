"""Measures time and memory against mergekit and the disk, and writes docs/performance.md.

``make bench`` runs all of it; ``make bench ARGS="--size 200MB --runs 2"`` is a quick look.
Everything is made in .bench/ and removed again.
"""

from __future__ import annotations

import argparse
import compileall
import shlex
import shutil
import sys
from pathlib import Path

import peer
from cases import CASES, Bench, room_needed
from machine import describe, load
from measuring import FailedError
from results import page, tables

from uipe_merge import __version__
from uipe_merge.errors import UipeMergeError
from uipe_merge.recipe import parse_size

REPOSITORY = Path(__file__).resolve().parent.parent
WORK = REPOSITORY / ".bench"
PAGE = REPOSITORY / "docs" / "performance.md"
SIZE, RUNS = "2.5GB", 5
BUSY = 0.5


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default=SIZE, help="bytes of a checkpoint [default: %(default)s]")
    parser.add_argument("--shards", type=int, default=5, help="its files [default: %(default)s]")
    parser.add_argument("--runs", type=int, default=RUNS, help="rounds [default: %(default)s]")
    parser.add_argument("--skip-mergekit", action="store_true", help="compare with the disk only")
    parser.add_argument(
        "--only", choices=CASES, metavar="NAME", help=f"one case: {', '.join(CASES)}"
    )
    parser.add_argument("--keep", action="store_true", help="leave .bench/ as it is at the end")
    options = parser.parse_args(arguments)
    try:
        options.bytes = parse_size(options.size)
    except UipeMergeError as error:
        parser.error(str(error))
    if min(options.shards, options.runs) < 1:
        parser.error("--shards and --runs are at least 1")
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, and write the page if everything was measured."""
    options = parse(arguments)
    WORK.mkdir(exist_ok=True)
    needed = room_needed(options.bytes, mergekit=not options.skip_mergekit)
    free = shutil.disk_usage(WORK).free
    if free < needed:
        say(f"{needed / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} GB are free")
        return 1
    try:
        measure(options, arguments, WORK, PAGE)
    except FailedError as error:
        say(str(error))
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(WORK, ignore_errors=True)
    return 0


def measure(
    options: argparse.Namespace, arguments: list[str], work: Path, documentation: Path
) -> None:
    """Run the cases that were asked for and report them.

    Args:
        options: From ``parse``.
        arguments: The command line they came from.
        work: An existing directory to make everything in.
        documentation: The page to write if everything was measured.
    """
    chosen = [options.only] if options.only else list(CASES)
    busy = load()
    # As an installation is that is copied; where Python may write none, every start would do it.
    compileall.compile_dir(REPOSITORY / "uipe_merge", quiet=1)
    wanted = {"pair", "recipe"} & set(chosen) and not options.skip_mergekit
    mergekit = peer.install(work / "mergekit-env", say) if wanted else None
    findings = []
    for name in chosen:
        say(f"== {name}")
        root = work / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        bench = Bench(root, options.bytes, options.shards, options.runs, mergekit, say)
        findings.append(CASES[name](bench))
        if not options.keep:
            shutil.rmtree(root)
    print(tables(findings))
    if options.only or mergekit is None:
        say(f"{documentation.name} is left as it is: not everything was measured")
        return
    versions = {
        "uipe-merge": __version__,
        "mergekit": f"{mergekit.version}, torch {mergekit.torch}",
    }
    command = "make bench" + (f" ARGS={shlex.quote(shlex.join(arguments))}" if arguments else "")
    text = page(findings, describe(work, versions), command, caution(options, busy))
    documentation.parent.mkdir(exist_ok=True)
    documentation.write_text(text, encoding="utf-8")
    say(f"written: {documentation.name}")


def caution(options: argparse.Namespace, busy: float) -> str:
    """Say why figures do not count, if they do not.

    Args:
        options: From ``parse``. The bar is about a full-size run.
        busy: The load of the machine before the run.
    """
    reasons = []
    if options.bytes < parse_size(SIZE) or options.runs < RUNS:
        reasons.append(
            f"A trial with {options.size} and {options.runs} rounds: the bar is about {SIZE} and "
            f"{RUNS} rounds, and on small models the start of a program outweighs its work."
        )
    if busy > BUSY:
        reasons.append(f"The machine was busy with something else (load {busy:.1f}).")
    return "\n".join(reasons)


def say(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
