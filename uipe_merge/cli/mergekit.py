"""``uipe-merge mergekit CONFIG OUT``: mergekit itself, with ``uipe`` among its merge methods."""

from __future__ import annotations

import signal
from typing import Annotated

import typer


def mergekit(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe of mergekit's.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The directory it writes to.")],
) -> int:
    """Run mergekit-yaml with the merge method uipe; all other options are mergekit's own."""
    from uipe_merge.integrations.mergekit import run

    # It cannot go on where it was stopped, so the promise of this program's own handlers is none.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    return run([config, output, *context.args])
