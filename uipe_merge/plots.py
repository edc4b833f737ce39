"""The layer × module heat map of an update, as a picture or as a page."""

from __future__ import annotations

import html
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import UsageError, escape

if TYPE_CHECKING:
    from uipe_merge.inspection import Inspection

_LIBRARY = {".png": "matplotlib", ".html": "plotly"}
_TITLE = "‖v‖/‖θᵤ‖ by layer and module"


class Grid(NamedTuple):
    """The numbers of a heat map.

    Attributes:
        kinds: Module kinds, the columns.
        layers: Layer names, the rows; ``–`` holds what belongs to no layer.
        ratios: ‖v‖/‖θᵤ‖ by row and column; NaN where there is no such tensor.
    """

    kinds: list[str]
    layers: list[str]
    ratios: list[list[float]]


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
    grid = make_grid(found)
    try:
        if path.lower().endswith(".png"):
            _picture(grid, path)
        else:
            _page(grid, path)
    except OSError as error:
        raise system_error(error, path) from None


def make_grid(found: Inspection) -> Grid:
    """Arrange the groups of an inspection by layer (rows) and module kind (columns)."""
    in_layers = [spot.kind for spot in found.cells if spot.layer is not None]
    outside = [spot.kind for spot in found.cells if spot.layer is None]
    kinds = list(dict.fromkeys([*in_layers, *outside]))
    ratios = []
    for layer in found.layers:
        by_kind = {spot.kind: group for spot, group in found.cells.items() if spot.layer == layer}
        row = [by_kind[kind].ratio if kind in by_kind else None for kind in kinds]
        ratios.append([math.nan if ratio is None else ratio for ratio in row])
    names = ["–" if layer is None else str(layer) for layer in found.layers]
    return Grid([escape(kind) for kind in kinds], names, ratios)


def _picture(grid: Grid, path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 3.0 + 0.45 * len(grid.kinds)
    height = 2.5 + 0.22 * len(grid.layers)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(grid.ratios, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=60, ha="right", parse_math=False)
    step = max(1, len(grid.layers) // 40)
    rows = range(0, len(grid.layers), step)
    axes.set_yticks(rows, [grid.layers[row] for row in rows])
    axes.set_ylabel("layer")
    axes.set_title(_TITLE)
    axes.set_facecolor("0.9")
    figure.colorbar(image, format="%.1e")
    figure.savefig(path, dpi=150)


def _page(grid: Grid, path: str) -> None:
    import plotly.graph_objects as go

    cells = [[None if math.isnan(ratio) else ratio for ratio in row] for row in grid.ratios]
    # A tensor name is somebody else's text: it must not be markup on a page.
    kinds = [html.escape(kind) for kind in grid.kinds]
    figure = go.Figure(
        go.Heatmap(
            x=kinds,
            y=grid.layers,
            z=cells,
            colorscale="Viridis",
            colorbar={"title": "‖v‖/‖θᵤ‖", "exponentformat": "e"},
            hovertemplate="layer %{y}<br>%{x}<br>‖v‖/‖θᵤ‖ = %{z:.3e}<extra></extra>",
        )
    )
    figure.update_layout(title=_TITLE, yaxis={"title": "layer", "autorange": "reversed"})
    figure.update_yaxes(type="category")
    # The script is embedded: the page opens without a network.
    figure.write_html(path, include_plotlyjs=True, full_html=True)
