"""``make audit`` says what it knows: a hole, none, or that it could not look."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "audit.py"


def dependency(**more: object) -> dict[str, object]:
    return {"name": "a", "version": "1", **more}


HOLE = {"id": "CVE-2025-1", "fix_versions": ["2"]}


@pytest.mark.parametrize(
    ("out", "err", "code", "said"),
    [
        ([dependency(vulns=[])], "", 0, "0 known holes in 1 of 1 packages"),
        ([dependency(vulns=[HOLE]), dependency(skip_reason="x")], "", 1, "a 1: CVE-2025-1, mended by 2"),
        ([dependency(skip_reason="not on the registry")] * 3, "", 0, "could not be done"),
        (None, "requests.exceptions.ConnectionError: Max retries exceeded", 0, "could not be done: no network"),
        (None, "SomethingElse: a bug", 1, ""),
    ],
)  # fmt: skip
def test_what_it_says(tmp_path: Path, out: object, err: str, code: int, said: str) -> None:
    """With a stand-in for pip-audit, which needs a network."""
    answer = "" if out is None else json.dumps({"dependencies": out})
    (tmp_path / "pip_audit.py").write_text(
        f"import sys; sys.stdout.write({answer!r}); sys.stderr.write({err!r}); sys.exit({code})"
    )
    ended = subprocess.run(
        [sys.executable, SCRIPT, "constraints.txt"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == code, ended
    assert said in ended.stdout
