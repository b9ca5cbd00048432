"""Tables of text: coloured in a terminal, aligned columns elsewhere."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

Rows = Sequence[Sequence[str]]


def print_table(
    headers: Sequence[str],
    rows: Rows,
    *,
    dim: Sequence[bool] | None = None,
    right: Sequence[str] = (),
) -> None:
    """Print a table: with rich in a terminal, if it is installed, else as `aligned` text.

    Parameters
    ----------
    headers, rows
        Of equal lengths.
    dim : sequence of bool, optional
        Rows to show faintly.
    right : sequence of str
        Headers of columns that are aligned to the right.
    """
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.console import Console

        Console().print(rich_table(headers, rows, dim=dim, right=right))
        return
    print(aligned([headers, *rows], right=[h in right for h in headers]))


def some_names(names: Sequence[str], like: str) -> str:
    """A few names in quotes, those most like another one if any are, and … if there are more."""
    shown = difflib.get_close_matches(like, names, n=3, cutoff=0.3) or names[:5]
    return ", ".join([*map(repr, shown), *(["…"] if len(shown) < len(names) else [])])


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: names may come from any file."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def rich_table(
    headers: Sequence[str],
    rows: Rows,
    *,
    dim: Sequence[bool] | None = None,
    right: Sequence[str] = (),
    caption: str = "",
) -> Any:
    """A `rich.table.Table`; brackets in cells are not read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=caption or None, header_style="bold")
    for header in headers:
        number = header in right  # numbers are read whole, names may be folded
        justify: Any = "right" if number else "left"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=number)
    for row, faint in zip(rows, dim or [False] * len(rows), strict=True):
        cells = (Text(printable(cell)) for cell in row)
        table.add_row(*cells, style="dim" if faint else None)
    return table


def aligned(table: Rows, right: Sequence[bool] | None = None, *, rule: bool = False) -> str:
    """Text with columns of equal width, and one line per row.

    With `rule` a line separates the first row, the headers, from the others.
    """
    cells = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = right or [False] * len(widths)
    lines = [
        "  ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    if rule:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
