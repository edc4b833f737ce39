"""The picture of a grid: what was forgotten against what it cost, one line a family."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import UsageError, escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from uipe_merge.study.constraints import Constraint, Row

_SUFFIXES = (".png", ".svg")

P_VALUES = frozenset({"forget_quality", "ks_test_p_val_forget", "ks_test_pval_forget"})
"""Metrics that range over hundreds of powers of ten, and may underflow to 0."""

# Okabe and Ito's colours, told apart by the colour-blind; dashes and markers say it again.
_STYLES = {"uipe": ("#0072B2", "o", "-"), "control": ("#E69F00", "s", "--")}
_OTHER = ("#009E73", "D", "-.")
_CHOSEN, _BOUND, _GREY = "#D55E00", "#CC79A7", "0.45"
_PATCH = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
"""Behind small text: what it crosses stays readable, and so does it."""

_LONGEST = 48
_REFERENCE_MARKS = {0.0: "P", -1.0: "X", None: "^"}
_REFERENCE_NAMES = {0.0: "unlearned", -1.0: "original", None: "retain only"}


class Axis(NamedTuple):
    """One axis of the picture.

    Attributes:
        metric: What it shows.
        lower: Whether less of it is better.
        floor: Where its logarithm ends; ``None`` for an axis that is none.
    """

    metric: str
    lower: bool = False
    floor: float | None = None

    @property
    def label(self) -> str:
        """What is written beside it."""
        text = self.metric if self.floor is None else f"log10 {self.metric}"
        return _shown(text) + ("  (lower is better)" if self.lower else "")

    def place(self, row: Row) -> float:
        """Return where a model lies on it; NaN where it has no finite score."""
        value = row.score(self.metric)
        if self.floor is None or math.isnan(value):
            return value
        return math.log10(max(value, self.floor))

    def below(self, row: Row) -> bool:
        """Whether a model lies below the floor."""
        return self.floor is not None and row.score(self.metric) < self.floor


def check(path: str) -> None:
    """Refuse a file that could not be drawn, before anything is read.

    Raises:
        UsageError: The suffix is neither .png nor .svg, matplotlib is not installed, or the
            directory does not exist.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise UsageError("is neither .png nor .svg", file=path)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "drawing it needs matplotlib",
            file=path,
            remedy="install it with `pip install 'uipe-merge[plot]'`",
        )
    if not target.parent.is_dir():
        raise UsageError("no such directory", file=target.parent, remedy="create it first")


def draw(
    rows: Sequence[Row],
    path: str,
    *,
    objective: str,
    utility: str,
    minimise: bool = False,
    constraint: Constraint | None = None,
    front: Sequence[Row] = (),
    chosen: Row | None = None,
) -> None:
    """Draw a grid to ``path``.

    Args:
        rows: The models; those without both scores are left out.
        path: A .png or .svg file.
        objective: The metric of the y axis; log10 of it where it is a p-value.
        utility: That of the x axis.
        minimise: The objective is better where it is smaller.
        constraint: On ``utility``, its bound drawn as a line.
        front: The models that are marked as not dominated.
        chosen: The model that is marked as chosen.

    Raises:
        OutputError: The file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from uipe_merge.study.metrics import LOG10_FLOOR

    lower = constraint is not None and constraint.from_above
    x = Axis(utility, lower=lower)
    y = Axis(objective, lower=minimise, floor=LOG10_FLOOR if objective in P_VALUES else None)
    # Text as text: found by a search, readable by a screen reader, and smaller.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "uipe-merge"}):
        figure = Figure(figsize=(7.5, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _fill(axes, rows, x, y, constraint=constraint, front=front, chosen=chosen)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            legend = figure.legend(
                handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
        try:
            with warnings.catch_warnings():
                # A name in a script that the font lacks is drawn as boxes.
                warnings.simplefilter("ignore", UserWarning)
                dated = {"Date": None} if path.lower().endswith(".svg") else {}
                figure.savefig(path, dpi=150, metadata=dated)
        except OSError as error:
            raise system_error(error, path) from None


def _fill(
    axes: Axes,
    everything: Sequence[Row],
    x: Axis,
    y: Axis,
    *,
    constraint: Constraint | None,
    front: Sequence[Row],
    chosen: Row | None,
) -> None:
    rows = [row for row in everything if not math.isnan(x.place(row) + y.place(row))]
    axes.set_xlabel(x.label, parse_math=False)
    axes.set_ylabel(y.label, parse_math=False)
    axes.grid(visible=True, color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.09)
    if not rows:
        axes.text(0.5, 0.5, "no model has both scores", transform=axes.transAxes, ha="center")
    _lines(axes, rows, x, y)
    _references(axes, rows, x, y)
    best = [row for row in rows if any(row is other for other in front)]
    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black"}
    _points(axes, best, x, y, linestyle="none", marker="o", label="Pareto front", **ring)
    if chosen is not None and any(row is chosen for row in rows):
        star = {"markersize": 15, "color": _CHOSEN, "markeredgecolor": "white", "zorder": 5}
        name = f"chosen: {_shown(chosen.name)}"
        _points(axes, [chosen], x, y, linestyle="none", marker="*", label=name, **star)
    if constraint is not None and not math.isnan(bound := constraint.bound(everything)):
        axes.axvline(bound, color=_BOUND, linestyle=":", label=_shown(str(constraint)))
    if y.floor is not None and any(y.below(row) for row in rows):
        level = math.log10(y.floor)
        axes.axhline(level, color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.text(
            0.99,
            level,
            f"floor {y.floor:.0e}: what is below it is drawn on it",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=_GREY,
            bbox=_PATCH,
        )


def _points(axes: Axes, rows: Sequence[Row], x: Axis, y: Axis, **style: Any) -> None:  # noqa: ANN401 - matplotlib's
    if rows:
        axes.plot([x.place(row) for row in rows], [y.place(row) for row in rows], **style)


def _lines(axes: Axes, rows: Sequence[Row], x: Axis, y: Axis) -> None:
    """Draw every family through its α, from the unlearned model that all of them start from."""
    start = [row for row in rows if row.family == "reference" and row.alpha == 0 and row.trusted]
    families = dict.fromkeys(row.family for row in rows if row.family != "reference")
    for family in families:
        colour, marker, dash = _STYLES.get(family, _OTHER)
        mine = [row for row in rows if row.family == family and row.trusted]
        joined = sorted([*mine, *start[:1]], key=lambda row: row.alpha or 0.0) if mine else []
        # One line, marked where it is the family's own: dashes over dashes would fill the gaps.
        own = [place for place, row in enumerate(joined) if row.family == family]
        line = {"color": colour, "linestyle": dash, "linewidth": 1.2, "marker": marker}
        _points(axes, joined, x, y, markevery=own, label=_shown(family), **line)
        _alphas(axes, mine, x, y, colour, above=family != "control")
    untrusted = [row for row in rows if not row.trusted]
    doubtful = {"marker": "x", "linestyle": "none", "label": "stale or with a problem"}
    _points(axes, untrusted, x, y, color=_GREY, **doubtful)
    _alphas(axes, untrusted, x, y, _GREY, above=False)


def _alphas(axes: Axes, rows: Sequence[Row], x: Axis, y: Axis, colour: str, *, above: bool) -> None:
    for row in rows:
        if row.alpha is not None:
            axes.annotate(
                f"{row.alpha:g}",
                (x.place(row), y.place(row)),
                xytext=(6, 5) if above else (6, -12),
                textcoords="offset points",
                fontsize=8,
                color=colour,
                bbox=_PATCH,
                zorder=3,
                parse_math=False,
            )


def _references(axes: Axes, rows: Sequence[Row], x: Axis, y: Axis) -> None:
    for row in rows:
        if row.family != "reference" or not row.trusted:
            continue
        role = _REFERENCE_NAMES.get(row.alpha, "reference")
        mark = {"marker": _REFERENCE_MARKS.get(row.alpha, "v"), "markersize": 8, "color": "black"}
        name = f"{role} ({_shown(row.name)})"
        _points(axes, [row], x, y, linestyle="none", label=name, zorder=4, **mark)


def _shown(name: str) -> str:
    """Return a name as it is drawn: no control characters, and no wider than the picture."""
    text = escape(name)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
