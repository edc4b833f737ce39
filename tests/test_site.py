"""The site builds strictly, is whole, and asks no other host for anything."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import uipe_merge

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LOADS = {"src", "srcset", "poster", "data", "action"}
NAMES = ["merge", "grid", "search", "collect", "evaluate", "inspect", "verify", "demo"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="the site needs mkdocs-material"
)


class Page(HTMLParser):
    """What a page links to, what it loads, and where it may be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {"", "__top"}
        self.classes: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.classes |= set(values.get("class", "").split())
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.loaded += [values[name] for name in LOADS & values.keys()]
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link":
            self.loaded.append(values["href"])
        self.loaded += re.findall(r"url\(([^)]*)\)", values.get("style", ""))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "built"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


def entries(nav: str | list[Any] | dict[str, Any]) -> list[str]:
    """The pages that a part of the navigation names."""
    if isinstance(nav, str):
        return [nav]
    below = nav.values() if isinstance(nav, dict) else nav
    return [entry for one in below for entry in entries(one)]


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = entries(yaml.safe_load(text[text.index("\nnav:") :])["nav"])
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[str, Page]) -> None:
    loaded = {(name, url) for name, page in pages.items() for url in page.loaded}
    assert len(loaded) > len(pages)
    outside = [(name, url) for name, url in loaded if urlsplit(url).netloc or url.startswith("//")]
    assert outside == []
    for sheet in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        text = sheet.read_text(encoding="utf-8")
        urls = re.findall(r"(?:@import\s*|url\()\s*[\"']?([^\"')\s]+)", text)
        assert [url for url in urls if not url.startswith(("data:", "#"))] == [], sheet
        assert "font-face" not in text or sheet.suffix == ".css"
    # The theme would fetch a script of another host for diagrams.
    assert [name for name, page in pages.items() if "mermaid" in page.classes] == []


def test_links_within_the_site_lead_somewhere(site: Path, pages: dict[str, Page]) -> None:
    checked = 0
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or name == "404.html":
                continue
            target = os.path.normpath(parts.path) if parts.path else name
            target = "index.html" if target == "." else target
            assert (site / target).is_file(), (name, link)
            if parts.fragment:
                assert unquote(parts.fragment) in pages[target].anchors, (name, link)
                checked += 1
    assert checked > 100


def test_commands_and_functions_are_all_there(pages: dict[str, Page]) -> None:
    commands, python = pages["cli.html"], pages["python.html"]
    assert set(NAMES) <= commands.anchors
    for option in ("--alpha-layers", "--on-mismatch", "--per-layer-groups"):
        assert option in commands.text
    exported = [
        name for name in uipe_merge.__all__ if name not in {"ORIGINAL_ITSELF", "__version__"}
    ]
    assert [name for name in exported if name not in python.text] == []
    assert not [name for name, page in pages.items() if "generated:" in page.text]
    assert "reader.py" in pages["architecture.html"].text


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "ARCHITECTURE.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "recipes.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](steering.md#no-such-heading)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "built"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no-such-heading" in done.stderr
