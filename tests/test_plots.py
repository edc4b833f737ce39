"""The heat map: its grid, the two kinds of file, and what is refused."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, run_here, write_pair
from reference import Models, mixed_pair

import uipe_merge
from uipe_merge.plots import make_grids


def test_the_grid_has_layers_as_rows_and_modules_as_columns(tmp_path: Path) -> None:
    one = torch.ones(4)
    models = Models(
        tmp_path,
        {
            "model.embed_tokens.weight": (one, one),
            "model.layers.0.mlp.up.weight": (one, 2 * one),
            "model.layers.2.mlp.up.weight": (2 * one, one),
            "model.layers.2.mlp.down.weight": (3 * one, 0 * one),  # θᵤ = 0: no ratio
            "step": (torch.tensor(1), torch.tensor(2)),
        },
    )
    [grid] = make_grids(uipe_merge.inspect(*models.paths, progress=False))
    assert sorted(grid.kinds) == ["mlp.down", "mlp.up", "model.embed_tokens"]
    assert grid.layers == ["0", "2", "–"]
    cells = {
        (layer, kind): ratio
        for layer, row in zip(grid.layers, grid.values, strict=True)
        for kind, ratio in zip(grid.kinds, row, strict=True)
    }
    numbers = {place: ratio for place, ratio in cells.items() if not math.isnan(ratio)}
    assert numbers == {
        ("0", "mlp.up"): 0.5,
        ("2", "mlp.up"): 1.0,
        ("–", "model.embed_tokens"): 0.0,
    }
    assert len(cells) == 9


def test_a_heat_map_is_written_as_a_picture(tmp_path: Path) -> None:
    target = tmp_path / "map.PNG"
    result = run_here("inspect", *write_pair(tmp_path), "--plot", target)
    assert result.code == 0, result.err
    assert f"heat map written to {target}" in result.err
    picture = target.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert width > 200
    assert height > 200


def test_a_heat_map_is_written_as_a_page_that_needs_no_network(tmp_path: Path) -> None:
    target = tmp_path / "map.html"
    pair = mixed_pair(torch.bfloat16, torch.bfloat16, (5,))
    hostile = "model.layers.3.<img src=x onerror=alert(1)>.weight"
    models = Models(tmp_path, {hostile: pair, "model.layers.0.mlp.weight": pair})
    result = run_here("inspect", *models.paths, "--plot", target, "--json")
    assert result.code == 0, result.err
    json.loads(result.out)  # data alone on stdout
    page = target.read_text()
    assert "<img src=x" not in page
    assert "\\u003cimg src=x" not in page  # which is markup again to the library
    assert "&lt;img src=x" in page.replace("\\u0026", "&")
    assert "<script src=" not in page
    assert "http" not in page[: page.index("<script")]


@pytest.mark.parametrize(("name", "library"), [("map.png", "matplotlib"), ("map.html", "plotly")])
def test_a_missing_library_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = run_here("inspect", "no", "directories", "--plot", tmp_path / name)
    assert_refused(result, 2, name, f"needs {library}", "pip install 'uipe-merge[plot]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("map.pdf", "neither .png nor .html"),
        ("map", "neither"),
        ("no/map.png", "no such directory"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, said: str
) -> None:
    assert_refused(run_here("inspect", "no", "directories", "--plot", tmp_path / name), 2, said)


@pytest.mark.parametrize("name", ["map.png", "map.html"])
def test_a_plot_that_cannot_be_written_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    result = run_here("inspect", *write_pair(tmp_path), "--plot", tmp_path / name)
    assert_refused(result, 8, str(tmp_path / name), "is a directory")
