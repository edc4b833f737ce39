"""Power cuts on a real file system: ext4 in a file, shut down at once while the program runs.

The ioctl ends all writing without a flush of the journal, as a power cut does; what is there when
the image is mounted again is what had reached the disk. Needs root and loop devices.
"""

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import contents
from runs import Child, Merge

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1800)]

_SHUTDOWN, _NO_FLUSH = 0x8004587D, 2
CUTS = 60
SHARDS = 12


class Disk:
    """An ext4 file system in a file."""

    def __init__(self, root: Path) -> None:
        self.image = root / "image"
        self.mounted = root / "mounted"
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(96 * 2**20)
        self._do("mkfs.ext4", "-q", "-F", str(self.image))

    def mount(self) -> None:
        self._do("mount", "-o", "loop", str(self.image), str(self.mounted))

    def umount(self) -> None:
        self._do("umount", str(self.mounted))

    def cut(self) -> None:
        """Nothing reaches the disk from here on, not even what the journal holds."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_FLUSH))
        finally:
            os.close(descriptor)

    @staticmethod
    def _do(*words: str) -> None:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip() or f"{words[0]} failed")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount an image")
    if not all(map(shutil.which, ("mkfs.ext4", "mount", "umount"))):
        pytest.skip("mkfs.ext4 or mount is not installed")
    made = Disk(tmp_path)
    try:
        made.mount()
    except OSError as error:
        pytest.skip(f"an image cannot be mounted here: {error}")
    try:
        made.cut()
        made.umount()
        made.mount()
    except OSError as error:
        made.umount()
        pytest.skip(f"the file system cannot be shut down here: {error}")
    yield made
    made.umount()


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_hazard_power_cut_on_a_real_file_system(
    tmp_path: Path, disk: Disk, overwrite: bool, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(overwrite)
    merge = Merge(tmp_path, shards=SHARDS, disk=disk.mounted).write_inputs(size=64)
    complete = merge.undisturbed()
    more = ["--overwrite"] if overwrite else []
    old = None
    seen = set()
    resumed = 0
    for _ in range(CUTS):
        merge.clear()
        if overwrite:
            Merge(tmp_path, alpha=-1.0, shards=SHARDS, disk=disk.mounted).run()
            old = contents(merge.output)
        os.sync()
        lines = chance.randrange(SHARDS + 3)
        child = Child(merge.command(*more))
        child.wait_for(lambda at=lines: merge.lines() >= at)  # type: ignore[misc]
        disk.cut()
        child.send(signal.SIGKILL)
        child.finish()
        disk.umount()
        disk.mount()
        seen.add(merge.state(complete, old))
        shutil.rmtree(disk.mounted / "lost+found", ignore_errors=True)
        resumed += merge.mend(complete, overwrite=overwrite)
    record_property("cases", CUTS)
    assert "old" in seen if overwrite else "absent" in seen
    assert resumed > CUTS, "what was done before the power cuts was not used"
