"""A command as the evaluator of a search: it is given a model, and its scores are read.

The model is merged into a temporary directory that is gone once the command has ended.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.errors import UsageError
from uipe_merge.study.layouts import normalised
from uipe_merge.study.trials import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.study.trials import Point


class Score(NamedTuple):
    """Where a number is found: ``NAME=FILE:KEY``, or ``FILE:KEY`` for the last part of the key.

    Attributes:
        name: What it is called.
        file: JSON file, relative to the output directory of the command.
        key: Its key there; with dots, one inside another.
    """

    name: str
    file: str
    key: str


def parse_score(text: str) -> Score:
    """Return what ``quality=scores.json:forget.quality`` means.

    Raises:
        UsageError: It is not of that form.
    """
    name, _, rest = text.rpartition("=")
    file, _, key = rest.rpartition(":")
    if not (file and key) or ("=" in text and not name):
        raise UsageError(
            f"'{text:.200}' is no score", remedy="write FILE:KEY or NAME=FILE:KEY, FILE in JSON"
        )
    return Score(normalised(name or key.rpartition(".")[2]), file, key)


@dataclass(frozen=True, slots=True)
class CommandEvaluator:
    """Merges a model into a temporary directory and runs a command on it.

    Attributes:
        original: θ₀.
        unlearned: θᵤ.
        command: The command with ``{model}`` and ``{out}``, two directories, in its words. It is
            run without a shell.
        scores: What is read of what it wrote; see ``Score``.
        timeout: Seconds that it may take; ``None`` for any.
        workplace: Where the directory is made; by default where temporary files go.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
        threads: Of the merge.

    Raises:
        UsageError: The command does not name the model, cannot be split into words, or cannot be
            started; or a score is not of its form.
    """

    original: str | os.PathLike[str]
    unlearned: str | os.PathLike[str]
    command: str
    scores: Sequence[str]
    timeout: float | None = None
    workplace: str | os.PathLike[str] | None = None
    allow_pickle: bool = False
    dequantize: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a model is made."""
        if not any("{model}" in word for word in self._words()):
            raise UsageError(
                "the command says nothing of {model}",
                remedy="write it like 'eval.sh {model} {out}'",
            )
        if not self.scores:
            raise UsageError("no score is read", remedy="give FILE:KEY of what the command writes")
        for text in self.scores:
            parse_score(text)

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others."""
        sides = (os.fspath(self.original), os.fspath(self.unlearned))
        return {"models": sides, "command": self.command, "scores": list(self.scores)}

    @property
    def description(self) -> dict[str, object]:
        """What a study says of it."""
        return {"command": self.command, "scores": list(self.scores)}

    @property
    def score_names(self) -> list[str]:
        """What the scores are called.

        Raises:
            UsageError: Two share a name.
        """
        names = [parse_score(text).name for text in self.scores]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"two scores are called '{twice[0]}'", remedy="write NAME=FILE:KEY")
        return names

    def __call__(self, point: Point) -> dict[str, float]:
        """Return the scores of one model.

        Raises:
            EvaluationError: The command failed, took too long, or did not write a score.
            UipeMergeError: Whatever ``merge`` would refuse.
        """
        from uipe_merge.executors import make_executor
        from uipe_merge.job import prepare
        from uipe_merge.output.filesystem import LocalFileSystem
        from uipe_merge.progress import Silent
        from uipe_merge.running import run

        if self.workplace is not None:
            Path(self.workplace).mkdir(exist_ok=True)
        with TemporaryDirectory(prefix="uipe-search-", dir=self.workplace) as root:
            model, out = Path(root) / "model", Path(root) / "out"
            out.mkdir()
            job = prepare(
                self.original,
                self.unlearned,
                model,
                point.recipe,
                allow_pickle=self.allow_pickle,
                dequantize=self.dequantize,
            )
            executor = make_executor(self.threads, remote=job.remote)
            run(job, executor, LocalFileSystem(), Silent())
            self._run(model, out)
            wanted = [parse_score(text) for text in self.scores]
            return {score.name: _read_score(out, score) for score in wanted}

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise UsageError(f"the command cannot be read: {error}") from None

    def _run(self, model: Path, out: Path) -> None:
        words = [
            word.replace("{model}", str(model)).replace("{out}", str(out)) for word in self._words()
        ]
        with TemporaryFile() as said:
            try:
                process = subprocess.Popen(  # noqa: S603 - the user's command, no shell
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UsageError(f"'{words[0]}' cannot be run: {error.strerror}") from None
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise EvaluationError(f"'{words[0]}' took more than {self.timeout:g} s") from None
            finally:
                if process.poll() is None:  # with all that it started
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                said.seek(max(said.seek(0, os.SEEK_END) - 4096, 0))
                lines = said.read().decode("utf-8", "replace").split("\n")
                last = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
                raise EvaluationError(f"'{words[0]}' ended with {code}: {last:.300}")


def _read_score(out: Path, score: Score) -> float:
    path = out / score.file
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise EvaluationError(f"the command wrote no {score.file}") from None
    except (ValueError, RecursionError):
        raise EvaluationError(f"{score.file} is no JSON") from None
    parts = [score.key] if isinstance(found, dict) and score.key in found else score.key.split(".")
    for part in parts:
        if not isinstance(found, dict) or part not in found:
            raise EvaluationError(f"{score.file} has no '{score.key}'")
        found = found[part]
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise EvaluationError(f"'{score.key}' in {score.file} is no number")
    return float(found)
