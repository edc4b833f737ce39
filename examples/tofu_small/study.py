"""Make the grids of a seed, evaluate every model in them, and put the scores into a table.

python examples/tofu_small/study.py OUT --method npo [--method ga …] [--beta 1] [--jobs 2]

Writes OUT/grids/METHOD, OUT/scores and OUT/study-METHOD.csv. What is there is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import shared

from uipe_merge.errors import UipeMergeError

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = (
    "seed",
    "method",
    "family",
    "alpha",
    "steps",
    "effective_alpha",
    "forget_quality",
    "model_utility",
    "forget_probability",
    "forget_rouge",
    "forget_fluency",
)
NOT_MLP = ("*self_attn*", "*norm*", "*embed*", "*lm_head*")
BATCH_SIZE = 32


class Model(NamedTuple):
    """A model to be evaluated; paths are relative to the directory of the seed.

    Attributes:
        path: Its directory.
        scores: Its scores.
    """

    path: Path
    scores: Path


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="directory that train.py made")
    parser.add_argument(
        "--method", choices=shared.METHODS, action="append", required=True, help="repeatable"
    )
    parser.add_argument("--beta", type=float, default=1.0, help="share of the repair that is added")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations at the same time")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    return parser.parse_args()


def main() -> None:
    """Do it method by method."""
    given = arguments()
    seed = shared.settings_of(given.out)["seed"]
    settings = {"beta": given.beta, "max_new_tokens": given.max_new_tokens}
    shared.keep_settings(given.out / "study.json", settings)
    study = Study(given.out, seed, given.beta, given.max_new_tokens, given.jobs)
    try:
        study.run(given.method)
    except RuntimeError as error:
        shared.stop(str(error))


class Study:
    """The study of one seed."""

    def __init__(self, out: Path, seed: int, beta: float, max_new_tokens: int, jobs: int) -> None:
        """Remember what was asked for; nothing is done yet."""
        self._out, self._seed, self._beta = out, seed, beta
        self._max_new_tokens = max_new_tokens
        # One thread each: the same bits on every machine, and jobs do not wait for one another.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), enter, (out,))

    def run(self, methods: list[str]) -> None:
        """Make, evaluate and collect the grids of some methods."""
        ends = [Model(Path(name), self._scores(name)) for name in ("retain", "full")]
        self._evaluate(ends[:1])  # the others are compared with it
        self._evaluate(ends[1:])
        for method in methods:
            found = [self._row("", "full", -1.0, ends[1]), self._row("", "retain", None, ends[0])]
            for name, options in self._grids(method).items():
                found += self._grid(method, name, options)
            found += self._longer(method)
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
            path = self._out / f"study-{method}.csv"
            made = shared.write_changed(path, text.getvalue())
            print(f"{path}: {'written' if made else 'as it was'}")

    def _grids(self, method: str) -> dict[str, list[str]]:
        """Return the options of every grid; α = 0 is the unlearned model in all but one other."""
        repair = f"./repaired-{method}@@./unlearned-{method}"
        every = ",".join(f"{alpha:g}" for alpha in shared.ALPHAS)
        further = ",".join(f"{alpha:g}" for alpha in shared.ALPHAS if alpha)
        rules = [word for pattern in NOT_MLP for word in ("--alpha-rule", f"{pattern}=0")]
        return {
            "plain": ["--alphas", every, "--control", "random", "--seed", str(self._seed)],
            "away": ["--alphas", further, "--away-from", repair, "--granularity", "tensor"],
            "add": ["--alphas", every, "--add", f"{repair}={self._beta:g}"],
            "energy": ["--alphas", further, "--energy", "0.5"],
            "mlp": ["--alphas", further, *rules],
        }

    def _grid(self, method: str, name: str, options: list[str]) -> list[dict[str, object]]:
        """Make, evaluate and collect one grid, and return its rows."""
        place = Path("grids") / method / name
        if not (self._out / place / "grid.json").is_file():
            (self._out / place).parent.mkdir(parents=True, exist_ok=True)
            inputs = ["./full", f"./unlearned-{method}"]
            self._tool("grid", *inputs, *options, "--output", str(place), "--quiet")
        document = json.loads((self._out / place / "grid.json").read_text(encoding="utf-8"))
        models = {
            each["name"]: Model(
                place / each["path"], place / "scores" / each["name"] / "scores.json"
            )
            for each in document["variants"]
        }
        made = self._evaluate(list(models.values()))
        collected = self._out / place / "collected.json"
        if made or not collected.is_file():
            text = self._tool("collect", str(place), "--json", "--quiet")
            shared.write_changed(collected, text)
        rows = json.loads(collected.read_text(encoding="utf-8"))["variants"]
        for row in rows:
            if why := row["problem"] or row["stale"]:
                shared.stop(f"{place}: {row['name']}: {why}")
        return [
            self._row(
                method,
                "control" if row["family"] == "control" else name,
                row["alpha"],
                models[row["name"]],
                effective=row["effective_alpha"],
            )
            for row in rows
        ]

    def _longer(self, method: str) -> list[dict[str, object]]:
        """Evaluate what unlearned for more steps, and return a row of each."""
        told = json.loads((self._out / f"unlearn-{method}.json").read_text(encoding="utf-8"))
        models = {
            (alpha, steps): Model(Path(name), self._scores(name))
            for alpha, steps in shared.longer(told["steps"]).items()
            for name in [f"unlearned-{method}-step-{steps}"]
        }
        self._evaluate(list(models.values()))
        return [
            self._row(method, "longer", alpha, model, steps=steps)
            for (alpha, steps), model in models.items()
        ]

    def _scores(self, name: str) -> Path:
        return Path("scores") / name / "scores.json"

    def _row(
        self,
        method: str,
        family: str,
        alpha: float | None,
        model: Model,
        *,
        steps: int | None = None,
        effective: float | None = None,
    ) -> dict[str, object]:
        found = json.loads((self._out / model.scores).read_text(encoding="utf-8"))
        values = (
            self._seed,
            method,
            family,
            alpha,
            steps,
            effective,
            found["forget_quality"],
            found["model_utility"],
            found["forget"]["probability"],
            found["forget"]["rouge"],
            found["fluency"]["forget"],
        )
        return dict(zip(COLUMNS, values, strict=True))

    def _evaluate(self, models: list[Model]) -> bool:
        """Evaluate those that have no scores; say whether there were any."""
        missing = [each for each in models if not (self._out / each.scores).is_file()]
        for each in missing:
            (self._out / each.scores).parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        for each, _ in zip(
            missing, self._pool.map(run_tool, map(self._evaluation, missing)), strict=True
        ):
            print(f"{each.path}: evaluated, {time.monotonic() - started:.0f} s", flush=True)
        return bool(missing)

    def _evaluation(self, model: Model) -> list[str]:
        files = [
            word
            for name in shared.SPLITS
            for word in (f"--{name.replace('_', '-')}", f"data/{name}.json")
        ]
        # The scores of the retain model hold its truth ratios: they are taken once.
        logs = self._scores("retain")
        reference = (
            ["--reference", "retain"] if model.scores == logs else ["--retain-logs", str(logs)]
        )
        sizes = ["--batch-size", str(BATCH_SIZE), "--max-new-tokens", str(self._max_new_tokens)]
        output = ["--output", str(model.scores), "--quiet"]
        return ["evaluate", str(model.path), *files, *reference, *sizes, *output]

    def _tool(self, *words: str) -> str:
        """Run uipe-merge in the directory of the seed, and return what it prints."""
        return self._pool.submit(run_tool, words).result()


def enter(directory: Path) -> None:
    """Prepare a process that runs commands: it works in a directory, and ends with its parent."""
    os.chdir(directory)
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent() -> None:
    """Wait until the study ends, however it does, and end too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def run_tool(words: Sequence[str]) -> str:
    """Run a command of uipe-merge in this process, as ``uipe-merge WORDS`` does in one of its own.

    Loading torch anew for every model would take longer than evaluating it.
    """
    import typer

    from uipe_merge.cli.app import app

    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            typer.main.get_command(app).main(
                list(words), prog_name="uipe-merge", standalone_mode=False
            )
        except UipeMergeError as error:  # such an error does not pass from process to process
            raise RuntimeError(f"uipe-merge {' '.join(words)}: {error}") from None
    return said.getvalue()


if __name__ == "__main__":
    main()
