"""``uipe-merge collect GRID``: the scores of a grid as one table, and which α to take."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from uipe_merge.cli.console import Output, number
from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.study.choosing import Choice, Constraint, Row
    from uipe_merge.study.collecting import Study

_USUAL, _UTILITY = "forget_quality", "model_utility"
_MOST_COLUMNS = 6
"""Metrics in the table; lm-eval gives hundreds."""


def collect(
    grid: Annotated[
        str, typer.Argument(metavar="GRID", help="Directory written by uipe-merge grid.")
    ],
    scores: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the scores are. [default: GRID/scores]"),
    ] = None,
    maximize: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="What to look for. [default: forget_quality]"),
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="METRIC", help="The same, where less of it is better.")
    ] = None,
    subject_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONSTRAINT",
            help="What to keep, as 'model_utility>=0.95*unlearned'; repeatable.",
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw the trade-off to FILE.png or FILE.svg.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(help="Write all of it as one page to FILE.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No warnings.")] = False,
) -> None:
    """Put the scores of a grid side by side and choose α among the models that keep enough."""
    from uipe_merge.study import choosing, collecting, report_page, tradeoff
    from uipe_merge.study.layouts import normalised
    from uipe_merge.study.report_figures import Asked

    if maximize is not None and minimize is not None:
        raise UsageError("--maximize and --minimize exclude each other", remedy="give one of them")
    constraints = list(map(choosing.parse_constraint, subject_to or ()))
    objective = normalised(minimize or maximize or _USUAL)
    minimise = minimize is not None
    if plot is not None:
        tradeoff.check(plot)
    if report is not None:
        report_page.check(report)
    out = Output(quiet=quiet, as_json=as_json)
    study = collecting.collect(grid, scores)
    choice = choosing.choose(study.rows, objective, constraints, minimise=minimise)
    kept = next((each for each in constraints if each.metric != objective), None)
    utility = kept.metric if kept else _UTILITY
    front = choosing.pareto_front(
        study.rows,
        objective,
        utility,
        minimise=minimise,
        over_from_above=kept is not None and kept.from_above,
    )
    if plot is not None:
        tradeoff.draw(
            study.rows,
            plot,
            objective=objective,
            utility=utility,
            minimise=minimise,
            constraint=kept,
            front=front,
            chosen=choice.row,
        )
        out.note(f"trade-off drawn to {plot}")
    if report is not None:
        words = ["uipe-merge", "collect", grid, *(["--scores", scores] if scores else [])]
        words += [f"--{'minimize' if minimise else 'maximize'}", objective]
        words += [part for each in subject_to or () for part in ("--subject-to", each)]
        asked = Asked(
            objective, minimise, utility, constraints, front, choice, command=shlex.join(words)
        )
        report_page.write(study, report, asked)
        out.note(f"report written to {report}")
    if out.as_json:
        direction = "minimize" if minimise else "maximize"
        out.data(
            {
                **study.as_dict(),
                "objective": {"metric": objective, "direction": direction},
                "constraints": [_constraint(each, study.rows) for each in constraints],
                "pareto": [row.name for row in front],
                "chosen": None if choice.row is None else choice.row.name,
                "alpha": None if choice.row is None else choice.row.alpha,
                "reason": choice.reason,
                "rejected": [{"name": name, "why": why} for name, why in choice.rejected],
            }
        )
    else:
        _show(out, study, choice, front, [objective, *(each.metric for each in constraints)])
        if front:
            out.line(f"* on the Pareto front of {objective} and {utility}")
        out.line(choice.reason if choice.row is None else f"→ {choice.reason}")
    out.warn(study.warnings)


def _constraint(constraint: Constraint, rows: Sequence[Row]) -> dict[str, object]:
    bound = constraint.bound(rows)
    return {"text": str(constraint), "bound": None if bound != bound else bound}  # noqa: PLR0124 - NaN


def _show(
    out: Output, study: Study, choice: Choice, front: Sequence[Row], wanted: Sequence[str]
) -> None:
    others = [metric for metric in [_USUAL, _UTILITY, *study.metrics] if metric in study.metrics]
    metrics = list(dict.fromkeys([*wanted, *others]))
    shown = metrics[: max(_MOST_COLUMNS, len(set(wanted)))]
    out.table(
        ["variant", "family", "α", "effective α", *shown, ""],
        [
            (
                row.name,
                row.family,
                number(row.alpha, "g"),
                number(row.effective_alpha),
                *(number(row.scores.get(metric), ".4g") for metric in shown),
                _mark(row, choice, front),
            )
            for row in study.rows
        ],
    )
    out.line("")
    if len(metrics) > len(shown):
        out.line(f"{len(metrics) - len(shown)} more metrics: --json has them")
    for row in study.rows:
        if row.problem is not None or row.stale is not None:
            out.line(f"{row.name}: {row.problem or f'stale: {row.stale}'}")


def _mark(row: Row, choice: Choice, front: Sequence[Row]) -> str:
    marks = [
        ("→", row is choice.row),
        ("*", any(row is other for other in front)),
        ("problem", row.problem is not None),
        ("stale", row.problem is None and row.stale is not None),
    ]
    return " ".join(mark for mark, held in marks if held)
