"""The plots of the report, as the documents that plotly draws.

Every name is somebody else's text, and plotly takes text for markup: ``label`` escapes it.
Colours are names of the page's style (``--uipe``), which the page's script looks up.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.errors import escape
from uipe_merge.study.metrics import LOG10_FLOOR
from uipe_merge.study.tradeoff import P_VALUES, Axis

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from uipe_merge.study.choosing import Choice
    from uipe_merge.study.constraints import Constraint, Row

Figure = dict[str, Any]
"""What plotly reads: ``data`` and ``layout``."""

_LONGEST = 40
# Markers and dashes say again what the colours say.
_STYLES = {"uipe": ("--uipe", "circle", "solid"), "control": ("--control", "square", "dash")}
_OTHER = ("--other", "diamond", "dashdot")
_MARKS = {0.0: "cross", -1.0: "x", None: "triangle-up"}
_ROLES = {0.0: "unlearned", -1.0: "original", None: "retain only"}


class Asked(NamedTuple):
    """What was looked for in a grid, and what was found.

    Attributes:
        objective: The metric that was maximised.
        minimise: Or minimised.
        utility: The one it was traded for.
        constraints: What had to be kept.
        front: The models that are not dominated.
        choice: The model, and why.
        command: What was typed.
    """

    objective: str
    minimise: bool
    utility: str
    constraints: Sequence[Constraint]
    front: Sequence[Row]
    choice: Choice
    command: str

    @property
    def kept(self) -> Constraint | None:
        """The constraint on the metric that the objective is traded for."""
        return next((each for each in self.constraints if each.metric == self.utility), None)

    def axis(self, metric: str) -> Axis:
        """Return the axis of a metric: log10 where it is a p-value."""
        above = any(each.metric == metric and each.from_above for each in self.constraints)
        lower = above or (self.minimise and metric == self.objective)
        return Axis(metric, lower, LOG10_FLOOR if metric in P_VALUES else None)


def label(text: str) -> str:
    """Return text that plotly shows as it is: no markup, no control characters, not too long."""
    shown = escape(text)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
    # It knows no &quot; and shows it as it is.
    return html.escape(shown, quote=False)


def tradeoff(rows: Sequence[Row], asked: Asked) -> Figure | None:
    """Return the objective against what it was traded for; ``None`` where no model has both."""
    x, y = asked.axis(asked.utility), asked.axis(asked.objective)
    seen = [row for row in rows if not math.isnan(x.place(row) + y.place(row))]
    if not seen:
        return None
    start = [row for row in seen if row.family == "reference" and row.alpha == 0 and row.trusted]
    traces = _families(seen, x.place, y.place, start[:1], numbered=True)
    traces += _references([row for row in seen if row.family == "reference"], x.place, y.place)
    front = [row for row in seen if any(row is other for other in asked.front)]
    ring = {"symbol": "circle-open", "size": 18, "color": "--ink", "line": {"width": 1.5}}
    traces += _points(front, "Pareto front", x.place, y.place, marker=ring)
    traces += _chosen(seen, asked, x.place, y.place)
    shapes = []
    if asked.kept is not None:
        shapes += _rule("x", asked.kept.bound(rows), str(asked.kept), "--bound", "dot")
    if y.floor is not None and any(y.below(row) for row in seen):
        said = f"floor {y.floor:.0e}: less is drawn on it"
        shapes += _rule("y", math.log10(y.floor), said, "--soft", "longdash")
    return framed(traces, _escaped(x), _escaped(y), 420, shapes)


def curve(rows: Sequence[Row], metric: str, asked: Asked) -> Figure | None:
    """Return one metric over α; ``None`` where no model has it."""
    axis = asked.axis(metric)
    seen = [row for row in rows if not math.isnan(axis.place(row))]
    stepped = [row for row in seen if row.alpha is not None]
    if not seen:
        return None
    start = [row for row in stepped if row.family == "reference" and row.alpha == 0 and row.trusted]
    traces = _families(stepped, _alpha, axis.place, start[:1])
    traces += _references([r for r in stepped if r.family == "reference"], _alpha, axis.place)
    traces += _chosen(stepped, asked, _alpha, axis.place)
    shapes = []
    for row in seen:
        if row.alpha is None and row.trusted:  # it is at no α: a level to reach
            said = f"retain only ({row.name})"
            shapes += _rule("y", axis.place(row), said, "--soft", "dashdot")
    for constraint in asked.constraints:
        if constraint.metric == metric:
            bound = constraint.bound(rows)
            if axis.floor is not None and not math.isnan(bound):
                bound = math.log10(max(bound, axis.floor))
            shapes += _rule("y", bound, str(constraint), "--bound", "dot")
    return framed(traces, "α", _escaped(axis), 280, shapes)


def effective(rows: Sequence[Row]) -> Figure | None:
    """Return the α that models came out as against the α asked for; ``None`` without any."""
    seen = [row for row in rows if not math.isnan(_alpha(row) + _effective(row))]
    if not seen:
        return None
    ends = [min(map(_alpha, seen)), max(map(_alpha, seen))]
    exact = {
        "type": "scatter",
        "mode": "lines",
        "name": "as asked",
        "x": ends,
        "y": ends,
        "line": {"color": "--soft", "dash": "dot", "width": 1.5},
        "hoverinfo": "skip",
    }
    traces = [exact, *_families(seen, _alpha, _effective, [])]
    references = [row for row in seen if row.family == "reference"]
    traces += _references(references, _alpha, _effective)
    return framed(traces, "α asked", "effective α", 320)


def _families(
    rows: Sequence[Row],
    x: Callable[[Row], float],
    y: Callable[[Row], float],
    start: Sequence[Row],
    *,
    numbered: bool = False,
) -> list[Figure]:
    """Draw every family through its α, from the unlearned model that all of them start from."""
    traces = []
    for family in dict.fromkeys(row.family for row in rows if row.family != "reference"):
        colour, symbol, dash = _STYLES.get(family, _OTHER)
        mine = [row for row in rows if row.family == family and row.trusted]
        joined = sorted([*mine, *start], key=lambda row: row.alpha or 0.0) if mine else []
        own = [row.family == family for row in joined]
        line: dict[str, object] = {
            "mode": "lines+markers+text" if numbered else "lines+markers",
            "line": {"color": colour, "dash": dash, "width": 1.5},
            "marker": {"color": colour, "symbol": symbol, "size": [8 if o else 0 for o in own]},
        }
        if numbered:
            line |= {
                "text": [_short(row) if o else "" for row, o in zip(joined, own, strict=True)],
                "textposition": "bottom right" if family == "control" else "top right",
                "textfont": {"color": colour, "size": 11},
                "cliponaxis": False,
            }
        traces += _points(joined, label(family), x, y, **line)
    doubtful = [row for row in rows if not row.trusted]
    cross = {"symbol": "x-thin-open", "size": 9, "color": "--soft", "line": {"width": 2}}
    return traces + _points(doubtful, "stale or with a problem", x, y, marker=cross)


def _references(
    rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> list[Figure]:
    traces = []
    for row in rows:
        if row.trusted:
            mark = {"symbol": _MARKS.get(row.alpha, "triangle-down"), "size": 11, "color": "--ink"}
            name = f"{_ROLES.get(row.alpha, 'reference')} ({label(row.name)})"
            traces += _points([row], name, x, y, marker=mark)
    return traces


def _chosen(
    rows: Sequence[Row], asked: Asked, x: Callable[[Row], float], y: Callable[[Row], float]
) -> list[Figure]:
    edge = {"color": "--paper", "width": 1}
    star = {"symbol": "star", "size": 17, "color": "--chosen", "line": edge}
    mine = [row for row in rows if row is asked.choice.row]
    return [
        trace
        for row in mine
        for trace in _points([row], f"chosen: {label(row.name)}", x, y, marker=star)
    ]


def _points(
    rows: Sequence[Row],
    name: str,
    x: Callable[[Row], float],
    y: Callable[[Row], float],
    **style: object,
) -> list[Figure]:
    if not rows:
        return []
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x(row) for row in rows],
        "y": [y(row) for row in rows],
        "hovertext": [_hover(row, x(row), y(row)) for row in rows],
        "hoverinfo": "text",
    }
    return [points | style]


def _hover(row: Row, x: float, y: float) -> str:
    alpha = "" if row.alpha is None else f"<br>α = {row.alpha:g}"
    return f"{label(row.name)}{alpha}<br>({x:.4g}, {y:.4g})"


def _rule(axis: str, at: float, said: str, colour: str, dash: str) -> list[Figure]:
    """Return a line across the plot, at one place of an axis, named in the legend."""
    if not math.isfinite(at):
        return []
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1}
    return [
        {
            "type": "line",
            **ends,
            f"{other}ref": "paper",
            "line": {"color": colour, "dash": dash, "width": 2},
            "layer": "below",
            "showlegend": True,
            "name": label(said),
        }
    ]


def framed(
    traces: list[Figure], x: str, y: str, height: int, shapes: Sequence[Figure] = ()
) -> Figure:
    """Return a figure with its axes, transparent and in the colours of the page."""

    def axis(title: str) -> Figure:
        return {
            "title": {"text": title, "standoff": 8},
            "gridcolor": "--rule",
            "linecolor": "--soft",
            "zeroline": False,
            "automargin": True,
        }

    layout = {
        "height": height,
        "margin": {"l": 50, "r": 14, "t": 14, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--ink", "size": 12},
        "hoverlabel": {
            "bgcolor": "--panel",
            "bordercolor": "--soft",
            "font": {"color": "--ink"},
            "align": "left",
        },
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "showlegend": any(trace["type"] == "scatter" for trace in traces),
        "xaxis": axis(x),
        "yaxis": axis(y),
        "shapes": list(shapes),
    }
    return {"data": traces, "layout": layout}


def _escaped(axis: Axis) -> str:
    return html.escape(axis.label, quote=False)


def _alpha(row: Row) -> float:
    return math.nan if row.alpha is None else row.alpha


def _short(row: Row) -> str:
    return "" if row.alpha is None else f"{row.alpha:g}"


def _effective(row: Row) -> float:
    value = row.effective_alpha
    return math.nan if value is None or not math.isfinite(value) else value
