"""An inspection as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import specops
from specops.inspection.figures import Figures
from specops.inspection.results import Inspection, WeightFigures
from specops.tables import print_table, printable

HEADERS = (
    "weight",
    "shape",
    "dtype",
    "geometry",
    "σ_max",
    "σ_min",
    "‖·‖_F",
    "stable rank",
    "eff. rank",
    "condition",
    "σ < 1 % σ_max",
)
NUMERIC = HEADERS[4:]
_DROPPED_FIRST = (
    "dtype",
    "geometry",
    "σ < 1 % σ_max",
    "eff. rank",
    "‖·‖_F",
    "shape",
    "condition",
    "σ_min",
)
_KEYS = (
    "sigma_min",
    "frobenius",
    "stable_rank",
    "effective_rank",
    "condition_number",
    "collapsed",
)
COLUMNS = (
    "name",
    "shape",
    "dtype",
    "geometry",
    "decided",
    "sigma_max",
    *_KEYS,
    "method",
    "skipped",
)


def show(inspection: Inspection) -> None:
    """Print the weights, then what was skipped, by reason."""
    listed = inspection.listed
    rows = [cells(w) for w in listed]
    kept = _columns(rows)
    print_table(
        [HEADERS[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        dim=[bool(w.skipped) for w in listed],
        right=NUMERIC,
    )
    if len(kept) < len(HEADERS):
        left_out = ", ".join(h for i, h in enumerate(HEADERS) if i not in kept)
        print(_wrapped(f"no room for {left_out}: widen the terminal, or take --json or --html"))
    for why, names in inspection.decisions().items():
        print(_wrapped(f"{why}: {', '.join(names)}"))
    for reason, names in inspection.by_reason().items():
        print(_wrapped(f"skipped {len(names)}, {reason}: {', '.join(names)}"))
    for note in inspection.notes:
        print(_wrapped(f"note: {note}"))
    print(summary(inspection))


def _columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Those that a terminal has room for; all of them in a file."""
    kept = list(range(len(HEADERS)))
    if not sys.stdout.isatty():
        return kept
    room = shutil.get_terminal_size((100, 24)).columns
    widths = [max(len(row[i]) for row in (HEADERS, *rows)) for i in kept]
    for header in _DROPPED_FIRST:
        if sum(widths[i] + 3 for i in kept) + 1 <= room:
            break
        kept.remove(HEADERS.index(header))
    return kept


def _wrapped(text: str) -> str:
    text = printable(text)
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def summary(inspection: Inspection) -> str:
    """Totals in a line."""
    found = inspection.totals()
    text = (
        f"{printable(inspection.path)} ({inspection.format}): {found['measured']} of "
        f"{found['tensors']} tensors measured, {found['skipped']} skipped, "
        f"{found['parameters']:,} numbers"
    )
    if found["largest_sigma_max_in"] is not None:
        text += f"; largest σ_max {found['largest_sigma_max']:.4g} in "
        text += printable(str(found["largest_sigma_max_in"]))
    if inspection.interrupted:
        text += f"; interrupted after {len(inspection.weights)}"
    return text


def cells(weight: WeightFigures) -> tuple[str, ...]:
    """A row of the table."""
    shape = "?" if weight.shape is None else "×".join(map(str, weight.shape)) or "scalar"
    head = (weight.name, shape, weight.dtype)
    f = weight.figures
    if f is None:
        return (*head, f"– {weight.skipped}", *("" for _ in NUMERIC))
    return (
        *head,
        weight.geometry,
        sigma_text(f),
        *(number_text(getattr(f, key)) for key in _KEYS[:-1]),
        "" if f.collapsed is None else f"{100 * f.collapsed:.3g} %",
    )


def sigma_text(f: Figures) -> str:
    """σ_max, or its bracket."""
    if isinstance(f.sigma_max, tuple):
        low, high = f.sigma_max
        return f"[{low:.5g}, {high:.5g}]"
    return f"{f.sigma_max:.5g}"


def number_text(value: float | None) -> str:
    """Five digits; empty for what was not computed."""
    return "" if value is None else f"{value:.5g}"


def weight_record(weight: WeightFigures) -> dict[str, Any]:
    """One tensor as JSON: ``sigma_max`` a number or [lower, upper]; null: not computed.

    A condition number of infinity, which JSON lacks, is "inf".
    """
    f = weight.figures
    record: dict[str, Any] = {
        "name": weight.name,
        "shape": None if weight.shape is None else list(weight.shape),
        "dtype": weight.dtype,
        "geometry": weight.geometry,
        "decided": weight.why,
        "sigma_max": None,
    }
    if f is not None:
        record["sigma_max"] = list(f.sigma_max) if isinstance(f.sigma_max, tuple) else f.sigma_max
    for key in _KEYS:
        value = None if f is None else getattr(f, key)
        record[key] = "inf" if value is not None and math.isinf(value) else value
    record["method"] = "" if f is None else f.method
    record["skipped"] = weight.skipped
    return record


def as_json(inspection: Inspection, **more: Any) -> str:
    """The whole inspection."""
    document = {
        "specops": specops.__version__,
        "path": inspection.path,
        "format": inspection.format,
        "weights": [weight_record(w) for w in inspection.weights],
        "totals": inspection.totals(),
        "problems": inspection.problems,
        "notes": inspection.notes,
        "interrupted": inspection.interrupted,
        **more,
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def as_csv(inspection: Inspection) -> str:
    """One line for each tensor; a bracket as two columns, equal where σ_max is exact."""
    columns = [c for c in COLUMNS if c != "sigma_max"]
    columns[5:5] = ["sigma_max_lower", "sigma_max_upper"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for weight in inspection.weights:
        record = weight_record(weight)
        sigma = record.pop("sigma_max")
        low, high = sigma if isinstance(sigma, list) else (sigma, sigma)
        record |= {"sigma_max_lower": low, "sigma_max_upper": high}
        record["shape"] = "x".join(map(str, weight.shape or ()))
        writer.writerow(record)
    return text.getvalue()
