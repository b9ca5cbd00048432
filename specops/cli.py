"""The command ``specops``."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence

import specops
from specops.errors import PluginWarning
from specops.inspection.command import add_parser
from specops.tables import print_table

_CLOSED = 141
_INTERRUPTED = 130
"""Exit statuses, as shells report for the signals PIPE and INT."""
_HEADERS = ("adapter", "available", "supports", "detail")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The arguments; default: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Output has σ and names from files: escape what the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        # By the command's own parser, whose usage lists what there is.
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if given.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`head`, say) has closed the pipe. Without this redirection Python would
        # complain about it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specops",
        description="Measure and control the singular values of neural network weights.",
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"specops {specops.__version__}")
    # Every command names the function that runs it in `run`, and its own parser.
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    adapters = commands.add_parser(
        "adapters",
        help="list the installed adapters, what they support, and why one is not available",
        description="List the installed adapters.",
    )
    adapters.set_defaults(run=_adapters, parser=adapters)
    add_parser(commands)
    return parser


def _adapters(given: argparse.Namespace) -> int:
    from specops.plugins import statuses

    with warnings.catch_warnings():
        # No warning: the table says why a plugin is broken.
        warnings.simplefilter("ignore", PluginWarning)
        found = statuses()
    rows = [(s.name, "yes" if s.available else "no", s.supports, s.detail) for s in found]
    if not rows:
        print("no adapter is installed")
    else:
        print_table(_HEADERS, rows, dim=[row[1] == "no" for row in rows])
    return 0
