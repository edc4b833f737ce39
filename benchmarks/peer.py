"""mergekit, the tool to compare with: in an environment of its own, never in the project's."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from measuring import FailedError

if TYPE_CHECKING:
    from collections.abc import Callable

CONSTRAINTS = Path(__file__).with_name("mergekit-constraints.txt")


class Mergekit(NamedTuple):
    """An installed mergekit.

    Attributes:
        program: Its command.
        version: Its version.
        torch: The version of torch that it uses.
    """

    program: Path
    version: str
    torch: str


def install(environment: Path, say: Callable[[str], None]) -> Mergekit:
    """Make the environment, unless it is there as the constraints want it.

    Raises:
        FailedError: pip failed; it has printed why.
    """
    python = environment / "bin" / "python"
    stamp = environment / ".stamp"
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        say("installing mergekit and a torch of its own; the first time this takes minutes")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
            subprocess.run([*pip, "-c", str(CONSTRAINTS), "mergekit"], check=True)
        except subprocess.CalledProcessError:
            raise FailedError(
                "mergekit cannot be installed; --skip-mergekit goes without"
            ) from None
        stamp.write_text(wanted)
    ask = "from importlib.metadata import version; print(version('mergekit'), version('torch'))"
    answer = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    version, torch = answer.stdout.split()
    return Mergekit(environment / "bin" / "mergekit-yaml", version, torch)


def recipe(original: Path, unlearned: Path, alpha: float, dtype: str) -> str:
    """Return the configuration that makes θᵤ + α·(θᵤ − θ₀): one model of weight 1 + α.

    Args:
        original: The base model, θ₀.
        unlearned: The model to take the update of, θᵤ.
        alpha: α.
        dtype: What mergekit computes in, ``float32`` or ``bfloat16``; it writes bfloat16.
    """
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(original),
        "models": [{"model": str(unlearned), "parameters": {"weight": 1 + alpha}}],
        "parameters": {"normalize": False},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    return json.dumps(document, indent=2) + "\n"  # JSON is YAML too
