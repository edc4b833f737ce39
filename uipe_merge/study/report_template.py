"""The frame of the report: its style, its script, and the one page they stand on.

The page has a content security policy that names its two scripts by their digests: nothing
that a name smuggles in would run, and no request leaves the page whatever is in it.
"""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f6f8; --ink: #1b1f24; --soft: #565d66; --rule: #d3d7dd;
  --link: #0b57a4; --good: #0b6b4f; --bad: #a3330a; --uipe: #0072b2; --control: #b06a00;
  --other: #00805c; --chosen: #c24a00; --bound: #a8497f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1e2228; --ink: #e6e9ed; --soft: #a5adb8; --rule: #3a414b;
    --link: #7cbcff; --good: #5fd0a8; --bad: #ff9a73; --uipe: #56b4e9; --control: #e69f00;
    --other: #2fc79a; --chosen: #ff8a4c; --bound: #e08fc0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main, footer { max-width: 72rem; margin: 0 auto; padding: 0 clamp(0.9rem, 4vw, 2rem); }
header { padding-top: 1.5rem; }
main { padding-bottom: 1rem; }
h1 { font-size: clamp(1.35rem, 5vw, 1.9rem); line-height: 1.2; margin: 0 0 0.5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.6rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 0.2rem; }
h1, h2, h3, p, li, dd, figcaption { overflow-wrap: anywhere; }
p, figcaption { max-width: 68ch; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.25rem 0; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 0.5rem; top: 0.5rem; padding: 0.5rem 0.8rem; background: var(--paper); z-index: 9; }
.choice { background: var(--panel); border-left: 5px solid var(--soft); padding: 0.8rem 1rem; }
.choice.made { border-color: var(--good); }
.choice p { margin: 0.3rem 0; }
.choice .verdict { font-size: 1.15rem; font-weight: 600; }
.soft, figcaption, caption { color: var(--soft); }
figure { margin: 0.6rem 0 1.2rem; }
figcaption { margin-top: 0.5rem; }
.plot { width: 100%; min-width: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.5rem; }
.curves > * { min-width: 0; }
.wide { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; padding-bottom: 0.4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(68ch, calc(100vw - 2.5rem)); }
th, td { padding: 0.35rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { border-bottom-width: 2px; white-space: nowrap; }
tbody th { font-weight: 600; min-width: 8rem; max-width: 22rem; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.said { min-width: 11rem; max-width: 34rem; overflow-wrap: anywhere; }
tr.chosen > * { background: var(--panel); border-bottom: 2px solid var(--good); }
.mark { white-space: nowrap; display: block; }
.mark.chosen { color: var(--good); font-weight: 700; }
.mark.problem, .mark.stale { color: var(--bad); font-weight: 600; }
pre { background: var(--panel); padding: 0.7rem 0.9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 0.85rem; }
summary { cursor: pointer; padding: 0.3rem 0; color: var(--link); }
footer { padding-top: 1rem; padding-bottom: 2rem; font-size: 0.85rem; }
@media print { nav, .skip { display: none; } }
"""

# Colours are named in the figures and looked up in the style, so that both schemes have theirs.
SCRIPT = """
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const coloured = (node, style) => {
    if (Array.isArray(node)) return node.map((each) => coloured(each, style));
    if (node === null || typeof node !== "object") return node;
    const copy = {};
    for (const [key, value] of Object.entries(node)) {
      const named = key.endsWith("color") && typeof value === "string" && value.startsWith("--");
      copy[key] = named ? style.getPropertyValue(value).trim() : coloured(value, style);
    }
    return copy;
  };
  // The legend gets room of its own, or on a phone there would be little left of the plot.
  const legend = (entries, width) => {
    const longest = Math.max(...entries.map((entry) => (entry.name || "").length));
    const columns = Math.max(1, Math.floor(width / (longest * 7 + 50)));
    return 19 * Math.ceil(entries.length / columns);
  };
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = coloured(figure, style);
      const place = document.getElementById(id);
      if (layout.showlegend) layout.height += legend(data.concat(layout.shapes), place.clientWidth);
      // A finger that moves over a plot scrolls the page.
      layout.dragmode = coarse.matches ? false : "zoom";
      const config = { responsive: true, displaylogo: false, displayModeBar: false };
      Plotly.react(place, data, layout, config);
    }
    document.documentElement.dataset.drawn = String(Object.keys(figures).length);
  };
  draw();
  dark.addEventListener("change", draw);
})();
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
{body}
<script type="application/json" id="figures">{figures}</script>
{scripts}</body>
</html>
"""


def page(*, title: str, body: str, figures: str, library: str) -> bytes:
    """Return the whole page.

    Args:
        title: Escaped.
        body: Markup.
        figures: JSON in which ``<`` is escaped.
        library: The script that draws; it is left out where there is nothing to draw.
    """
    scripts = [_harmless(library), SCRIPT] if figures != "{}" else []
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {digests or repr('none')}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    text = _PAGE.format(
        policy=policy,
        title=title,
        style=STYLE,
        body=body,
        figures=figures,
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
    )
    return text.encode()


def _harmless(script: str) -> str:
    """Return a script that no HTML parser sees the end of before its end."""
    # A parser turns line ends into \n before it takes the digest.
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
