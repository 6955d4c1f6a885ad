"""The page of `latentline report`: one HTML file that asks for nothing else, in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_CSS = """
:root { color-scheme: light dark; --page:#f6f6f4; --card:#ffffff; --ink:#1b1c1e; --muted:#62666d; --rule:#e3e3df;
  --axis:#b3b5b8; --a:#2867c7; --b:#c2571a; --good:#1f7a45; --warn:#9a5b00;
  --s1:#7fb1ee; --s2:#4f8fe0; --s3:#2867c7; --s4:#1b4a94; --s5:#0f2d5e; }
@media (prefers-color-scheme: dark) { :root { --page:#141517; --card:#1d1f22; --ink:#eceef0; --muted:#a2a7ae;
  --rule:#303338; --axis:#5b6067; --a:#6ea6f5; --b:#f0955a; --good:#5cc98a; --warn:#e0a84a;
  --s1:#2f5fa6; --s2:#4680d4; --s3:#6ea6f5; --s4:#a3c7fa; --s5:#d6e6fd; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif; }
main { max-width:1160px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:24px; margin:0; overflow-wrap:anywhere; } h2 { font-size:17px; margin:34px 0 12px; }
.state { margin:6px 0 22px; color:var(--muted); } .state b { color:var(--ink); }
.state.finished b { color:var(--good); } .state.stopped b { color:var(--warn); }
.card { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:14px 16px; margin:0; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(135px,1fr)); gap:12px; }
.tiles dt { color:var(--muted); font-size:13px; }
.tiles dd { margin:0; font-size:19px; font-weight:600; white-space:nowrap; }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr)); gap:14px; }
figcaption { font-weight:600; margin-bottom:6px; } svg { display:block; width:100%; height:auto; overflow:visible; }
svg text { fill:var(--muted); font-size:13px; font-variant-numeric:tabular-nums; } .grid { stroke:var(--rule); }
.axis { stroke:var(--axis); } .line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.faint { stroke-width:1; opacity:.4; } .hit { fill:transparent; } .dot { fill:currentColor; pointer-events:none; }
.point:hover .dot { r:5px; stroke:var(--card); stroke-width:2; }
.legend { color:var(--muted); font-size:13px; display:flex; flex-wrap:wrap; gap:4px 16px; margin-top:6px; }
.key { display:inline-flex; align-items:center; gap:6px; } .key i { width:14px; height:3px; border-radius:2px; }
.samples { display:grid; gap:14px; align-items:start;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr)); }
.samples figcaption { margin:8px 0 0; font-weight:400; color:var(--muted); }
.samples img { width:100%; height:auto; display:block; border-radius:6px; }
table { border-collapse:collapse; width:100%; } td { padding:5px 0; vertical-align:top; overflow-wrap:anywhere; }
td:first-child { color:var(--muted); padding-right:18px; white-space:nowrap; width:1%; }
tr + tr td { border-top:1px solid var(--rule); }
pre { overflow-x:auto; font-size:13px; line-height:1.45; margin:10px 0 0; } summary { cursor:pointer; font-weight:600; }
.empty { color:var(--muted); } footer { color:var(--muted); font-size:13px; margin-top:34px; }
@media (max-width:560px) { main { padding:18px 12px 40px; } svg text { font-size:17px; } .card { padding:12px; }
  td:first-child { white-space:normal; width:38%; } }
"""

# Nothing may be fetched and no script may run, whatever a caption or a path says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    *,
    title: str,
    state: tuple[str, str, str],
    tiles: Mapping[str, str],
    charts: Sequence[str],
    no_charts: str,
    samples: Sequence[tuple[str, str]],
    dataset: Mapping[str, Any] | None,
    recipe: str | None,
    made: str,
) -> str:
    """Put the page together.

    state: (class, word, sentence). charts: figures. no_charts: said where there are none. samples: (caption, data URI)
    of pictures. dataset: rows of a table, None where unknown. recipe: TOML. made: when and from what.
    """
    kind, word, sentence = state
    tile_parts = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in tiles.items()
    )
    pictures = "".join(
        f'<figure class="card"><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption>'
        "</figure>"
        for caption, source in samples
    )
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in (dataset or {}).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">
<title>{escape(title)} - training report</title><style>{_CSS}</style></head><body><main>
<h1>{escape(title)}</h1>
<p class="state {kind}"><b>{escape(word)}.</b> {escape(sentence)}</p>
{f'<dl class="tiles">{tile_parts}</dl>' if tiles else ""}
<h2>Training</h2>
{f'<div class="charts">{"".join(charts)}</div>' if charts else _empty(no_charts)}
<h2>Samples</h2>
{f'<div class="samples">{pictures}</div>' if pictures else _empty("No sample pictures or videos are in this run.")}
<h2>Data</h2>
{f'<div class="card"><table>{facts}</table></div>' if facts else _empty("The run does not say what it trains on.")}
<h2>Recipe</h2>
{_recipe(recipe)}
<footer>{escape(made)}</footer>
</main></body></html>
"""


def _empty(text: str) -> str:
    return f'<p class="card empty">{escape(text)}</p>'


def _recipe(recipe: str | None) -> str:
    if recipe is None:
        return _empty("There is no recipe.toml in this run.")
    return (
        '<details class="card"><summary>recipe.toml, with every default</summary>'
        f'<pre tabindex="0">{escape(recipe)}</pre></details>'
    )
