"""An inspection as one self-contained HTML file: a sortable table, and every spectrum."""

from __future__ import annotations

import math
import re
from html import escape
from typing import Any

from specops.inspection.chart import chart
from specops.inspection.comparison import HEADERS as COMPARED
from specops.inspection.comparison import Comparison, Pair
from specops.inspection.output import HEADERS, cells, summary
from specops.inspection.results import Inspection, WeightFigures, upper
from specops.inspection.spectrum import CIRCULAR, RESHAPED, Figures

MAPS = {
    RESHAPED: "the reshaped kernel's",
    CIRCULAR: "those of the layer with circular padding",
}
"""Whose singular values are drawn, if they are not those of the row's own map."""

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --accent: #0072b2; --faint: #888; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: left;
  font-size: .85rem; vertical-align: top; }
th { position: sticky; top: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
td.number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas;
  min-width: 11rem; max-width: 24rem; overflow-wrap: anywhere; }
tr.skipped { color: #d55e00; }
tr.skipped td:nth-child(4) { min-width: 12rem; }
details { margin: .6rem 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
.problems { border-left: 4px solid #d55e00; padding-left: .8rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
figcaption small { font-weight: 400; color: var(--faint); }
svg { width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 12px; }
svg .axis { stroke: currentColor; stroke-width: 1; fill: none; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .curve { stroke: var(--accent); stroke-width: 2; fill: none; }
svg .other { stroke: #d55e00; stroke-dasharray: 5 3; }
svg .between { stroke: #009e73; stroke-dasharray: 2 3; }
.key { font-weight: 600; }
a { color: inherit; }
@media (max-width: 40rem) { body { font-size: 14px; padding: .6rem; }
  th:first-child, td:first-child { min-width: 9rem; } }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? "";
      const rows = [...body.rows];
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays last
        const order = head.dataset.kind === "number"
          ? parseFloat(x) - parseFloat(y) : x.localeCompare(y);
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
"""


def as_html(inspection: Inspection, comparison: Comparison | None = None) -> str:
    """The page; with a comparison, its table too."""
    partners = {} if comparison is None else {p.one.name: p for p in comparison.pairs}
    plots = "\n".join(
        # A comparison is of the likeliest reading, which is the first.
        _figure(
            reading, None if place else partners.get(w.name), comparison, _anchor(w.name, place)
        )
        for w in inspection.measured
        for place, reading in enumerate(w.apart())
    )
    problems = "".join(f"<li>{escape(line)}</li>" for line in inspection.problems)
    notes = "".join(f"<p>{escape(note)}</p>" for note in inspection.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(inspection.path)}: spectra</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(inspection.path)}</h1>
<p>{escape(summary(inspection))}</p>
{f'<ul class="problems">{problems}</ul>' if problems else ""}
<div class="scroll">
{_table(inspection)}
</div>
{_decided(inspection)}
{_skipped(inspection)}
{notes}
{_compared(comparison)}
<h2>Singular values</h2>
<p>By rank, from the largest; the scale is logarithmic where values span three decades.</p>
{_key(comparison)}
<div class="plots">
{plots}
</div>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _table(inspection: Inspection) -> str:
    kinds = ["text", "number", "text", "text", *["number"] * (len(HEADERS) - 4)]
    head = "".join(
        f'<th data-kind="{kind}" scope="col"><button>{escape(h)}</button></th>'
        for h, kind in zip(HEADERS, kinds, strict=True)
    )
    rows = "\n".join(_row(w, kinds) for w in inspection.listed)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"


def _decided(inspection: Inspection) -> str:
    """The maps that tensors were taken for."""
    return "".join(
        f"<details><summary>{len(names)} taken as: {escape(why)}</summary>"
        f"<p>{escape(', '.join(names))}</p></details>"
        for why, names in inspection.decisions().items()
    )


def _compared(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    head = "".join(
        f'<th data-kind="{"text" if i == 0 else "number"}" scope="col"><button>{escape(h)}'
        f"</button></th>"
        for i, h in enumerate(COMPARED)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td{"" if i == 0 else " class=number"} data-value="{escape(cell.strip("[]"))}">'
            f"{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in comparison.rows()
    )
    alone = "".join(f"<p>{escape(line)}</p>" for line in comparison.lines())
    paths = [escape(path) for path in comparison.paths]
    return (
        f"<h2>Compared with another</h2><p>{paths[0]}, and as other {paths[1]}.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{alone}"
    )


def _key(comparison: Comparison | None) -> str:
    """The legend of the curves."""
    if comparison is None:
        return ""
    one, other = (escape(path) for path in comparison.paths)
    return (
        f'<p><span class="key" style="color:var(--accent)">——</span> {one}; '
        f'<span class="key" style="color:#d55e00">– –</span> {other}; '
        f'<span class="key" style="color:#009e73">···</span> their difference</p>'
    )


def _skipped(inspection: Inspection) -> str:
    """The tensors that were skipped, by reason."""
    return "".join(
        f"<details><summary>{len(names)} skipped: {escape(reason)}</summary>"
        f"<p>{escape(', '.join(names))}</p></details>"
        for reason, names in inspection.by_reason().items()
    )


def _breakable(name: str) -> str:
    """A name that may be broken into lines after a dot, slash or underscore."""
    return re.sub(r"(?<=[./_])(?=[^./_])", "<wbr>", escape(name))


def _row(weight: WeightFigures, kinds: list[str]) -> str:
    values = _values(weight)
    shown = []
    for text, value, kind in zip(cells(weight), values, kinds, strict=True):
        style = ' class="number"' if kind == "number" else ""
        shown.append(f'<td{style} data-value="{escape(str(value))}">{escape(text)}</td>')
    place = next((i for i, reading in enumerate(weight.apart()) if _is_drawn(reading)), None)
    if place is not None:
        anchor = escape(_anchor(weight.name, place))
        shown[0] = (
            f'<td data-value="{escape(weight.name)}">'
            f'<a href="#{anchor}">{_breakable(weight.name)}</a></td>'
        )
    title = f' title="{escape(weight.why)}"' if weight.why else ""
    skipped = ' class="skipped"' if weight.skipped else ""
    return f"<tr{skipped}{title}>{''.join(shown)}</tr>"


def _values(weight: WeightFigures) -> list[Any]:
    """The values by which columns are sorted; empty for missing ones."""
    head = [weight.name, math.prod(weight.shape or ()), weight.dtype, weight.geometry]
    f = weight.figures
    if f is None:
        return [*head, *[""] * (len(HEADERS) - 4)]
    keys = ("sigma_min", "frobenius", "stable_rank", "effective_rank", "condition_number")
    figures = [upper(f), *(_shown(f, key) for key in (*keys, "collapsed"))]
    # "Infinity" is JavaScript's name.
    return [*head, *("" if v is None else "Infinity" if v == math.inf else v for v in figures)]


def _shown(f: Figures, key: str) -> float | None:
    """A figure as in the table: that of the other map if the row's own is not known."""
    value: float | None = getattr(f, key)
    return getattr(f.beside, key) if value is None and f.beside is not None else value


def _anchor(name: str, place: int) -> str:
    """The HTML id of the figure of a weight, or of one of its readings."""
    named = "".join(c if c.isalnum() else f"-{ord(c):x}-" for c in name)
    return f"weight-{named}" + (f"--{place}" if place else "")


def _is_drawn(weight: WeightFigures) -> bool:
    return weight.figures is not None and weight.figures.drawn is not None


def _figure(
    weight: WeightFigures, pair: Pair | None, comparison: Comparison | None, anchor: str
) -> str:
    if not _is_drawn(weight):
        return ""
    assert weight.figures is not None
    assert weight.figures.drawn is not None
    shape = "×".join(map(str, weight.shape or ()))
    of = weight.figures.beside_of if weight.figures.spectrum is None else ""
    method = escape(weight.figures.method + (f"; drawn: {MAPS[of]}" if of else ""))
    curves = {"": weight.figures.drawn}
    if pair is not None and comparison is not None:
        others = {"other": pair.other.figures, "between": comparison.difference(pair)}
        curves |= {k: f.drawn for k, f in others.items() if f is not None and f.drawn is not None}
    return (
        f'<figure id="{escape(anchor)}"><figcaption>{_breakable(weight.name)} '
        f"<small>{shape}, {escape(weight.geometry)} ({escape(weight.why)}); {method}</small>"
        f"</figcaption>{chart(weight.name, curves)}</figure>"
    )
