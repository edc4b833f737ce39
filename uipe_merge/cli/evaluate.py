"""``uipe-merge evaluate MODEL``: what a model forgot, and what it still can do."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number
from uipe_merge.cli.evaluation_options import (
    FORGET,
    RETAIN,
    BatchSize,
    Device,
    DeviceOption,
    Limit,
    MaxNewTokens,
    RealAuthors,
    Reference,
    RetainLogs,
    Template,
    WorldFacts,
    prompt,
)
from uipe_merge.errors import OutputError, UsageError
from uipe_merge.study.examination import BATCH_SIZE, MAX_NEW_TOKENS

if TYPE_CHECKING:
    from uipe_merge.study.scores import Evaluation

SCHEMA = 1


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model to evaluate: a local directory.")
    ],
    forget: Annotated[str, FORGET],
    retain: Annotated[str, RETAIN],
    real_authors: RealAuthors = None,
    world_facts: WorldFacts = None,
    reference: Reference = None,
    retain_logs: RetainLogs = None,
    batch_size: BatchSize = BATCH_SIZE,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    limit: Limit = None,
    device: DeviceOption = Device.AUTO,
    template: Template = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write all scores as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all scores as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings.")] = False,
) -> None:
    """Evaluate a model on TOFU's questions, or on others of their form."""
    _check_output(output)
    out = Output(quiet=quiet, as_json=as_json)
    # Files before models, and models before torch has anything to do: the cheap errors first.
    from uipe_merge.study.examination import make_examination
    from uipe_merge.study.reference import make_reference

    compared = make_reference(reference, retain_logs)
    asked = make_examination(
        forget=forget,
        retain=retain,
        real_authors=real_authors,
        world_facts=world_facts,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device.value,
        template=prompt(template),
    )

    from uipe_merge.study import evaluate as study
    from uipe_merge.study import models

    study.check_installed()
    ratios = None if compared is None else compared.truth_ratios(asked, out.counting())
    loaded, tokenizer = models.load(model)
    found = study.examine(loaded, tokenizer, asked, ratios, out.counting())
    document = {
        "schema": SCHEMA,
        "tool": "uipe-merge evaluate",
        "model": model,
        "model_manifest_sha256": models.manifest_sha256(model),
        "reference": None if compared is None else compared.name,
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
