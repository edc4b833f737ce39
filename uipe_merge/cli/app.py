"""The program: commands, the default command, and every way it can end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from uipe_merge._version import __version__
from uipe_merge.checkpoint.storage import system_error
from uipe_merge.cli import (
    collect,
    demo,
    evaluate,
    finish,
    grid,
    inspect,
    lm_eval,
    merge,
    mergekit,
    search,
    verify,
)
from uipe_merge.cli.console import Output
from uipe_merge.errors import UipeMergeError

if TYPE_CHECKING:
    from types import FrameType

USAGE = 2
BUG = 1
IO_ERROR = 8
DEFAULT = "merge"
OUT_OF_MEMORY = "out of memory; use fewer --threads"

RESUMED = ("merge", "grid", "finish", "search")
"""Commands that go on where they were stopped."""


# typer carries a click of its own in some versions and imports it in others; its public
# BadParameter is a UsageError is a ClickException in both.
ClickError: Any = typer.BadParameter.__mro__[2]


class DefaultGroup(TyperGroup):
    """A group with a default command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - see above
        """Put the default in front of anything that names no command."""
        own = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Post-hoc checkpoint arithmetic for LLM unlearning: θᵤ + α·(θᵤ − θ₀), streamed.\n\n"
        "Without a command: uipe-merge ORIGINAL UNLEARNED --alpha A -o OUT"
    ),
)
app.command("merge", short_help="Write θᵤ + α·(θᵤ − θ₀) as a new model (the default).")(merge.merge)
app.command("finish", short_help="Publish what slices of a merge have made.")(finish.finish)
app.command("grid", short_help="Write a model for every α in one reading.")(grid.grid)
app.command("collect", short_help="Show a grid's scores, and choose α.")(collect.collect)
app.command("search", short_help="Look for the best α under a constraint.")(search.search)
app.command("evaluate", short_help="Measure forgetting and utility of a model.")(evaluate.evaluate)
app.command(
    "lm-eval", cls=lm_eval.HandedOver, short_help="Run lm_eval at any α, without writing it."
)(lm_eval.lm_eval)
app.command("inspect", short_help="Measure an update before anything is written.")(inspect.inspect)
app.command("verify", short_help="Hash a written model again.")(verify.verify)
app.command(
    "mergekit",
    short_help="mergekit-yaml, with the merge method uipe.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(mergekit.mergekit)
app.command("demo", short_help="The whole way on a tiny pair made on the spot.")(demo.demo)


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"uipe-merge {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options that come before a command."""


class Interrupted(BaseException):
    """A signal asked the program to end; the run can be continued."""

    def __init__(self, number: int) -> None:
        """Remember which one."""
        super().__init__(number)
        self.number = number


def main() -> None:
    """Run the program and leave with the exit code of ``uipe_merge.errors``."""
    _open_standard_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    # The hub's client would log every try again, with addresses that may be signed.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # So would this client, with tracebacks.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    code = _run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or IO_ERROR
            # The interpreter would flush a broken stream again at exit and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "torch" in sys.modules:
        # All is written, closed and joined; taking torch apart would cost a third of a second.
        os._exit(code)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Give a stream that was closed (``>&-``) the null device.

    The next file to be opened would take its number otherwise, and whatever a library prints
    there would end up in a shard.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
            if null != number:
                os.close(null)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)  # asked twice, end at once
    raise Interrupted(number)


def _run(arguments: list[str]) -> int:  # noqa: PLR0911 - one for each way to end
    output = Output()
    try:
        result: Any = typer.main.get_command(app).main(
            arguments or ["--help"], prog_name="uipe-merge", standalone_mode=False
        )
    except ClickError as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        output.error(f"{message.rstrip('.')}; see uipe-merge --help")
        return USAGE
    except UipeMergeError as error:
        output.error(str(error))
        return error.exit_code
    except Interrupted as error:
        name = signal.Signals(error.number).name
        word = arguments[0] if arguments else ""
        command = word if word in {each.name for each in app.registered_commands} else DEFAULT
        more = "; the same command goes on where this one stopped" if command in RESUMED else ""
        output.error(f"stopped by {name}{more}")
        return 128 + error.number
    except SystemExit as error:  # how typer and rich end where nobody reads what they print
        return IO_ERROR if error.code else 0
    except OSError as error:
        if error.errno == errno.ENOMEM:  # a buffer could not be mapped
            output.error(OUT_OF_MEMORY)
            return IO_ERROR
        # Neither names a file: writing to stdout, and asking for a working directory that is gone.
        unnamed = "." if error.errno == errno.ENOENT else "standard output"
        output.error(str(system_error(error, error.filename or unnamed)))
        return IO_ERROR
    except MemoryError:
        output.error(OUT_OF_MEMORY)
        return IO_ERROR
    except Exception:  # noqa: BLE001 - the last resort: a bug, shown whole
        traceback.print_exc()
        output.error("this is a bug in uipe-merge; please report it with the lines above")
        return BUG
    if not arguments:
        return USAGE
    return result if isinstance(result, int) else 0
