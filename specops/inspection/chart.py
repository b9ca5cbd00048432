"""Curves of singular values by rank, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

_POINTS = 120
"""Most points of a curve: more could not be distinguished at its size."""
_WIDTH, _HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 38


def chart(name: str, curves: Mapping[str, np.ndarray]) -> str:
    """Curves of descending values, by the CSS classes that style them, on common axes."""
    every = np.concatenate(list(curves.values()))
    count, top = max(map(len, curves.values())), float(every.max())
    first = next(iter(curves.values()))
    positive = first[first > 1e-12 * top] if top > 0 else first
    log = top > 0 and len(positive) > 1 and top > 1e3 * float(positive[-1])
    drawn = {k: v[v > 1e-12 * top] if log else v for k, v in curves.items()}
    drawn = {k: np.log10(v) if log else v for k, v in drawn.items() if len(v)}
    low = math.floor(min(float(v.min()) for v in drawn.values())) if log else 0.0
    high = max(float(v.max()) for v in drawn.values())
    high = high if high > low else low + 1.0
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(rank: Any, value: Any) -> tuple[float, float]:
        x = _LEFT + across * (rank / (count - 1) if count > 1 else 0.5)
        return float(x), float(_TOP + down * (1 - (value - low) / (high - low)))

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
    missing = len(first) - len(positive)
    hidden = f", {missing} at zero not shown" if log and missing else ""
    texts = (
        f'<text x="{_LEFT}" y="{bottom + 16}" text-anchor="middle">1</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 16}" text-anchor="end">{count}</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"rank{hidden}</text>"
        f'<text x="14" y="{_TOP + down / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_TOP + down / 2:.0f})">σ{", log" if log else ""}</text>'
    )
    shapes = "".join(_curve(kind, values, at) for kind, values in drawn.items())
    label = escape(f"singular values of {name}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(lines)}{frame}{shapes}{texts}</svg>"
    )


def _curve(kind: str, values: np.ndarray, at: Any) -> str:
    ranks = np.unique(np.linspace(0, len(values) - 1, min(_POINTS, len(values))).astype(int))
    points = [at(r, values[r]) for r in ranks]
    style = f"curve {kind}".strip()
    if len(points) == 1:
        x, v = points[0]
        return f'<circle class="{style}" cx="{x:.1f}" cy="{v:.1f}" r="4"/>'
    path = " ".join(f"{x:.1f},{v:.1f}" for x, v in points)
    return f'<polyline class="{style}" points="{path}"/>'
