"""Reports: every parameter of a model, constrained by what or left alone and why."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any

from specops import arrays
from specops.geometry import Dense, Geometry
from specops.maps.explicit import MIDDLE, explicit_norm, small_explicit_map
from specops.rules import StagedRule
from specops.spectra import spectral_norm, stable_rank
from specops.spectra.bounds import norm_from_above
from specops.tables import aligned, rich_table
from specops.training.plan import Assignment

_WIDEST, _CUT = 60, "…"
_HEADERS = ("parameter", "shape", "geometry", "rule", "norm")
_NORMALIZED = "with batch norm"
_RANK = "stable rank"
_STALE = "stale"
_RULE = "rule's norm"


@dataclass(frozen=True)
class ReportRow:
    """What the report says about one parameter.

    Attributes
    ----------
    name, shape, dtype
        The parameter's name, shape and dtype.
    geometry : str
        The linear map that the parameter stands for, in words; empty if none is known.
    rule : str
        The rule that constrains it; empty if none does.
    reason : str
        Why no rule constrains it; empty if one does.
    norm : float or None
        The operator norm at the time of the report.
    norm_is : str
        Whether `norm` is "exact" or an "upper bound".
    normalized : float or None
        The norm in evaluation of the layer together with the batch normalisation registered
        right behind it, which a cap on the weight alone does not bound. It is exact or an upper
        bound, as `norm` is; None where no batch normalisation follows.
    stale : bool
        Whether a rule has changed the weight since that batch normalisation took its running
        statistics. `normalized` then tells what evaluation would compute with the old ones.
    rule_norm : float or None
        The norm that the rule constrains, if it is not the operator norm but that of the kernel
        reshaped to a matrix.
    stable_rank : float or None
        The stable rank, if the rule constrains it: of the map that the rule acts on, and the
        largest where there are several. For a forward rule it is that of the weight in use.
    waits : int or None
        The first step at which the rule acts, if training has not reached it yet.
    idle : str
        Why the rule leaves the weight alone at present; empty if it does not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    geometry: str = ""
    rule: str = ""
    reason: str = ""
    norm: float | None = None
    norm_is: str = ""
    normalized: float | None = None
    stale: bool = False
    stable_rank: float | None = None
    rule_norm: float | None = None
    waits: int | None = None
    idle: str = ""


@dataclass(frozen=True)
class Report:
    """A table of parameters that prints as text, as a rich table, or as HTML."""

    rows: tuple[ReportRow, ...]

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> ReportRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def constrained(self) -> tuple[ReportRow, ...]:
        """The rows that a rule acts on."""
        return tuple(row for row in self.rows if row.rule)

    @property
    def skipped(self) -> tuple[ReportRow, ...]:
        """The rows that no rule acts on, each with its reason."""
        return tuple(row for row in self.rows if not row.rule)

    def __str__(self) -> str:
        headers, rows = self._table()
        table = [headers, *((name, *map(_short, cells)) for name, *cells in rows)]
        cut = any(cell.endswith(_CUT) for cells in table for cell in cells)
        where = "report[name]: .geometry, .rule, .reason or .idle"
        more = f"; what ends in {_CUT} is whole in {where}" if cut else ""
        return f"{aligned(table, rule=True)}\n{self._summary()}{more}"

    def show(self) -> None:
        """Print: a coloured table in a terminal, HTML in a notebook, plain text elsewhere."""
        shell = getattr(builtins, "get_ipython", None)
        if shell is not None and hasattr(shell(), "kernel"):
            from IPython.display import display  # type: ignore[import-not-found]

            display(self)
            return
        if sys.stdout.isatty() and find_spec("rich"):
            from rich.console import Console

            Console().print(self)
            return
        print(self)

    def __rich__(self) -> Any:
        headers, rows = self._table()
        return rich_table(
            headers,
            rows,
            dim=[not row.rule for row in self.rows],
            right=(_HEADERS[-1], _RULE, _NORMALIZED, _RANK),
            caption=self._summary(),
        )

    def _repr_html_(self) -> str:
        headers, rows = self._table()
        head = "".join(f"<th>{h}</th>" for h in headers)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>" for cells in rows
        )
        caption = escape(self._summary())
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers, and the cells of each row."""
        further = self._further()
        headers = _HEADERS + tuple(header for header, _ in further)
        return headers, [_cells(r) + tuple(text(r) for _, text in further) for r in self.rows]

    def _further(self) -> list[tuple[str, Callable[[ReportRow], str]]]:
        """(header, text of a row) of the columns that appear only if a row has a value."""
        columns: list[tuple[str, Callable[[ReportRow], str]]] = []
        if any(row.rule_norm is not None for row in self.rows):
            columns.append((_RULE, lambda row: _norm_text(row.rule_norm, "")))
        if any(row.normalized is not None for row in self.rows):
            columns.append((_NORMALIZED, _normalized_text))
        if any(row.stable_rank is not None for row in self.rows):
            columns.append((_RANK, lambda row: _norm_text(row.stable_rank, "")))
        return columns

    def _summary(self) -> str:
        summary = f"{len(self.constrained)} of {len(self.rows)} parameters under a rule"
        if any(row.stale for row in self.rows):
            summary += f"; {_STALE}: running statistics of other weights, to be estimated anew"
        return summary


def plan_rows(assignments: Sequence[Assignment]) -> list[ReportRow]:
    """The rows of a plan before anything is measured."""
    return [
        ReportRow(
            name=a.weight.name,
            shape=a.weight.shape,
            dtype=a.weight.dtype,
            geometry=geometry_text(a.weight.geometry, a.weight.remark),
            rule="" if a.rule is None else _rule_text(a),
            reason=a.reason,
        )
        for a in assignments
    ]


def geometry_text(geometry: Geometry | None, remark: str) -> str:
    """A map in words, and the adapter's remark on it."""
    text = "" if geometry is None else geometry.describe()
    return f"{text}: {remark}" if text and remark else text


def _rule_text(assignment: Assignment) -> str:
    return f"{assignment.rule!r}" + (f" every {assignment.every}" if assignment.every > 1 else "")


def _short(cell: str) -> str:
    return cell if len(cell) <= _WIDEST else cell[: _WIDEST - 1] + _CUT


def _cells(row: ReportRow) -> tuple[str, ...]:
    norm = _norm_text(row.norm, row.norm_is)
    shape = "×".join(map(str, row.shape)) or "scalar"
    rule = row.rule + ("" if row.waits is None else f", not before step {row.waits}")
    rule = f"– {row.idle}, under {rule}" if row.idle else rule
    return (row.name, shape, row.geometry, rule or f"– {row.reason}", norm)


def _norm_text(norm: float | None, norm_is: str) -> str:
    text = "" if norm is None else f"{norm:.4g}"
    return f"≤ {text}" if text and norm_is == "upper bound" else text


def _normalized_text(row: ReportRow) -> str:
    text = _norm_text(row.normalized, row.norm_is)
    return f"{text} ({_STALE})" if text and row.stale else text


def measured(w: Any, geometry: Geometry, rule: StagedRule) -> dict[str, Any]:
    """The figures of a row: `measured_norm`, and the stable rank or norm that the rule is about."""
    found = measured_norm(w, geometry)
    if found["norm_is"] == "not finite":
        return found
    view = rule.view(geometry)
    if rule.limits_stable_rank:
        if view.has_size:
            ranks = stable_rank(w, view)
            xp = arrays.namespace(w)
            blocks = ranks if isinstance(ranks, tuple) else (ranks,)
            found["stable_rank"] = max(float(xp.max(r)) for r in blocks)
    elif isinstance(view, Dense) and view != geometry:
        found["rule_norm"] = measured_norm(w, view)["norm"]
    return found


def measured_norm(w: Any, geometry: Geometry) -> dict[str, Any]:
    """`norm` and `norm_is` of a row: the norm exactly if possible, else a certified upper bound.

    In double precision, so that rounding does not lift a weight above the bound that it satisfies.
    """
    xp = arrays.namespace(w)
    if not bool(arrays.all_finite(xp, w)):
        return {"norm": float("nan"), "norm_is": "not finite"}
    w = arrays.in_double(arrays.to_compute(xp, w))
    xp = arrays.namespace(w)
    if not isinstance(geometry, Dense):
        geometry = geometry.repeated_matrix(tuple(w.shape)) or geometry
    if not isinstance(geometry, Dense):
        layer = small_explicit_map(geometry.sizes(tuple(w.shape)), times=MIDDLE)
        if layer is not None:
            return {"norm": explicit_norm(w, geometry, layer), "norm_is": "exact"}
    exact = isinstance(geometry, Dense) or geometry.has_exact_spectrum(tuple(w.shape))
    norms = spectral_norm(w, geometry) if exact else norm_from_above(w, geometry)
    largest = max(float(xp.max(n)) for n in (norms if isinstance(norms, tuple) else (norms,)))
    return {"norm": largest, "norm_is": "exact" if exact else "upper bound"}
