"""Says what a measurement was made on, without the names of the machine or its folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path


def load() -> float:
    """Return how many programs wanted a processor in the last minute, on average."""
    return os.getloadavg()[0]


def describe(where: Path, versions: dict[str, str]) -> list[tuple[str, str]]:
    """Return rows of what and how much.

    Args:
        where: A directory on the file system that was measured.
        versions: Programs that were compared, with their versions.
    """
    return [
        ("processor", f"{len(os.sched_getaffinity(0))} cores, {_processor()}"),
        ("memory", f"{_memory() / 1e9:.0f} GB"),
        ("kernel", f"{platform.system()} {version_number(platform.release())}"),
        ("file system", file_system(where, Path("/proc/self/mountinfo").read_text("utf-8"))),
        ("Python", platform.python_version()),
        ("torch", importlib.metadata.version("torch")),
        *versions.items(),
    ]


def version_number(release: str) -> str:
    """Return the leading number of a kernel release, without what a builder appended."""
    match = re.match(r"\d+(\.\d+)*", release)
    return match[0] if match else release


def file_system(where: Path, mounts: str) -> str:
    """Return the type of the file system that holds ``where``, from ``mountinfo``."""
    best, kind = -1, "unknown"
    path = os.path.realpath(where)
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        mounted = fields.split()[4].encode().decode("unicode_escape")
        inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
        # Of several mounts on one directory the last is the one that is seen.
        if inside and len(mounted) >= best:
            best, kind = len(mounted), rest.split()[0]
    return kind


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
