"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import write_pair

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_python_example_writes_a_model_that_verifies(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    finished = subprocess.run(
        [sys.executable, EXAMPLES / "merge.py", original, unlearned, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "α asked / effective: 1 / " in finished.stdout
    assert "warning" not in finished.stdout
    assert (tmp_path / "out" / "uipe_merge.json").is_file()


def test_the_shell_example_writes_three_models(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    programs = Path(sys.executable).parent
    finished = subprocess.run(
        ["bash", EXAMPLES / "merge.sh", original, unlearned, tmp_path / "grid"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
    )
    assert finished.stdout.count("all as written") == 3
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [
        "alpha-0.5",
        "alpha-1",
        "alpha-2",
    ]


def test_the_slurm_example_makes_its_slices_and_publishes(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path, shards=3)
    words = [*map(str, (original, unlearned, tmp_path / "out")), "--alpha", "2", "-q"]
    lock = tmp_path / ".out.uipe-partial" / "slices" / "2-of-2" / "lock"
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    for task in ("1", "2"):
        if task == "2":  # started again on another node than the one whose lock was left
            lock.parent.mkdir()
            lock.write_text('{"host": "elsewhere", "pid": 1}')
        task_environment = {
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_RESTART_COUNT": str(int(task) - 1),
        }
        subprocess.run(
            ["bash", EXAMPLES / "slurm" / "merge.sbatch", *words],
            env={**environment, **task_environment},
            check=True,
            timeout=120,
        )
    assert (tmp_path / "out" / "uipe_merge.json").is_file()
    assert not lock.exists()
