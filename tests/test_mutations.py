"""Faults planted in the durable write: the suites have to see every one of them.

Each is made in a copy of the package, and a suite that should see it is run on the copy: one of
the twin's scenarios, a file of other tests, or both. Where one passes, this test fails.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import uipe_merge

TESTS = Path(__file__).parent
_FAILED = re.compile(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", re.MULTILINE)


class Edit(NamedTuple):
    """A text of a module that stands there once, and what stands there instead."""

    module: str
    old: str
    new: str


class Fault(NamedTuple):
    """A planted fault.

    Attributes:
        edits: How it is planted.
        suite: The other tests that must see it.
        twin: The scenario whose states must show it; the others leave no state that is wrong.
    """

    edits: list[Edit]
    suite: str
    twin: str = ""


SYNC, RENAME, NAMES = (
    "        self._file.sync()\n",
    "        self._filesystem.rename(self._draft, self._path)\n",
    "        self._filesystem.sync_directory(self._path.parent)\n",
)
CLOSE = "        self.close()\n" + RENAME
RECORD = "                    stagings[written.variant].journal.finish_shard(record)\n"
DOCUMENTS = """    for name, content in documents.items():
        write_document(filesystem, model / name, content)
        files[name]"""
MANIFEST = (
    "    write_document(filesystem, model / MANIFEST_NAME, encode_manifest(manifest, files))\n"
)

FAULTS = {
    "fsync of a shard dropped": Fault(
        [Edit("output/shard", SYNC, "")], suite="durable", twin="fresh"
    ),
    "name of a shard not synced": Fault([Edit("output/shard", NAMES, "")], suite="durable"),
    "rename before fsync": Fault(
        [Edit("output/shard", SYNC + CLOSE, RENAME + SYNC + "        self.close()\n")],
        suite="durable",
    ),
    "journal before data": Fault(
        [
            Edit("output/shard", SYNC, ""),
            Edit(
                "engine",
                RECORD,
                RECORD
                + """                    import os
                    with open(stagings[written.variant].model / shard.name) as late:
                        os.fsync(late.fileno())
""",
            ),
        ],
        suite="durable",
        twin="fresh",
    ),
    "hash not checked on resume": Fault(
        [
            Edit(
                "output/staging",
                "if hash_file(self.shard(name)) == (record.size, record.sha256)",
                "if hash_file(self.shard(name)) is not None",
            )
        ],
        suite="journal",
    ),
    "manifest before the rest": Fault(
        [
            Edit(
                "finishing",
                DOCUMENTS,
                DOCUMENTS.replace(
                    "        write_document(filesystem, model / name, content)\n", ""
                ),
            ),
            Edit(
                "finishing",
                MANIFEST,
                MANIFEST
                + """    for name, content in documents.items():
        write_document(filesystem, model / name, content)
""",
            ),
        ],
        suite="durable",
    ),
    "sidecars, index and manifest not synced": Fault(
        [
            Edit(
                "output/filesystem",
                "        file.write_at(data, 0)\n        file.sync()\n",
                "        file.write_at(data, 0)\n",
            )
        ],
        suite="durable",
        twin="fresh",
    ),
    "names of the model not synced before it is published": Fault(
        [
            Edit(
                "output/staging",
                "        self._filesystem.sync_directory(self.model)\n        self.journal.publishing",
                "        self.journal.publishing",
            )
        ],
        suite="durable",
        twin="fresh",
    ),
    "run forgotten before the published name is durable": Fault(
        [
            Edit(
                "output/staging",
                "        self._filesystem.sync_directory(self.output.parent)\n        self.clean()",
                "        self.clean()",
            )
        ],
        suite="durable",
    ),
    "journal gone before what it is about": Fault(
        [
            Edit(
                "output/staging",
                "            self._filesystem.sync_directory(self.partial)\n",
                "            pass\n",
            )
        ],
        suite="durable",
        twin="low rank",
    ),
    "published over what is there": Fault(
        [
            Edit(
                "output/staging",
                "            self._filesystem.rename(self.model, self.output)\n",
                """            self._filesystem.remove_tree(self.output)
            self._filesystem.rename(self.model, self.output)
""",
            )
        ],
        suite="concurrency",
    ),
    "replaced by removing and renaming": Fault(
        [
            Edit(
                "output/staging",
                "            self._filesystem.exchange(self.model, self.output)\n",
                """            self._filesystem.remove_tree(self.output)
            self._filesystem.rename(self.model, self.output)
""",
            )
        ],
        suite="durable",
        twin="overwrite",
    ),
    "exchange by renames without a sync between them": Fault(
        [
            Edit(
                "output/filesystem",
                """            self.rename(one, two)
            self.sync_directory(two.parent)
""",
                "            self.rename(one, two)\n",
            )
        ],
        suite="filesystem",
        twin="overwrite by renames",
    ),
    "lock ignored": Fault(
        [
            Edit(
                "output/lock",
                "        descriptor = _wait_for(path, patience)\n",
                """        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
""",
            )
        ],
        suite="lock",
    ),
    "short write unnoticed": Fault(
        [Edit("output/filesystem", "            while done < len(view):", "            if view:")],
        suite="filesystem",
    ),
    "size not checked": Fault(
        [Edit("output/shard", "if not written == self._position == size:", "if size < 0:")],
        suite="durable",
    ),
    "error of close swallowed": Fault(
        [
            Edit(
                "output/shard",
                CLOSE,
                """        try:
            self.close()
        except OutputError:
            pass
"""
                + RENAME,
            )
        ],
        suite="faults",
    ),
    "fsync of the system not called": Fault(
        [
            Edit(
                "output/filesystem",
                "            os.fsync(self._descriptor)\n",
                "            pass\n",
            )
        ],
        suite="filesystem",
    ),
    "journal line not synced": Fault(
        [
            Edit(
                "output/filesystem",
                """                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
""",
                "                    view = view[os.write(descriptor, view) :]\n",
            )
        ],
        suite="filesystem",
    ),
    "torn journal line believed": Fault(
        [
            Edit("output/journal", 'raw.split(b"\\n")[:-1]:', 'filter(None, raw.split(b"\\n")):'),
            Edit("output/journal", "if crc != ", "if len(crc) != 8 and crc != "),
        ],
        suite="journal",
    ),
    "another command's run gone on with": Fault(
        [
            Edit(
                "output/staging",
                "        if previous is not None and previous != identity:\n",
                "        if previous is not None and not identity:\n",
            )
        ],
        suite="journal",
    ),
}


def planted(root: Path, fault: Fault) -> Path:
    """Copy the package and plant the fault; return where the copy can be imported from."""
    package = root / "uipe_merge"
    original = Path(uipe_merge.__file__).parent
    shutil.copytree(original, package, ignore=shutil.ignore_patterns("__pycache__"))
    for module, old, new in fault.edits:
        path = package / f"{module}.py"
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (module, old)
        path.write_text(text.replace(old, new), encoding="utf-8")
    return root


def caught_by(root: Path, *suite: str) -> str | None:
    """Run tests on the package at ``root``; return the first that fails."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
            *("--rootdir", str(TESTS.parent), "-c", str(TESTS.parent / "pyproject.toml")),
            *("--tb", "no", "-o", "addopts=--import-mode=importlib -ra -m 'not sweep'"),
            *suite,
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    found = _FAILED.search(done.stdout)
    assert done.returncode == (1 if found else 0), done.stdout + done.stderr
    return found[1] if found else None


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(tmp_path: Path, name: str) -> None:
    planted(tmp_path, FAULTS[name])


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_the_copy_is_what_is_tested_and_without_a_fault_it_passes(tmp_path: Path) -> None:
    root = planted(tmp_path, Fault([], suite="durable"))
    words = [sys.executable, "-c", "import uipe_merge; print(uipe_merge.__file__)"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(root / "uipe_merge" / "__init__.py")
    assert caught_by(root, str(TESTS / "test_durable.py")) is None


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(
    tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    fault = FAULTS[name]
    root = planted(tmp_path, fault)
    twin = None
    if fault.twin:
        states = "test_hazard_every_state_of_a_power_cut_keeps_the_promise"
        twin = caught_by(root, f"{TESTS / 'test_crash_states.py'}::{states}[{fault.twin}]")
        assert twin is not None, "the states of the twin do not show it"
    other = caught_by(root, str(TESTS / f"test_{fault.suite}.py"))
    assert other is not None, "no test sees it"
    record_property("mutation", [name, twin or "", other])
