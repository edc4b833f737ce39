"""``uipe-merge mergekit CONFIG OUT``: mergekit itself, with ``uipe`` among its merge methods."""

from __future__ import annotations

import signal
import traceback
from typing import Annotated

import typer

from uipe_merge.cli.console import Output

_FAILED = 1


def mergekit(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe of mergekit's.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The directory it writes to.")],
) -> int:
    """Run mergekit-yaml with the merge method uipe; all other options are mergekit's own."""
    from uipe_merge.integrations.mergekit import program

    # It cannot go on where it was stopped, so the promise of this program's own handlers is none.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    run = program()
    import click  # the one that mergekit has; typer may have another

    try:
        run([config, output, *context.args])
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - whatever another program fails with, shown whole
        traceback.print_exc()
        Output().error(f"mergekit failed with {type(error).__name__}; the lines above are its own")
        return _FAILED
    return 0
