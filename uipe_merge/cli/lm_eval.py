"""``uipe-merge lm-eval …``: lm-evaluation-harness, with a model type that needs no written model."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from uipe_merge.cli.console import Output
from uipe_merge.errors import UipeMergeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARIES = ("lm_eval", "accelerate")
_FAILED = 1
_HELP = ("-h", "--help")


class HandedOver(TyperCommand):
    """A command whose words are another program's, but for a lone ``--help``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own click
        """Keep every word as it is."""
        own = [] if args and args[0] not in _HELP else ["--help"]
        super().parse_args(ctx, own)
        ctx.args = args
        return args


def lm_eval(ctx: typer.Context) -> int:
    """Run lm-evaluation-harness with the model type uipe, which evaluates any α without writing it.

    uipe-merge lm-eval --model uipe --model_args original=DIR,unlearned=DIR,alpha=2 --tasks TASK,…

    All options are those of the command lm_eval: `uipe-merge lm-eval run --help` shows them.

    --model_args of uipe: original and unlearned (as for merge), alpha or recipe=FILE, dtype, rounding,
    seed, on_mismatch, dequantize, allow_pickle, threads, and those of lm_eval's hf (max_length,
    add_bos_token, tokenizer, attn_implementation, …). Needs: pip install 'uipe-merge[lm-eval]'
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this needs {' and '.join(missing)}",
            remedy="install it with `pip install 'uipe-merge[lm-eval]'`",
        )
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    try:
        with _command_line(["lm-eval", *ctx.args]):
            harness = HarnessCLI()
            asked = harness.parse_args()
        from uipe_merge.integrations import lm_eval_arguments

        importlib.import_module("uipe_merge.integrations.lm_eval")  # registers the type
        arguments = getattr(asked, "model_args", None)
        if getattr(asked, "model", None) == lm_eval_arguments.NAME and isinstance(arguments, dict):
            lm_eval_arguments.check(**arguments)  # before lm_eval reads thousands of tasks
            arguments.setdefault("model", lm_eval_arguments.name_of(arguments))
        harness.execute(asked)
    except UipeMergeError:
        raise
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else _FAILED * bool(stop.code)
    except Exception as error:  # noqa: BLE001 - lm_eval's, and shown whole: a task's author needs it
        traceback.print_exc()
        Output().error(f"lm_eval stopped: {str(error) or type(error).__name__}")
        return _FAILED
    return 0


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Let a parser that reads ``sys.argv`` read these words."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before
