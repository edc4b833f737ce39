"""``uipe-merge evaluate MODEL``: what a model forgot, and what it still can do."""

from __future__ import annotations

import json
import math
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number
from uipe_merge.errors import OutputError, UsageError
from uipe_merge.progress import Silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from uipe_merge.progress import Progress
    from uipe_merge.study.metrics import Floats
    from uipe_merge.study.questions import Question
    from uipe_merge.study.scores import Evaluation

SCHEMA = 1


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model to evaluate: a local directory.")
    ],
    forget: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Questions to be forgotten, with paraphrased and wrong answers: JSON or JSON lines.",
        ),
    ],
    retain: Annotated[str, typer.Option(metavar="FILE", help="Questions to be kept, likewise.")],
    real_authors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="TOFU's questions on real authors, for model utility."),
    ] = None,
    world_facts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="TOFU's questions on the world, for model utility."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A retain-only model, for forget quality: a local directory."
        ),
    ] = None,
    retain_logs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Its evaluation instead: a log of TOFU, a TOFU_EVAL.json or a scores.json.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens after which an answer is cut off.")
    ] = 64,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first N questions of each file.")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Where to run; auto is cuda where there is one.")
    ] = Device.AUTO,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=r"The prompt, with {q} and, at its end, {a}; \n is a new line. "
            "[default: the tokenizer's chat template, or 'Question: {q}\\nAnswer: {a}']",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write all scores as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all scores as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings.")] = False,
) -> None:
    """Evaluate a model on TOFU's questions, or on others of their form."""
    if reference is not None and retain_logs is not None:
        raise UsageError("--reference and --retain-logs exclude each other")
    _check_output(output)
    out = Output(quiet=quiet, as_json=as_json)
    # Files before models, and models before torch has anything to do: the cheap errors first.
    from uipe_merge.study import questions

    utility = {
        name: questions.read(path, paraphrased=False, limit=limit)
        for name, path in (("real_authors", real_authors), ("world_facts", world_facts))
        if path is not None
    }
    asked = questions.read(forget, paraphrased=True, limit=limit)
    kept = questions.read(retain, paraphrased=True, limit=limit)

    from uipe_merge.study import evaluate as study
    from uipe_merge.study import models

    study.check_installed()
    prompt = None if template is None else template.replace("\\n", "\n")
    ratios = _reference(out, reference, retain_logs, asked, batch_size, device, prompt)
    loaded, tokenizer = models.load(model)
    found = study.evaluate(
        loaded,
        tokenizer,
        forget=asked,
        retain=kept,
        utility=utility,
        reference=ratios,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device.value,
        template=prompt,
        progress=_progress(out),
    )
    document = {
        "schema": SCHEMA,
        "tool": "uipe-merge evaluate",
        "model": model,
        "model_manifest_sha256": models.manifest_sha256(model),
        "reference": reference or retain_logs,
        "files": {
            "forget": forget,
            "retain": retain,
            "real_authors": real_authors,
            "world_facts": world_facts,
        },
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        **found.as_dict(),
    }
    if output is not None:
        _write(Path(output), document)
        out.note(f"scores written to {output}")
    if out.as_json:
        out.data(document)
    else:
        _show(out, found)
    out.warn(_warnings(found))


def _reference(
    out: Output,
    model: str | None,
    logs: str | None,
    asked: list[Question],
    batch_size: int,
    device: Device,
    template: str | None,
) -> Floats | None:
    """Return the truth ratios of the retain-only model, if there is one."""
    if logs is not None:
        from uipe_merge.study.tofu_logs import read_truth_ratios

        return read_truth_ratios(logs)
    if model is None:
        return None
    from uipe_merge.study import evaluate as study
    from uipe_merge.study import models

    loaded, tokenizer = models.load(model)
    ratios = study.reference_truth_ratios(
        loaded,
        tokenizer,
        asked,
        batch_size=batch_size,
        device=device.value,
        template=template,
        progress=_progress(out),
    )
    if not all(map(math.isfinite, ratios)):
        raise UsageError(
            "its truth ratios are not finite, so nothing can be compared with it",
            file=model,
            remedy="name a model that works",
        )
    return ratios


def _show(out: Output, found: Evaluation) -> None:
    rows = []
    for name, split in found.splits.items():
        means = split.means()
        rows.append(
            (
                name.replace("_", " "),
                f"{len(split.losses)}",
                number(means["probability"], ".4f"),
                number(means["rouge"], ".4f"),
                number(None if name == "forget" else means["truth_ratio"], ".4f"),
                number(found.fluency[name], ".2f"),
            )
        )
    columns = ["split", "questions", "probability", "ROUGE-L", "truth ratio", "fluency"]
    out.table(columns, rows)
    out.line("")
    test = found.forget_quality
    quality = "– (no --reference or --retain-logs)"
    if test is not None:
        quality = (
            f"{test.p_value:.4g} (KS statistic {test.statistic:.4f}, n = {test.n}, m = {test.m})"
        )
    utility = number(found.model_utility, ".4f")
    if found.interval is not None:
        low, high = found.interval
        parts = len(found.utility_parts)
        utility += f" (95 % interval {low:.4f} to {high:.4f}; {parts} of 9 parts)"
    out.fields([("forget quality", quality), ("model utility", utility)])


def _warnings(found: Evaluation) -> list[str]:
    from uipe_merge.study.metrics import GIBBERISH

    warnings = []
    if found.gibberish:
        splits = ", ".join(found.gibberish)
        warnings.append(
            f"the model talks gibberish on {splits}: the median text is empty or repeats itself "
            f"(fluency below {GIBBERISH:g}), whatever its forget quality"
        )
    test = found.forget_quality
    if test is not None and test.n != test.m:
        warnings.append(
            f"the reference answered {test.m} questions and the model {test.n}: "
            "forget quality compares models on the same ones"
        )
    if any(not all(map(math.isfinite, split.losses)) for split in found.splits.values()):
        warnings.append("the model gives NaN or infinite losses: it is broken")
    missing = 9 - len(found.utility_parts)
    if missing:
        warnings.append(
            f"model utility lacks {missing} of its 9 parts, and is comparable with others that "
            "lack the same; --real-authors and --world-facts complete it"
        )
    return warnings


def _check_output(output: str | None) -> None:
    """Refuse what could not be written, before hours are spent on it."""
    if output is None:
        return
    if os.path.isdir(output):  # noqa: PTH112 - Path would drop a trailing slash
        raise UsageError("is a directory", file=output, remedy="name a file")
    parent = Path(output).parent
    if not parent.is_dir():
        raise UsageError("no such directory", file=parent, remedy="create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError("permission denied", file=parent, remedy="give yourself permission to it")


def _write(path: Path, document: dict[str, object]) -> None:
    """Write the scores whole or not at all, and durably."""
    from uipe_merge.output.filesystem import LocalFileSystem, write_document

    filesystem = LocalFileSystem()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        data = json.dumps(document, indent=1, allow_nan=False) + "\n"
        write_document(filesystem, partial, data.encode())
        filesystem.rename(partial, path)
    finally:
        filesystem.remove(partial)
    filesystem.sync_directory(path.parent)


def _progress(out: Output) -> Progress:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, emoji=False)
    return Silent() if out.quiet or not console.is_terminal else Count(console)


class Count:
    """A progress bar that counts sequences, not bytes."""

    def __init__(self, console: Console) -> None:
        """Prepare the bar; it appears with ``start``."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def start(self, total: int) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("scoring", total=total)
        self._progress.start()

    def advance(self, written: int, shard: str) -> None:
        """Move the bar by some sequences, and name what is being done."""
        if self._task is not None:
            self._progress.update(self._task, advance=written, description=shard)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()
