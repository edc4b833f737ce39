"""The options of an evaluation, which ``evaluate`` and ``search`` share, written once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

FORGET = typer.Option(
    metavar="FILE",
    help="Questions to be forgotten, with paraphrased and wrong answers: JSON or JSON lines.",
)
RETAIN = typer.Option(metavar="FILE", help="Questions to be kept, likewise.")


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


RealAuthors = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="TOFU's questions on real authors, for model utility."),
]
WorldFacts = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="TOFU's questions on the world, for model utility."),
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="A retain-only model, for forget quality: a local directory."
    ),
]
RetainLogs = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Its evaluation instead: a log of TOFU, a TOFU_EVAL.json or a scores.json.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences at once.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens after which an answer is cut off.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N questions of each file.")]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to run; auto is cuda where there is one.")
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"The prompt, with {q} and, at its end, {a}; \n is a new line. "
        "[default: the tokenizer's chat template, or 'Question: {q}\\nAnswer: {a}']",
    ),
]


def prompt(template: str | None) -> str | None:
    """Return what a template on the command line means."""
    return None if template is None else template.replace("\\n", "\n")
