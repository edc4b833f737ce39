"""Pieces of the report's markup; ``text`` is what every foreign string goes through."""

from __future__ import annotations

import html
import json
import math
from typing import TYPE_CHECKING

from uipe_merge.errors import escape

if TYPE_CHECKING:
    from collections.abc import Iterable


def plot(name: str, title: str, said: str, height: int) -> str:
    """Return the place of a plot: an image with a name, and markup below it."""
    words = f"{text(title)}; the numbers are in the tables"
    under = f"<figcaption>{said}</figcaption>" if said else ""
    return (
        f'<figure><div class="plot" id="{name}" role="img" aria-label="{words}" '
        f'style="min-height:{height}px"></div>{under}</figure>'
    )


def wide(name: str, caption: str, head: str, lines: str) -> str:
    """Return a table that scrolls by itself, with the keyboard too, where it is too wide."""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-labelledby="{name}">\n<table>\n'
        f'<caption id="{name}"><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )


def cell(tag: str, content: str, *, scope: str = "", name: str = "") -> str:
    """Return a cell of a table."""
    attributes = (f' scope="{scope}"' if scope else "") + (f' class="{name}"' if name else "")
    return f"<{tag}{attributes}>{content}</{tag}>"


def number(value: float | None, form: str) -> str:
    """Return a cell with a number, or a dash where there is none."""
    return cell("td", "–" if value is None else format(value, form), name="number")


def bullets(items: Iterable[str]) -> str:
    """Return a list."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def code(words: str) -> str:
    """Return a name, a path or a command as markup that shows it."""
    return f"<code>{text(words)}</code>"


def text(words: str) -> str:
    """Return somebody's text as markup that shows it."""
    return html.escape(escape(words))


def script_json(value: object) -> str:
    """Return JSON for inside a script: no number that it lacks, and nothing that ends it."""
    encoded = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
