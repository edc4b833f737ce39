"""The page of a grid: what stands on it, whose text cannot break it, and that it asks nobody."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from test_collecting import WRITTEN, entry, model, run, score, write_grid

from uipe_merge.errors import OutputError, UsageError
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.study import report_figures, report_page
from uipe_merge.study.choosing import choose, pareto_front, parse_constraint
from uipe_merge.study.collecting import Study, collect
from uipe_merge.study.gridfile import read_grid
from uipe_merge.study.report_figures import Asked
from uipe_merge.study.report_markup import script_json
from uipe_merge.study.report_update import read_update

FQ, MU = "forget_quality", "model_utility"
KEEP = "model_utility>=0.95*unlearned"
HOSTILE = '</script><img src="http://x.example/" onerror=alert(1)>&\'%{x}${"'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page as a browser would take it apart; it refuses tags that do not match."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(raw.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if "tr" in self._open:
            attributes, text = self.rows[-1]
            self.rows[-1] = (attributes, text + data + " ")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def figures(self) -> dict[str, report_figures.Figure]:
        def refuse(constant: str) -> object:
            raise AssertionError(constant)

        [text] = [t for t in self.texts["script"] if t.startswith("{")]
        found: dict[str, report_figures.Figure] = json.loads(text, parse_constant=refuse)
        return found


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    root = tmp_path / "grid"
    fill(root, [("base", "reference", -1.0, 1e-20, 0.65), ("npo", "reference", 0.0, 1e-12, 0.6),
                ("uipe-0.5", "uipe", 0.5, 1e-9, 0.59), ("uipe-1", "uipe", 1.0, 1e-4, 0.58),
                ("uipe-2", "uipe", 2.0, 0.0, 0.4), ("control-1", "control", 1.0, 1e-12, 0.6)])  # fmt: skip
    return root


def fill(root: Path, variants: Iterable[tuple[str, str, float, float, float]]) -> None:
    entries = []
    for name, family, alpha, quality, utility in variants:
        digest = model(root / name, alpha)
        command = f"uipe-merge merge base npo --alpha {alpha:g}"
        entries.append({**entry(name, family, alpha, digest), "command": command})
        score(root / "scores", name, {FQ: quality, MU: utility})
    write_grid(root, entries)


def asked(study: Study, text: str = KEEP) -> Asked:
    constraint = parse_constraint(text)
    return Asked(
        FQ,
        False,
        MU,
        [constraint],
        pareto_front(study.rows, FQ, MU),
        choose(study.rows, FQ, [constraint]),
        "uipe-merge collect grid",
    )


def rendered(grid: Path, text: str = KEEP) -> Page:
    study = collect(grid)
    return Page(report_page.render(study, asked(study, text)))


def records(grid: Path, tensors: dict[str, object]) -> None:
    """Give every manifest records of tensors."""
    document = json.loads((grid / "grid.json").read_text())
    for variant in document["variants"]:
        path = grid / variant["path"] / "uipe_merge.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tensors": tensors}))
        os.utime(path, (WRITTEN, WRITTEN))
        variant["manifest_sha256"] = None
    (grid / "grid.json").write_text(json.dumps(document))


def test_the_page_is_whole_and_asks_nobody(grid: Path) -> None:
    page = rendered(grid)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.texts["h1"]) == 1
    assert page.texts["title"] == ["Choosing α: grid"]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "action", "data", "poster", "background"):
            assert name not in attributes, tag
        assert tag not in {"link", "iframe", "object", "base", "form", "img"}
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.texts["style"][0]
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")


def test_a_reader_without_eyes_or_mouse_finds_the_way(grid: Path) -> None:
    records(grid, {"model.layers.0.mlp.up.weight": {"ratio": 0.5, "norm": 1.0}})
    page = rendered(grid)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        if (attributes.get("href") or "").startswith("#"):
            assert str(attributes["href"])[1:] in ids
    links = [a for tag, a in page.tags if tag == "a"]
    assert links[0] == {"class": "skip", "href": "#main"}
    assert len(page.all("table")) == len(page.texts["caption"]) == 2
    assert all(a.get("scope") in {"row", "col"} for a in page.all("th"))
    assert all(a.get("aria-label") for _, a in page.tags if a.get("class") == "plot")
    assert ":focus-visible" in page.texts["style"][0]
    assert "prefers-color-scheme: dark" in page.texts["style"][0]


def test_the_table_marks_in_words(grid: Path) -> None:
    score(grid / "scores", "uipe-0.5", {FQ: 1e-9, MU: 0.59}, at=WRITTEN - 1)
    shutil.rmtree(grid / "uipe-2")
    page = rendered(grid)
    [(_, chosen)] = [row for row in page.rows if row[0].get("class") == "chosen"]
    assert chosen.split()[:4] == ["uipe-1", "→", "chosen", "*"]
    by_name = {text.split()[0]: text for _, text in page.rows}
    assert "older than the model" in by_name["uipe-0.5"]
    assert " stale " in by_name["uipe-0.5"]
    assert " problem " in by_name["uipe-2"]
    assert "no such directory" in by_name["uipe-2"]
    said = " ".join(page.texts["body"])
    assert "→ α = 1: uipe-1" in said
    assert "uipe-1 has the highest forget_quality" in said
    assert "uipe-merge grid base npo" in said
    assert "uipe-merge merge base npo --alpha 1" in said
    assert "uipe-merge collect grid" in said


def test_the_plots_hold_what_they_say(grid: Path) -> None:
    score(grid / "scores", "retain", {FQ: 1.0, MU: 0.61})
    figures = rendered(grid).figures
    assert list(figures) == ["plot-tradeoff", "plot-curve-1", "plot-curve-2", "plot-effective"]
    traces = {trace["name"]: trace for trace in figures["plot-tradeoff"]["data"]}
    assert list(traces) == [
        "uipe", "control", "original (base)", "unlearned (npo)", "retain only (retain)",
        "Pareto front", "chosen: uipe-1",
    ]  # fmt: skip
    assert traces["chosen: uipe-1"]["x"] == [0.58]
    assert traces["chosen: uipe-1"]["y"] == [pytest.approx(-4)]
    assert traces["uipe"]["y"][-1] == -30  # on the floor
    shapes = {shape["name"]: shape for shape in figures["plot-tradeoff"]["layout"]["shapes"]}
    assert shapes["model_utility&gt;=0.95*unlearned"]["x0"] == pytest.approx(0.57)
    assert "floor 1e-30: less is drawn on it" in shapes
    assert traces["uipe"]["line"]["dash"] != traces["control"]["line"]["dash"]
    exact, uipe, control, *_ = figures["plot-effective"]["data"]
    assert exact["x"] == exact["y"]
    assert uipe["y"] == [0.495, 0.99, 1.98]
    assert control["x"] == [1.0]


def test_the_library_takes_the_figures(grid: Path) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    records(grid, {"model.layers.0.mlp.up.weight": {"ratio": 0.5, "norm": 1.0}})

    def plain(node: object) -> object:
        """The colours as the page's script will set them."""
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, list):
            return [plain(each) for each in node]
        return "#123456" if isinstance(node, str) and node.startswith("--") else node

    figures = rendered(grid).figures
    assert "plot-update" in figures
    for figure in figures.values():
        go.Figure(plain(figure))  # raises at a property that it does not know


def test_a_heat_map_where_every_manifest_has_records(grid: Path) -> None:
    assert "plot-update" not in rendered(grid).figures
    tensors: dict[str, object] = {
        "model.layers.10.mlp.up.weight": {"ratio": 0.5, "norm": 1.0},
        "model.layers.2.mlp.up.weight": {"ratio": 0.25, "norm": 1.0},
        "model.layers.2.mlp.experts.0.up.weight": {"ratio": 0.3, "norm": 3.0},
        "model.layers.2.mlp.experts.1.up.weight": {"ratio": 0.4, "norm": 4.0},
        "model.norm.weight": {"ratio": 0.125, "norm": 1.0},
        "step": {"operation": "keep"},
        "lm_head.weight": {"ratio": None},
    }
    records(grid, tensors)
    study = collect(grid)
    variants = read_grid(grid)[1]
    update = read_update(grid, variants, asked(study).choice.row)
    assert update is not None
    assert update.name == "uipe-1"
    assert update.layers == ["2", "10", "–"]
    assert update.kinds == ["mlp.experts.*.up", "mlp.up", "model.norm"]
    both = pytest.approx(5 / math.hypot(10, 10))
    assert update.ratios == [[both, 0.25, None], [None, 0.5, None], [None, None, 0.125]]
    page = rendered(grid)
    assert page.figures["plot-update"]["data"][0]["z"][1] == [None, 0.5, None]
    (grid / "uipe-2" / "uipe_merge.json").write_text('{"schema": 1, "files": {}}')
    assert "plot-update" not in rendered(grid).figures


def test_hostile_names_are_text(grid: Path) -> None:
    name = HOSTILE.replace("/", "\u2044") + "\x1b[31m\u202e<b>\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")  # fmt: skip
    digest = model(grid / "m", 3.0)
    document = json.loads((grid / "grid.json").read_text())
    added = {**entry(name, "uipe", 3.0, digest), "path": "m", "command": HOSTILE + "\ud800"}
    document["variants"].append(added)
    document |= {"command": HOSTILE, "original": HOSTILE, "unlearned": "</title><h1>" + HOSTILE}
    (grid / "grid.json").write_text(json.dumps(document))
    score(grid / "scores", name, {FQ: 0.9, MU: 0.6, "</script><b>": 1.0})
    score(grid / "scores", "</script><h1>stray", {FQ: 0.9}, file="TOFU_SUMMARY.json")
    records(grid, {f"model.layers.0.{HOSTILE}.weight": {"ratio": 0.5, "norm": 1.0}})
    study = collect(grid)
    raw = report_page.render(study, asked(study))
    page = Page(raw)
    assert len(page.texts["h1"]) == len(page.texts["title"]) == 1
    assert len(page.texts["script"]) == 3
    assert not {"img", "b"} & {tag for tag, _ in page.tags}
    assert HOSTILE in " ".join(page.texts["code"])
    assert b"\x1b" not in raw.replace(b"\\x1b", b"")
    assert "\u202e" not in raw.decode()
    for figure in page.figures.values():
        for text in strings(figure):
            assert not re.search("<(?!br>)", text), text
    [star] = [t for t in page.figures["plot-tradeoff"]["data"] if t["name"].startswith("chosen")]
    assert star["name"].startswith("chosen: &lt;\u2044script&gt;&lt;img")


def strings(node: object) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in strings(value)]
    return [node] if isinstance(node, str) else []


def test_a_name_of_the_directory_is_text_too(tmp_path: Path) -> None:
    root = tmp_path / "<b>&amp;"
    fill(root, [("uipe-1", "uipe", 1.0, 1e-4, 0.5)])
    page = rendered(root)
    assert page.texts["title"] == page.texts["h1"] == ["Choosing α: <b>&amp;"]


def test_without_any_scores(grid: Path) -> None:
    shutil.rmtree(grid / "scores")
    page = rendered(grid)
    assert list(page.figures) == ["plot-effective"]
    said = " ".join(page.texts["main"])
    assert "No model has both forget_quality and model_utility." in said
    assert "No model has scores." in said
    assert "No α is chosen" in said
    assert sum(" problem " in text for _, text in page.rows[1:]) == 6


def test_with_nothing_to_draw_no_script_is_there(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid", [])
    page = rendered(tmp_path / "grid")
    assert page.texts["script"] == ["{}"]
    assert "No manifest tells an effective α." in " ".join(page.texts["main"])


def test_one_alpha(tmp_path: Path) -> None:
    root = tmp_path / "grid"
    fill(root, [("uipe-1", "uipe", 1.0, 1e-4, 0.5)])
    page = rendered(root, "model_utility>=0.4")
    assert "only one α was scored" in " ".join(page.texts["main"])
    assert page.figures["plot-curve-1"]["data"][0]["x"] == [1.0]


def test_nobody_keeps_enough(grid: Path) -> None:
    page = rendered(grid, "model_utility>=0.99*original")
    assert not any(row[0] for row in page.rows)
    said = " ".join(page.texts["main"])
    assert "nothing is chosen: no variant meets" in said
    assert "uipe-0.5 comes nearest" in said
    assert not any("chosen" in t["name"] for t in page.figures["plot-tradeoff"]["data"])
    assert "cannot be told" in " ".join(rendered(grid, "model_utility>=1*retain").texts["main"])


def test_numbers_that_json_has_not(grid: Path) -> None:
    score(grid / "scores", "uipe-1", f'{{"{FQ}": NaN, "{MU}": 0.5, "low": -Infinity}}')
    score(grid / "scores", "uipe-2", f'{{"{FQ}": null, "{MU}": 1e308, "tiny": 5e-324}}')
    document = json.loads((grid / "uipe-1" / "uipe_merge.json").read_text())
    assert document["summary"]["effective_alpha"] == 0.99
    page = rendered(grid)
    assert page.figures  # which refuses NaN and infinities
    assert "No finite score." in " ".join(page.texts["main"])  # low
    [text] = [text for _, text in page.rows if text.startswith("uipe-1 ")]
    assert "-inf" in text
    assert script_json({"a": [math.nan, -math.inf, (None, "</")]}) == (
        '{"a":[null,null,[null,"\\u003c/"]]}'
    )


def test_of_hundreds_of_metrics_some_are_drawn(grid: Path) -> None:
    many = {f"task{place}": {"acc,none": 0.5} for place in range(100)}
    score(grid / "scores", "uipe-1", {"results": many}, file="results_2026.json")
    page = rendered(grid)
    assert sum(name.startswith("plot-curve") for name in page.figures) == 12
    assert "90 more metrics are not drawn" in " ".join(page.texts["main"])


def test_the_same_study_gives_the_same_bytes(grid: Path) -> None:
    assert len({report_page.render(s, asked(s)) for s in (collect(grid), collect(grid))}) == 1


def test_the_command_writes_it(grid: Path, tmp_path: Path) -> None:
    target = tmp_path / "R.HTML"
    target.write_text("old")
    result = run(grid, "--report", target, "--subject-to", KEEP)
    assert result.code == 0, result.err
    assert f"report written to {target}" in result.err
    assert "→ uipe-1 has the highest" in result.out
    command = f"uipe-merge collect {grid} --maximize forget_quality --subject-to '{KEEP}'"
    assert command in Page(target.read_bytes()).texts["code"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R.HTML", "grid"]
    json.loads(run(grid, "--report", target, "--json").out)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("r.pdf", "is not .html"),
        ("no/r.html", "no such directory; create it first"),
        ("d.html", "is a directory"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "d.html").mkdir()
    result = run(tmp_path / "nowhere", "--report", tmp_path / name)
    assert result.code == 2
    assert said in result.err


def test_a_missing_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match="needs plotly; install it with") as caught:
        report_page.check(str(tmp_path / "r.html"))
    assert "pip install 'uipe-merge[plot]'" in str(caught.value)


def test_a_failure_leaves_the_old_page(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "r.html"
    target.write_text("old")

    def fail(self: LocalFileSystem, source: Path, target: Path) -> None:
        raise OutputError("no space", file=target)

    monkeypatch.setattr(LocalFileSystem, "rename", fail)
    assert run(grid, "--report", target).code == 8
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid", "r.html"]


def browse(page: Path, work: Path) -> tuple[str, str, set[str]]:
    """Return the document that a browser makes of a page, its messages, what the page asked for.

    A browser asks for things of its own, which no page is the origin of.
    """
    assert BROWSER is not None
    log = work / "net.json"
    shown = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={work / 'profile'}", f"--log-net-log={log}",
            "--enable-logging=stderr", "--window-size=600,900", "--virtual-time-budget=5000",
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, encoding="utf-8", timeout=120, check=True,
    )  # fmt: skip
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked_for = {
        event["url"]
        for event in events
        if "url" in event and event.get("initiator", "not an origin") != "not an origin"
    }
    messages = "\n".join(line for line in shown.stderr.splitlines() if "CONSOLE" in line)
    return shown.stdout, messages, asked_for


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_draws_it_and_asks_nobody(grid: Path, tmp_path: Path) -> None:
    records(grid, {f"model.layers.{n}.{HOSTILE}.weight": {"ratio": 0.5} for n in range(3)})
    target = tmp_path / "r.html"
    assert run(grid, "--report", target, "--subject-to", KEEP).code == 0
    document, messages, asked_for = browse(target, tmp_path)
    assert messages == ""
    assert asked_for == set()
    assert 'data-drawn="5"' in document
    drawn = re.sub(r"<script>.*?</script>", "", document, flags=re.DOTALL)
    assert drawn.count('class="xtitle"') == 4  # the columns of the heat map are their own names
    assert drawn.count('class="ytitle"') == 5
    assert ">chosen: uipe-1</text>" in drawn
    assert ">model_utility&gt;=0.95*unlearned</text>" in drawn
    assert "<img" not in drawn


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_the_policy_stops_what_would_run(grid: Path, tmp_path: Path) -> None:
    """That the browser sees requests and messages at all, and what they are without a policy."""
    target = tmp_path / "r.html"
    assert run(grid, "--report", target).code == 0
    smuggled = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "ran"</script>'
    page = target.read_text().replace("</main>", f"{smuggled}</main>")
    target.write_text(page)
    document, messages, asked_for = browse(target, tmp_path)
    assert "Content Security Policy" in messages
    assert asked_for == set()
    assert "<title>ran</title>" not in document
    target.write_text(page.replace("Content-Security-Policy", "none"))
    document, _, asked_for = browse(target, tmp_path)
    assert asked_for == {"http://127.0.0.1:9/x.png"}
    assert "<title>ran</title>" in document
