"""An inspection as one HTML file that needs nothing else: sortable, with every spectrum."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from specops.inspection.comparison import HEADERS as COMPARED
from specops.inspection.comparison import Comparison
from specops.inspection.output import HEADERS, cells, summary
from specops.inspection.results import Inspection, WeightFigures, upper

_POINTS = 120
"""Of a curve: more cannot be told apart at its size."""
_WIDTH, _HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 38

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --accent: #0072b2; --faint: #888; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { position: sticky; top: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
td.number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; }
tr.skipped { color: #d55e00; }
tr.skipped td { white-space: normal; min-width: 12rem; }
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
a { color: inherit; }
@media (max-width: 40rem) { body { font-size: 14px; padding: .6rem; }
  th:first-child, td:first-child { min-width: 9rem; white-space: normal; } }
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
    plots = "\n".join(_figure(w) for w in inspection.measured if w.figures is not None)
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
    """What tensors were taken for."""
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
    return (
        f'<h2>Compared with another</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{alone}"
    )


def _skipped(inspection: Inspection) -> str:
    """What nothing was to be measured of, by reason."""
    return "".join(
        f"<details><summary>{len(names)} skipped: {escape(reason)}</summary>"
        f"<p>{escape(', '.join(names))}</p></details>"
        for reason, names in inspection.by_reason().items()
    )


def _breakable(name: str) -> str:
    """Long names may go on in the next line after a dot or slash."""
    text = escape(name)
    return text.replace(".", ".<wbr>").replace("/", "/<wbr>")


def _row(weight: WeightFigures, kinds: list[str]) -> str:
    values = _values(weight)
    shown = []
    for text, value, kind in zip(cells(weight), values, kinds, strict=True):
        style = ' class="number"' if kind == "number" else ""
        shown.append(f'<td{style} data-value="{escape(str(value))}">{escape(text)}</td>')
    if weight.figures is not None and _is_drawn(weight):
        anchor = escape(_anchor(weight.name))
        shown[0] = (
            f'<td data-value="{escape(weight.name)}">'
            f'<a href="#{anchor}">{_breakable(weight.name)}</a></td>'
        )
    title = f' title="{escape(weight.why)}"' if weight.why else ""
    skipped = ' class="skipped"' if weight.skipped else ""
    return f"<tr{skipped}{title}>{''.join(shown)}</tr>"


def _values(weight: WeightFigures) -> list[Any]:
    """What columns are sorted by; empty for what is missing."""
    head = [weight.name, math.prod(weight.shape or ()), weight.dtype, weight.geometry]
    f = weight.figures
    if f is None:
        return [*head, *[""] * (len(HEADERS) - 4)]
    figures = (
        upper(f),
        f.sigma_min,
        f.frobenius,
        f.stable_rank,
        f.effective_rank,
        f.condition_number,
        f.collapsed,
    )
    # JavaScript's name for it.
    return [*head, *("" if v is None else "Infinity" if v == math.inf else v for v in figures)]


def _anchor(name: str) -> str:
    return "weight-" + "".join(c if c.isalnum() else f"-{ord(c):x}-" for c in name)


def _is_drawn(weight: WeightFigures) -> bool:
    return weight.figures is not None and weight.figures.spectrum is not None


def _figure(weight: WeightFigures) -> str:
    if not _is_drawn(weight):
        return ""
    assert weight.figures is not None
    assert weight.figures.spectrum is not None
    shape = "×".join(map(str, weight.shape or ()))
    method, why = escape(weight.figures.method), escape(weight.why)
    return (
        f'<figure id="{escape(_anchor(weight.name))}"><figcaption>{escape(weight.name)} '
        f"<small>{shape}, {escape(weight.geometry)} ({why}); {method}</small></figcaption>"
        f"{_svg(weight.name, weight.figures.spectrum)}</figure>"
    )


def _svg(name: str, values: np.ndarray) -> str:
    """A curve of singular values by rank."""
    count, top = len(values), float(values[0])
    positive = values[values > 1e-12 * top] if top > 0 else values
    log = top > 0 and len(positive) > 1 and top > 1e3 * float(positive[-1])
    drawn = positive if log else values
    ranks = np.unique(np.linspace(0, len(drawn) - 1, min(_POINTS, len(drawn))).astype(int))
    y = np.log10(drawn[ranks]) if log else drawn[ranks]
    low = math.floor(float(y.min())) if log else 0.0
    high = float(y.max()) if float(y.max()) > low else low + 1.0
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(rank: Any, value: Any) -> tuple[float, float]:
        x = _LEFT + across * (rank / (count - 1) if count > 1 else 0.5)
        return float(x), float(_TOP + down * (1 - (value - low) / (high - low)))

    points = [at(r, v) for r, v in zip(ranks, y, strict=True)]
    path = " ".join(f"{x:.1f},{v:.1f}" for x, v in points)
    curve = f'<polyline class="curve" points="{path}"/>'
    if len(points) == 1:
        x, v = points[0]
        curve = f'<circle cx="{x:.1f}" cy="{v:.1f}" r="4" fill="var(--accent)"/>'
    lines = []
    for tick in np.linspace(low, high, 4):
        _, v = at(0, tick)
        label = f"{10**tick:.2g}" if log else f"{tick:.3g}"
        lines.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{label}</text>'
        )
    bottom = _HEIGHT - _BOTTOM
    frame = f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}"/>'
    hidden = f", {count - len(positive)} at zero not shown" if log and len(positive) < count else ""
    texts = (
        f'<text x="{_LEFT}" y="{bottom + 16}" text-anchor="middle">1</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 16}" text-anchor="end">{count}</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"rank{hidden}</text>"
        f'<text x="14" y="{_TOP + down / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_TOP + down / 2:.0f})">σ{", log" if log else ""}</text>'
    )
    label = escape(f"singular values of {name}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(lines)}{frame}{curve}{texts}</svg>"
    )
