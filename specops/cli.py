"""The command ``specops``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import specops
from specops.errors import PluginWarning

_HEADERS = ("adapter", "available", "supports", "detail")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help(sys.stderr)
        return 2
    status: int = given.run(given)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specops",
        description="Measure and control the singular values of neural network weights.",
    )
    parser.add_argument("--version", action="version", version=f"specops {specops.__version__}")
    # Every command names the function that runs it in `run`.
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    adapters = commands.add_parser(
        "adapters",
        help="list the installed adapters, what they support, and why one is not available",
        description="List the installed adapters.",
    )
    adapters.set_defaults(run=_adapters)
    return parser


def _adapters(given: argparse.Namespace) -> int:
    from specops.plugins import statuses

    with warnings.catch_warnings():
        # A broken plugin has its reason in the table.
        warnings.simplefilter("ignore", PluginWarning)
        found = statuses()
    rows = [(s.name, "yes" if s.available else "no", s.supports, s.detail) for s in found]
    if not rows:
        print("no adapter is installed")
    elif sys.stdout.isatty() and find_spec("rich"):
        _print_rich(rows)
    else:
        print(_aligned([_HEADERS, *rows]))
    return 0


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; what is wrapped in a cell stands on one line."""
    cells = [[" ".join(cell.split()) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _print_rich(rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Any = Table(*_HEADERS, header_style="bold")
    for row in rows:
        # Not markup: details have brackets, as in specops[torch].
        table.add_row(*map(Text, row), style=None if row[1] == "yes" else "dim")
    Console().print(table)
