"""``uipe-merge inspect ORIGINAL UNLEARNED``: what differs, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uipe_merge.inspected import Group, Inspection


def inspect(
    original: Annotated[
        str,
        typer.Argument(
            metavar="ORIGINAL",
            help="The original checkpoint θ₀: a directory, URL or ORG/NAME@REVISION.",
        ),
    ],
    unlearned: Annotated[
        str,
        typer.Argument(
            metavar="UNLEARNED", help="The unlearned checkpoint θᵤ, likewise; or an adapter."
        ),
    ],
    alphas: Annotated[
        list[float] | None,
        typer.Option(
            "--alpha", "-a", help="α to try the rounding of; repeatable. [default: 0.1 … 2]"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Output dtype to try the rounding at, as for merge.")
    ] = "auto",
    along: Annotated[
        list[str] | None,
        typer.Option(
            metavar="UPDATE", help="A related update, NEW or NEW@@OLD: show its cosine with v."
        ),
    ] = None,
    away_from: Annotated[
        str | None,
        typer.Option(metavar="UPDATE|original", help="A protected update, likewise."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pytorch_model*.bin; nothing in it is run."),
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Take block-scaled FP8; the output is not quantised."),
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(help="Write a layer × module heat map to FILE.png or FILE.html."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads. [default: two a core, at most 8]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor.")] = False,
) -> None:
    """Measure the update of every layer and module in one streaming pass."""
    from uipe_merge import api, plots
    from uipe_merge.steering import parse_protected, parse_update

    if plot is not None:
        plots.check(plot)
    out = Output(quiet=quiet, verbose=verbose, as_json=as_json)
    found = api.inspect(
        original,
        unlearned,
        alphas=tuple(alphas) if alphas else None,
        dtype=dtype,
        along=tuple(map(parse_update, along or ())),
        away_from=None if away_from is None else parse_protected(away_from),
        allow_pickle=allow_pickle,
        dequantize=dequantize,
        threads=threads,
        progress=out.progress(),
    )
    if plot is not None:
        plots.heat_map(found, plot)
        out.note(f"heat map written to {plot}")
    if out.as_json:
        out.data(found.as_dict())
        return
    _show(out, found)


def _show(out: Output, found: Inspection) -> None:
    tried = [f"α={alpha:g}" for alpha in found.alphas]
    held = [f"cos {place}" for place in range(1, 1 + len(found.updates))]
    columns = ["tensors", "‖v‖", "‖v‖/‖θᵤ‖", "changed", *tried, *held]
    groups: list[tuple[str, Iterable[tuple[str, Group]]]] = [
        ("layer", [("–" if n is None else str(n), g) for n, g in found.layers.items()]),
        ("module", found.kinds.items()),
    ]
    if out.verbose:
        groups.insert(0, ("tensor", found.tensors.items()))
    for title, members in groups:
        out.table([title, *columns], [_row(name, group) for name, group in members])
        out.line("")
    out.table(["", *columns], [_row("model", found.total)])
    out.line("")
    out.line("α=…: the effective α that this α would come out as at the output dtype")
    for place, update in enumerate(found.updates, 1):
        out.line(f"cos {place}: the cosine of v with the update {update}")
    if found.zero:
        shown = ", ".join(found.zero if out.verbose else found.zero[:5])
        more = len(found.zero) - 5
        rest = f" and {more} more (-v lists them)" if more > 0 and not out.verbose else ""
        out.line(f"{len(found.zero)} tensors with v = 0: {shown}{rest}")
    if found.differing_integers:
        out.line(f"integer tensors that differ: {', '.join(found.differing_integers)}")
    for mismatch in found.mismatches:
        out.line(f"mismatch: {mismatch}")
    out.warn([*found.warnings, *found.rounding_warnings()])


def _row(name: str, group: Group) -> tuple[str, ...]:
    return (
        name,
        f"{group.tensors:,}",
        number(group.norm),
        number(group.ratio),
        f"{group.share_changed:.2%}",
        *(number(alpha) for alpha in group.effective_alphas),
        *(number(cosine) for cosine in group.cosines),
    )
