"""What a release rests on: one place for the version, and a source archive that is whole."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import uipe_merge

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "uipe_merge" / "_version.py"


def test_the_version_is_written_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {
        "version": {"attr": "uipe_merge._version.__version__"}
    }
    assigned = re.compile(
        r"^\s*(?:__)?version(?:__)?\s*(?::\s*\w+\s*)?=\s*[\"'(]\s*\d", re.IGNORECASE | re.MULTILINE
    )
    files = [
        *ROOT.glob("*.*"),
        *(ROOT / "uipe_merge").rglob("*.py"),
        *(ROOT / "docs").rglob("*.py"),
    ]
    found = [path for path in files if path.is_file() and assigned.search(path.read_text("utf-8"))]
    assert found == [HOME]
    assert HOME.read_text(encoding="utf-8").count(uipe_merge.__version__) == 1


def test_the_changelog_has_a_place_for_what_comes() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ [–-] \d{4}-\d{2}-\d{2}", one) for one in headings[1:])


def test_the_checklist_names_targets_that_there_are() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make (\w+)`", (ROOT / "RELEASING.md").read_text(encoding="utf-8")))
    assert named
    assert named - targets <= {"sbom"}  # made by another change


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_the_archives_hold_what_they_should(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists():
        pytest.skip("which files there should be is known to git only")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        top = f"uipe_merge-{uipe_merge.__version__}/"
        names = {name.removeprefix(top) for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8"
    ).stdout.splitlines()
    left_out = {name for name in tracked if name not in names}
    assert {name for name in left_out if not name.startswith(".")} == set()
    with zipfile.ZipFile(wheel) as package:
        modules = {name for name in package.namelist() if not name.split("/")[0].endswith("-info")}
        [metadata] = [name for name in package.namelist() if name.endswith("/METADATA")]
        headers = HeaderParser().parsestr(package.read(metadata).decode())
    assert {name.split("/")[0] for name in modules} == {"uipe_merge"}
    assert {
        name for name in tracked if re.fullmatch(r"uipe_merge/.*\.(py|pyi|typed)", name)
    } <= modules
    assert headers["Version"] == uipe_merge.__version__
    assert {"all", "plot", "study", "s3", "gcs"} <= set(headers.get_all("Provides-Extra", []))
