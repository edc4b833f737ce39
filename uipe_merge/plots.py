"""The layer × module heat maps of an update, as a picture or as a page."""

from __future__ import annotations

import html
import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import UsageError, escape
from uipe_merge.naming import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from uipe_merge.inspected import Group, Inspection

_LIBRARY = {".png": "matplotlib", ".html": "plotly"}
_RATIO = "‖v‖/‖θᵤ‖"


class Grid(NamedTuple):
    """The numbers of one heat map.

    Attributes:
        title: What they are.
        kinds: Module kinds, the columns.
        layers: Layer names, the rows; ``–`` holds what belongs to no layer.
        values: By row and column; NaN where there is no such tensor, or no number.
        signed: Whether they lie on both sides of zero, as cosines do.
    """

    title: str
    kinds: list[str]
    layers: list[str]
    values: list[list[float]]
    signed: bool = False

    @property
    def limit(self) -> float:
        """The largest magnitude, for a scale with zero in its middle."""
        known = [abs(value) for row in self.values for value in row if not math.isnan(value)]
        return max(known, default=0.0) or 1.0


def check(path: str) -> None:
    """Refuse a file that could not be drawn, before anything is measured.

    Raises:
        UsageError: The suffix is neither .png nor .html, the library for it is not
            installed, or the directory does not exist.
    """
    target = Path(path)
    library = _LIBRARY.get(target.suffix.lower())
    if library is None:
        raise UsageError("is neither .png nor .html", file=path)
    if importlib.util.find_spec(library) is None:
        raise UsageError(
            f"drawing it needs {library}",
            file=path,
            remedy="install it with `pip install 'uipe-merge[plot]'`",
        )
    if not target.parent.is_dir():
        raise UsageError("no such directory", file=target.parent, remedy="create it first")


def heat_map(found: Inspection, path: str) -> None:
    """Draw the heat map of an inspection to ``path``.

    Raises:
        OutputError: The file cannot be written.
    """
    grids = make_grids(found)
    try:
        if path.lower().endswith(".png"):
            _picture(grids, path)
        else:
            _page(grids, path)
    except OSError as error:
        raise system_error(error, path) from None


def make_grids(found: Inspection) -> list[Grid]:
    """Arrange the groups of an inspection by layer (rows) and module kind (columns).

    The first shows ‖v‖/‖θᵤ‖, one more for each further update its cosine with v.
    """
    in_layers = [spot.kind for spot in found.cells if spot.layer is not None]
    outside = [spot.kind for spot in found.cells if spot.layer is None]
    kinds = list(dict.fromkeys([*in_layers, *outside]))
    names = ["–" if layer is None else str(layer) for layer in found.layers]

    def grid(title: str, measure: Callable[[Group], float | None], *, signed: bool) -> Grid:
        values = []
        for layer in found.layers:
            row = [found.cells.get(Place(layer, kind)) for kind in kinds]
            measured = [None if group is None else measure(group) for group in row]
            values.append([math.nan if value is None else value for value in measured])
        return Grid(title, [escape(kind) for kind in kinds], names, values, signed)

    grids = [grid(f"{_RATIO} by layer and module", lambda group: group.ratio, signed=False)]
    for number, update in enumerate(found.updates):
        title = f"cosine of v with {escape(update)}"
        grids.append(grid(title, partial(_cosine, number), signed=True))
    return grids


def _cosine(number: int, group: Group) -> float | None:
    return group.cosines[number]


def _picture(grids: list[Grid], path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 3.0 + 0.45 * len(grids[0].kinds)
    height = (2.5 + 0.22 * len(grids[0].layers)) * len(grids)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for number, grid in enumerate(grids, 1):
        axes = figure.add_subplot(len(grids), 1, number)
        image = axes.imshow(
            grid.values,
            aspect="auto",
            cmap="RdBu_r" if grid.signed else "viridis",
            vmin=-grid.limit if grid.signed else None,
            vmax=grid.limit if grid.signed else None,
        )
        axes.set_xticks(
            range(len(grid.kinds)), grid.kinds, rotation=60, ha="right", parse_math=False
        )
        step = max(1, len(grid.layers) // 40)
        rows = range(0, len(grid.layers), step)
        axes.set_yticks(rows, [grid.layers[row] for row in rows])
        axes.set_ylabel("layer")
        axes.set_title(grid.title, parse_math=False)
        axes.set_facecolor("0.9")
        figure.colorbar(image, format="%.2g" if grid.signed else "%.1e")
    figure.savefig(path, dpi=150)


def _page(grids: list[Grid], path: str) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    # A tensor name is somebody else's text: it must not be markup on a page.
    titles = [html.escape(grid.title) for grid in grids]
    figure = make_subplots(
        rows=len(grids), cols=1, subplot_titles=titles, vertical_spacing=0.3 / len(grids)
    )
    for number, grid in enumerate(grids, 1):
        cells = [[None if math.isnan(value) else value for value in row] for row in grid.values]
        height = 1 / len(grids)
        what = "cosine" if grid.signed else _RATIO
        form = ".3f" if grid.signed else ".3e"
        figure.add_trace(
            go.Heatmap(
                x=[html.escape(kind) for kind in grid.kinds],
                y=grid.layers,
                z=cells,
                colorscale="RdBu_r" if grid.signed else "Viridis",
                colorbar={
                    "title": what,
                    "exponentformat": "e",
                    "len": 0.8 * height,
                    "y": 1 - (number - 0.5) * height,
                },
                hovertemplate=f"layer %{{y}}<br>%{{x}}<br>{what} = %{{z:{form}}}<extra></extra>",
                zmin=-grid.limit if grid.signed else None,
                zmax=grid.limit if grid.signed else None,
            ),
            row=number,
            col=1,
        )
    rows = max(len(grids[0].layers), 12)
    figure.update_layout(height=len(grids) * (260 + 14 * rows))
    figure.update_yaxes(type="category", title="layer", autorange="reversed")
    # The script is embedded: the page opens without a network.
    figure.write_html(path, include_plotlyjs=True, full_html=True)
