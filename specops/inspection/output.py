"""An inspection as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from specops.inspection.results import Inspection, WeightFigures
from specops.inspection.spectrum import CIRCULAR, RESHAPED, Figures
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
_EQUAL = 1.0 + 5e-6
"""A bracket whose ends agree to the digits shown is shown as one number, the upper bound."""
_NAMES = re.compile(r"[A-Za-z_]\w*([./]\w+)+")
"""Names of other tensors within the reasons for a map."""
_PATTERNS = 4
"""Most patterns of names that are shown for one reason."""
MARKS = {RESHAPED: "ʳ", CIRCULAR: "ᶜ"}
"""Marks of figures that are of another map than the rest of their row."""
_KEYS = (
    "sigma_min",
    "frobenius",
    "stable_rank",
    "effective_rank",
    "condition_number",
    "collapsed",
)


def show(inspection: Inspection, verbose: bool = False) -> None:
    """Print the weights, then what was skipped, by reason; names one by one if `verbose`."""
    listed = inspection.listed
    rows = [cells(w) for w in listed]
    show_table(HEADERS, rows, _DROPPED_FIRST, NUMERIC, [bool(w.skipped) for w in listed])
    shown = ", ".join if verbose else folded
    decisions: dict[str, list[str]] = {}
    for why, names in inspection.decisions().items():
        decisions.setdefault(why if verbose else _NAMES.sub(_pattern, why), []).extend(names)
    for why, names in decisions.items():
        print(wrapped(f"{len(names)} taken as {why}: {shown(names)}"))
    for reason, names in inspection.by_reason().items():
        print(wrapped(f"skipped {len(names)}, {reason}: {shown(names)}"))
    for note in inspection.notes:
        print(wrapped(f"note: {note}"))
    print(wrapped(summary(inspection)))


def folded(names: Sequence[str]) -> str:
    """Names as patterns with * for numbers, each with its count if that is more than one.

    If there are many patterns, they are of the last component alone.
    """
    kinds = _kinds(names, lambda name: re.sub(r"\d+", "*", name))
    if len(kinds) > _PATTERNS:
        kinds = _kinds(names, lambda name: "*" + re.sub(r"^.*(?=[./])", "", name))
    texts = [group[0] if len(group) == 1 else f"{p} ({len(group)})" for p, group in kinds.items()]
    more = len(texts) - _PATTERNS
    return ", ".join(texts[:_PATTERNS]) + (f" and {more} more kinds: -v" if more > 0 else "")


def _pattern(found: re.Match[str]) -> str:
    return re.sub(r"\d+", "*", found[0])


def _kinds(names: Sequence[str], pattern: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pattern(name), []).append(name)
    return found


def show_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    dropped_first: Sequence[str],
    right: Sequence[str],
    dim: Sequence[bool] | None = None,
) -> None:
    """Print the columns that a terminal has room for, and name the others; in a file all."""
    kept = list(range(len(headers)))
    if sys.stdout.isatty():
        widths = [max(len(row[i]) for row in (headers, *rows)) + 3 for i in kept]
        room = shutil.get_terminal_size((100, 24)).columns - 1
        kept = [i for i in kept if headers[i] not in dropped_first]
        for i in map(headers.index, reversed(dropped_first)):
            if sum(widths[k] for k in kept) + widths[i] <= room:
                kept.append(i)
        kept.sort()
    shown = [[row[i] for i in kept] for row in rows]
    print_table([headers[i] for i in kept], shown, dim=dim, right=right)
    if len(kept) < len(headers):
        left_out = ", ".join(h for i, h in enumerate(headers) if i not in kept)
        print(wrapped(f"no room for {left_out}: widen the terminal, or take --json or --html"))


def wrapped(text: str) -> str:
    """A remark, wrapped to the width of the terminal."""
    text = printable(text)
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def summary(inspection: Inspection) -> str:
    """The totals in one line."""
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
    if weight.readings:
        rows = [cells(reading) for reading in weight.apart()]
        columns = list(zip(*rows, strict=True))[len(head) + 1 :]
        either = [" or ".join(dict.fromkeys(filter(None, column))) for column in columns]
        return (*head, weight.geometry, *either)
    return (
        *head,
        weight.geometry,
        sigma_text(f),
        *(figure_text(f, key) for key in _KEYS[:-1]),
        figure_text(f, "collapsed", lambda v: "" if v is None else f"{100 * v:.3g} %"),
    )


def figure_text(
    f: Figures, key: str, text: Callable[[float | None], str] = lambda v: number_text(v)
) -> str:
    """A figure as text; if it is known only for another map, that one, with a mark."""
    value = getattr(f, key)
    if value is None and f.beside is not None and getattr(f.beside, key) is not None:
        return text(getattr(f.beside, key)) + MARKS[f.beside_of]
    return text(value)


def sigma_text(f: Figures) -> str:
    """σ_max, or its bracket, as text."""
    if isinstance(f.sigma_max, tuple):
        low, high = f.sigma_max
        return f"{high:.5g}" if high <= low * _EQUAL else f"[{low:.5g}, {high:.5g}]"
    return f"{f.sigma_max:.5g}"


def number_text(value: float | None) -> str:
    """A number with five digits; empty for None, which was not computed."""
    return "" if value is None else f"{value:.5g}"


def weight_record(weight: WeightFigures) -> dict[str, Any]:
    """One tensor as JSON: ``sigma_max`` a number or [lower, upper]; null: not computed.

    A condition number of infinity, which JSON lacks, is "inf". "reshaped" and "circular" have the
    figures of another map of the same kernel, "readings" those of each map that it may be.
    """
    f = weight.figures
    record: dict[str, Any] = {
        "name": weight.name,
        "shape": None if weight.shape is None else list(weight.shape),
        "dtype": weight.dtype,
        "geometry": weight.geometry,
        "decided": weight.why,
        "made_of": list(weight.sources),
        **figures_record(f),
        "skipped": weight.skipped,
    }
    for key in (RESHAPED, CIRCULAR):
        beside = f.beside if f is not None and f.beside_of == key else None
        record[key] = None if beside is None else figures_record(beside)
    record["readings"] = [
        {"geometry": m.geometry, "decided": m.why, **figures_record(m.figures)}
        for m in weight.readings
    ]
    return record


def figures_record(f: Figures | None) -> dict[str, Any]:
    """Figures as JSON; null: not computed."""
    sigma = None if f is None else f.sigma_max
    record: dict[str, Any] = {"sigma_max": list(sigma) if isinstance(sigma, tuple) else sigma}
    for key in _KEYS:
        value = None if f is None else getattr(f, key)
        record[key] = "inf" if value is not None and math.isinf(value) else value
    record["sigma_max_of_each"] = None if f is None or not f.each else list(f.each)
    record["method"] = "" if f is None else f.method
    return record


def as_json(inspection: Inspection, **more: Any) -> str:
    """The whole inspection."""
    document = {
        "specops": version("specops"),
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
    """One line for each tensor; a bracket as two columns, equal where σ_max is exact.

    Figures of another map of a kernel stand in columns that begin with "reshaped" or "circular".
    """
    columns = ["name", "shape", "dtype", "geometry", "decided"]
    columns += ["sigma_max_lower", "sigma_max_upper", *_KEYS, "method", "skipped"]
    columns += [f"{of}_{key}" for of in (RESHAPED, CIRCULAR) for key in ("sigma_max", *_KEYS)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for weight in inspection.weights:
        record = weight_record(weight)
        sigma = record.pop("sigma_max")
        low, high = sigma if isinstance(sigma, list) else (sigma, sigma)
        record |= {"sigma_max_lower": low, "sigma_max_upper": high}
        record["shape"] = "x".join(map(str, weight.shape or ()))
        for of in (RESHAPED, CIRCULAR):
            beside = record.pop(of)
            record |= {f"{of}_{key}": value for key, value in (beside or {}).items()}
        writer.writerow(record)
    return text.getvalue()
