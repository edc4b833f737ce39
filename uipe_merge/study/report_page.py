"""``collect --report``: a grid, its scores and the choice as one page that asks for nothing.

A name, a path or a message in it is somebody else's text: ``markup.text`` escapes all of it. The
same study gives the same bytes, as a page of a result is itself kept and compared.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.errors import UipeMergeError, UsageError
from uipe_merge.output.filesystem import LocalFileSystem, write_document
from uipe_merge.study import report_figures as figures
from uipe_merge.study import report_markup as markup
from uipe_merge.study import report_template
from uipe_merge.study.gridfile import read_grid
from uipe_merge.study.report_update import heat, read_update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.study.collecting import Study
    from uipe_merge.study.constraints import Row
    from uipe_merge.study.gridfile import Variant
    from uipe_merge.study.report_figures import Asked, Figure
    from uipe_merge.study.report_update import Update

_MOST_CURVES, _MOST_COLUMNS = 12, 24
"""Metrics that are drawn and tabled; lm-eval gives hundreds."""

_FAMILIES = {"uipe": "solid line, circles", "control": "dashed line, squares"}


def check(path: str) -> None:
    """Refuse a page that could not be written, before anything is read.

    Raises:
        UsageError: The suffix is not .html, plotly is not installed, or the directory does
            not exist.
    """
    target = Path(path)
    if target.suffix.lower() != ".html":
        raise UsageError("is not .html", file=path)
    if importlib.util.find_spec("plotly") is None:
        raise UsageError(
            "drawing it needs plotly",
            file=path,
            remedy="install it with `pip install 'uipe-merge[plot]'`",
        )
    if not target.parent.is_dir():
        raise UsageError("no such directory", file=target.parent, remedy="create it first")
    if target.is_dir():
        raise UsageError("is a directory", file=path, remedy="name a file")


def write(study: Study, path: str, asked: Asked) -> None:
    """Write the page of a study, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
        CorruptInputError: The grid was damaged since it was read.
    """
    content = render(study, asked)
    target, filesystem = Path(path), LocalFileSystem()
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write_document(filesystem, draft, content)
        filesystem.rename(draft, target)
    except UipeMergeError:
        filesystem.remove(draft)
        raise
    filesystem.sync_directory(target.parent)


def render(study: Study, asked: Asked) -> bytes:
    """Return the page of a study."""
    from plotly.offline import get_plotlyjs

    document, variants = read_grid(study.grid)
    update = read_update(study.grid, variants, asked.choice.row)
    metrics = _metrics(study, asked)
    drawn: dict[str, Figure] = {}
    sections = [
        ("choice", "The choice", _choice(study, asked)),
        ("tradeoff", "Trade-off", _tradeoff(study, asked, drawn)),
        ("curves", "Scores over α", _curves(study, asked, metrics, drawn)),
        ("effective", "Effective α", _effective(study, drawn)),
        ("update", "The update by layer and module", _update(update, drawn)),
        ("variants", "All variants", _table(study, asked, metrics)),
        ("commands", "Commands", _commands(study, asked, document, variants)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    title = f"Choosing α: {markup.text(study.grid.absolute().name)}"
    source = (
        f"A step of α from {markup.code(study.unlearned or 'the unlearned model')}, away from "
        f"{markup.code(study.original or 'the original model')}"
    )
    body = "\n".join(
        [
            f"<header>\n<h1>{title}</h1>",
            f"<p>{source}; {_count(study)}.</p>",
            f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n</header>',
            '<main id="main" tabindex="-1">',
            "<noscript><p>The plots need JavaScript; the tables have the same numbers.</p></noscript>",
            *(
                f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}\n</section>'
                for name, title, content in sections
            ),
            "</main>",
            '<footer><p class="soft">Written by uipe-merge collect.</p></footer>',
        ]
    )
    return report_template.page(
        title=title,
        body=body,
        figures=markup.script_json(drawn),
        library=get_plotlyjs() if drawn else "",
    )


def _count(study: Study) -> str:
    models, scored = len(study.rows), sum(bool(row.scores) for row in study.rows)
    return f"{models} {'model' if models == 1 else 'models'}, {scored} with scores"


def _metrics(study: Study, asked: Asked) -> list[str]:
    """Return the metrics there are, those that were asked for first."""
    wanted = [asked.objective, *(each.metric for each in asked.constraints), asked.utility]
    there = study.metrics
    return list(dict.fromkeys([*(each for each in wanted if each in there), *there]))


def _choice(study: Study, asked: Asked) -> str:
    row = asked.choice.row
    verdict, name = "No α is chosen", "choice"
    if row is not None:
        alpha = "" if row.alpha is None else f"α = {row.alpha:g}: "
        name = "choice made"
        verdict = f"→ {alpha}{markup.text(row.name)}"
    word = "lowest" if asked.minimise else "highest"
    kept = ", ".join(markup.code(str(each)) for each in asked.constraints) or "no constraint"
    parts = [
        f'<div class="{name}"><p class="verdict">{verdict}</p>',
        f"<p>{markup.text(asked.choice.reason)}</p></div>",
        f"<p>Looked for: the {word} {markup.code(asked.objective)}, subject to {kept}.</p>",
    ]
    if study.warnings:
        parts.append(f"<h3>Warnings</h3>\n{markup.bullets(map(markup.text, study.warnings))}")
    if asked.choice.rejected:
        why = [f"{markup.code(name)}: {markup.text(said)}" for name, said in asked.choice.rejected]
        parts.append(
            f"<details><summary>Out of the question: {len(why)}</summary>\n{markup.bullets(why)}</details>"
        )
    return "\n".join(parts)


def _tradeoff(study: Study, asked: Asked, drawn: dict[str, Figure]) -> str:
    what = f"{asked.objective} against {asked.utility}"
    families = dict.fromkeys(row.family for row in study.rows if row.family != "reference")
    lines = ", ".join(
        f"{markup.text(family)}: {_FAMILIES.get(family, 'dash-dotted line, diamonds')}"
        for family in families
    )
    said = (
        f"{markup.text(what)}; a number at a point is its α. {lines}. The star is the chosen model, "
        "rings are the Pareto front, a cross is stale or has a problem."
    )
    figure = figures.tradeoff(study.rows, asked)
    return _plot("plot-tradeoff", f"Trade-off: {what}", said, figure, drawn) or (
        f"<p>No model has both {markup.code(asked.objective)} and {markup.code(asked.utility)}.</p>"
    )


def _curves(study: Study, asked: Asked, metrics: Sequence[str], drawn: dict[str, Figure]) -> str:
    parts = []
    for number, metric in enumerate(metrics[:_MOST_CURVES], 1):
        figure = figures.curve(study.rows, metric, asked)
        plot = _plot(f"plot-curve-{number}", f"{metric} over α", "", figure, drawn)
        parts.append(
            f"<div><h3>{markup.text(metric)}</h3>\n{plot or '<p>No finite score.</p>'}</div>"
        )
    if not parts:
        return "<p>No model has scores.</p>"
    rest = len(metrics) - _MOST_CURVES
    more = f"<p>{rest} more metrics are not drawn: --json has them.</p>" if rest > 0 else ""
    return f'<div class="curves">{"".join(parts)}</div>{more}'


def _effective(study: Study, drawn: dict[str, Figure]) -> str:
    said = "What rounding to the output dtype left of the step, as the manifests tell it."
    plot = _plot(
        "plot-effective", "Effective α against α asked", said, figures.effective(study.rows), drawn
    )
    return plot or "<p>No manifest tells an effective α.</p>"


def _update(update: Update | None, drawn: dict[str, Figure]) -> str:
    if update is None:
        return ""
    said = f"‖v‖/‖θᵤ‖ of the update v, from the manifest of {markup.code(update.name)}."
    plot = _plot("plot-update", "Update by layer and module", said, heat(update), drawn)
    head = "".join(markup.cell("th", markup.text(kind), scope="col") for kind in update.kinds)
    lines = "\n".join(
        f"<tr>{markup.cell('th', layer, scope='row')}"
        + "".join(markup.number(ratio, ".3e") for ratio in line)
        + "</tr>"
        for layer, line in zip(update.layers, update.ratios, strict=True)
    )
    table = markup.wide(
        "caption-update",
        "‖v‖/‖θᵤ‖ by layer (rows) and module (columns)",
        markup.cell("th", "layer", scope="col") + head,
        lines,
    )
    return f"{plot}\n<details><summary>The same as a table</summary>\n{table}</details>"


def _table(study: Study, asked: Asked, metrics: Sequence[str]) -> str:
    shown = metrics[:_MOST_COLUMNS]
    columns = ["variant", "marks", "family", "α", "effective α", *shown, "problem"]
    numeric = {"α", "effective α", *shown}
    head = "".join(
        markup.cell(
            "th", markup.text(column), scope="col", name="number" if column in numeric else ""
        )
        for column in columns
    )
    lines = "\n".join(_row(row, asked, shown) for row in study.rows)
    rest = len(metrics) - len(shown)
    more = f" {rest} more metrics are left out: --json has them." if rest > 0 else ""
    said = (
        "Every model of the grid, references first. The marks: → chosen; * on the Pareto front of "
        f"{markup.text(asked.objective)} and {markup.text(asked.utility)}.{more}"
    )
    return markup.wide("caption-variants", said, head, lines)


def _row(row: Row, asked: Asked, metrics: Sequence[str]) -> str:
    chosen = row is asked.choice.row
    marks = [
        ("chosen", "→ chosen", chosen),
        ("front", "* front", any(row is other for other in asked.front)),
        ("problem", "problem", row.problem is not None),
        ("stale", "stale", row.problem is None and row.stale is not None),
    ]
    said = row.problem or (f"stale: {row.stale}" if row.stale is not None else "")
    cells = [
        markup.cell("th", markup.text(row.name), scope="row"),
        markup.cell(
            "td", "".join(f'<span class="mark {n}">{t}</span>' for n, t, held in marks if held)
        ),
        markup.cell("td", markup.text(row.family)),
        markup.number(row.alpha, "g"),
        markup.number(row.effective_alpha, ".4g"),
        *(markup.number(row.scores.get(metric), ".4g") for metric in metrics),
        markup.cell("td", markup.text(said), name="said"),
    ]
    opening = '<tr class="chosen">' if chosen else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


def _commands(
    study: Study, asked: Asked, document: dict[str, object], variants: Sequence[Variant]
) -> str:
    parts = []
    if study.command:
        parts.append(f"<h3>The grid</h3>\n<pre><code>{markup.text(study.command)}</code></pre>")
    entries = document.get("variants")
    each = [
        (variant.name, command)
        for variant, entry in zip(variants, entries if isinstance(entries, list) else [], strict=False)
        if isinstance(entry, dict) and isinstance(command := entry.get("command"), str) and command
    ]  # fmt: skip
    chosen = None if asked.choice.row is None else asked.choice.row.name
    parts += [
        f"<h3>The chosen model</h3>\n<pre><code>{markup.text(command)}</code></pre>"
        for name, command in each
        if name == chosen
    ]
    parts.append(f"<h3>The choice</h3>\n<pre><code>{markup.text(asked.command)}</code></pre>")
    if each:
        made = "".join(
            f"<p>{markup.code(name)}</p>\n<pre><code>{markup.text(command)}</code></pre>\n"
            for name, command in each
        )
        parts.append(f"<details><summary>Every model</summary>\n{made}</details>")
    return "\n".join(parts)


def _plot(name: str, title: str, said: str, figure: Figure | None, drawn: dict[str, Figure]) -> str:
    """Return the place of a plot, and note what is drawn there; nothing without a figure."""
    if figure is None:
        return ""
    drawn[name] = figure
    return markup.plot(name, title, said, figure["layout"]["height"])
