"""The picture of the trade-off: what is on it, and what is refused."""

import math
import re
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from uipe_merge.errors import OutputError, UsageError
from uipe_merge.study import tradeoff
from uipe_merge.study.choosing import Row, choose, pareto_front, parse_constraint

FQ, MU = "forget_quality", "model_utility"


def row(name: str, family: str, alpha: float | None, quality: float, utility: float) -> Row:
    return Row(name, family, alpha, {FQ: quality, MU: utility})


ROWS = [
    row("base", "reference", -1.0, 1.8e-21, 0.6227),
    row("npo", "reference", 0.0, 3e-14, 0.61),
    row("kept", "reference", None, 1.0, 0.6137),
    row("uipe-4", "uipe", 4.0, 0.0, 0.38),
    row("uipe-0.5", "uipe", 0.5, 2e-9, 0.6),
    row("uipe-1", "uipe", 1.0, 1e-4, 0.588),
    row("uipe-2", "uipe", 2.0, 0.21, 0.55),
    row("control-1", "control", 1.0, 2e-14, 0.602),
    row("control-4", "control", 4.0, 1e-13, 0.5),
    row("uipe-3", "uipe", 3.0, 1e-3, 0.5)._replace(stale="old"),
    Row("uipe-8", "uipe", 8.0, {FQ: math.nan, MU: 0.1}),
]


def draw(target: Path, rows: list[Row], text: str = "model_utility>=0.95*unlearned") -> None:
    constraint = parse_constraint(text)
    tradeoff.draw(
        rows,
        str(target),
        objective=FQ,
        utility=constraint.metric,
        constraint=constraint,
        front=pareto_front(rows, FQ, constraint.metric),
        chosen=choose(rows, FQ, [constraint]).row,
    )


def texts(target: Path) -> list[str]:
    svg = target.read_text(encoding="utf-8")
    ET.fromstring(svg)  # noqa: S314 - written by this test
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_the_picture_says_what_it_shows(tmp_path: Path) -> None:
    target = tmp_path / "t.svg"
    draw(target, ROWS)
    said = texts(target)
    for text in (
        "model_utility",
        "log10 forget_quality",
        "uipe",
        "control",
        "original (base)",
        "unlearned (npo)",
        "retain only (kept)",
        "Pareto front",
        "chosen: uipe-1",
        "stale or with a problem",
        "model_utility>=0.95*unlearned",
        "floor 1e-30: what is below it is drawn on it",
    ):
        assert text in said, text
    assert [said.count(alpha) for alpha in ("0.5", "4", "3", "8")] == [1, 2, 1, 0]
    again = tmp_path / "again.svg"
    draw(again, ROWS)
    assert again.read_bytes() == target.read_bytes()


def test_a_png_has_something_on_it(tmp_path: Path) -> None:
    target = tmp_path / "T.PNG"
    draw(target, ROWS)
    picture = target.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert width > 800
    assert height > 600
    from matplotlib import image

    colours = {tuple(pixel) for line in image.imread(target)[::5] for pixel in line[::5]}
    assert len(colours) > 20


def test_a_metric_that_is_no_p_value_is_not_drawn_in_logarithms(tmp_path: Path) -> None:
    rows = [Row(f"u{a}", "uipe", a, {"wmdp": 0.5 - a / 10, "mmlu": 0.6}) for a in (1.0, 2.0)]
    target = tmp_path / "t.svg"
    tradeoff.draw(rows, str(target), objective="wmdp", utility="mmlu", minimise=True)
    said = texts(target)
    assert "wmdp  (lower is better)" in said
    assert not any("log10" in text or "floor" in text for text in said)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    target = tmp_path / "t.svg"
    draw(target, [])
    assert "no model has both scores" in texts(target)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    names = [
        "$\\frac{a}$",
        "<script>alert(1)</script>",
        "a\x1b[31m\n",
        "_hidden",
        "北京",
        "n" * 500,
    ]
    rows = [row("npo", "reference", 0.0, 1e-9, 0.6)]
    rows += [
        row(name, "reference", None, 0.5, 0.5 + place / 100) for place, name in enumerate(names)
    ]
    rows.append(row("$x_{", "uipe", 1e300, 5e-324, 1e150))
    target = tmp_path / "t.svg"
    draw(target, rows, "model_utility>=0.1")
    said = texts(target)
    for text in (
        "retain only ($\\frac{a}$)",
        "retain only (<script>alert(1)</script>)",
        "retain only (a\\x1b[31m\\n)",
        "retain only (_hidden)",
        "chosen: $x_{",
    ):
        assert text in said, text
    assert "<script" not in target.read_text(encoding="utf-8")
    assert max(map(len, said)) < 100


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t.pdf", "is neither .png nor .svg"),
        ("t", "is neither"),
        ("no/t.png", "no such directory; create it first"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        tradeoff.check(str(tmp_path / name))


def test_a_missing_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tradeoff.check(str(tmp_path / "t.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="needs matplotlib; install it with") as caught:
        tradeoff.check(str(tmp_path / "t.png"))
    assert "pip install 'uipe-merge[plot]'" in str(caught.value)


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.png").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        draw(tmp_path / "t.png", ROWS)
