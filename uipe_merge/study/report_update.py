"""The update of every layer and module, as the manifests of a grid's models tell it."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import UipeMergeError
from uipe_merge.naming import Place, natural, place
from uipe_merge.output.manifest import MANIFEST_NAME, parse_manifest
from uipe_merge.study import results
from uipe_merge.study.report_figures import Figure, framed, label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from uipe_merge.study.constraints import Row
    from uipe_merge.study.gridfile import Variant

_MOST_MANIFEST = 1_000_000_000


class Update(NamedTuple):
    """‖v‖/‖θᵤ‖ by layer (rows) and module kind (columns).

    Attributes:
        name: Whose manifest it is from.
        kinds: The columns.
        layers: The rows; ``–`` holds what belongs to no layer.
        ratios: ``None`` where there is no such tensor, or no number.
    """

    name: str
    kinds: list[str]
    layers: list[str]
    ratios: list[list[float | None]]


def read_update(grid: Path, variants: Sequence[Variant], chosen: Row | None) -> Update | None:
    """Return the update of a grid, if every manifest that can be read has records of tensors.

    The direction is the same for every α: that of the chosen model is shown, or else of the
    first one that moved. A manifest that cannot be read is the problem of its row in the table.
    """
    found: dict[str, Mapping[str, object]] = {}
    for variant in variants:
        if variant.path is None:
            continue
        path = grid / variant.path / MANIFEST_NAME
        try:
            document, _ = parse_manifest(results.read_bounded(path, _MOST_MANIFEST)[0], path)
        except UipeMergeError:
            continue
        tensors = document.get("tensors")
        if not isinstance(tensors, dict) or not tensors:
            return None
        if variant.family == "uipe":
            found[variant.name] = tensors
    first = [] if chosen is None else [chosen.name]
    for name in dict.fromkeys([*first, *found]):
        update = _arranged(name, found.get(name, {}))
        if update is not None:
            return update
    return None


def heat(update: Update) -> Figure:
    """Return the heat map of an update."""
    # Shortened names may be equal, and equal names would share a column.
    labels = [label(kind) for kind in update.kinds]
    columns = list(range(len(labels)))
    hover = [
        [
            f"layer {layer}<br>{kind}<br>‖v‖/‖θᵤ‖ = {'–' if ratio is None else f'{ratio:.3e}'}"
            for kind, ratio in zip(labels, line, strict=True)
        ]
        for layer, line in zip(update.layers, update.ratios, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "x": columns,
        "y": list(range(len(update.layers))),
        "z": update.ratios,
        "hovertext": hover,
        "hoverinfo": "text",
        "colorscale": "Viridis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "thickness": 12,
            "exponentformat": "e",
            "nticks": 5,
            "title": {"text": "‖v‖/‖θᵤ‖", "side": "top"},
        },
    }
    step = max(1, len(update.layers) // 24)
    places = list(range(0, len(update.layers), step))
    # Upright, and with room of their own: names are cut off where they leave the plot.
    room = 24 + 7 * max(len(html.unescape(each)) for each in labels)
    figure = framed([trace], "", "layer", 80 + room + 15 * max(len(update.layers), 6))
    figure["layout"]["xaxis"] |= {
        "tickvals": columns,
        "ticktext": labels,
        "tickangle": -90,
        "automargin": False,
    }
    figure["layout"]["yaxis"] |= {
        "tickvals": places,
        "ticktext": [update.layers[at] for at in places],
        "autorange": "reversed",
    }
    figure["layout"]["margin"] |= {"t": 70, "b": room}
    return figure


def _arranged(name: str, tensors: Mapping[str, object]) -> Update | None:
    cells: dict[Place, list[tuple[float, float]]] = {}
    for tensor, record in tensors.items():
        ratio = _real(record.get("ratio")) if isinstance(record, dict) else None
        if ratio is not None and isinstance(record, dict):
            cells.setdefault(place(tensor), []).append((ratio, _real(record.get("norm")) or 0.0))
    if not cells:
        return None
    inside = sorted({spot.layer for spot in cells if spot.layer is not None})
    layers = [*inside, *([None] if any(spot.layer is None for spot in cells) else [])]
    within = {spot.kind for spot in cells if spot.layer is not None}
    kinds = sorted(within, key=natural)
    kinds += sorted({spot.kind for spot in cells} - within, key=natural)
    ratios = [[_together(cells.get(Place(layer, kind), [])) for kind in kinds] for layer in layers]
    return Update(name, kinds, ["–" if layer is None else str(layer) for layer in layers], ratios)


def _together(parts: Sequence[tuple[float, float]]) -> float | None:
    """Return ‖v‖/‖θᵤ‖ of several tensors, from that and ‖v‖ of each."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0][0]
    # ‖θᵤ‖ is told only where v is not zero: the experts that did not move count for nothing.
    moved = [(norm, norm / ratio) for ratio, norm in parts if ratio > 0 and norm > 0]
    update = math.hypot(*(norm for norm, _ in moved))
    unlearned = math.hypot(*(norm for _, norm in moved))
    return update / unlearned if unlearned and math.isfinite(update) else 0.0


def _real(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
