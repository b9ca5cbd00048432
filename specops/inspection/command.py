"""The command ``specops inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specops.checkpoints import open_checkpoint
from specops.errors import CheckpointError
from specops.inspection.adapted import with_updates
from specops.inspection.comparison import Comparison, compare, records, show_comparison
from specops.inspection.difference import differences
from specops.inspection.hints import Hints
from specops.inspection.output import as_csv, as_json, show
from specops.inspection.progress import shown_progress
from specops.inspection.results import Inspection, WeightFigures, upper
from specops.inspection.run import inspect_checkpoint
from specops.tables import printable

INTERRUPTED = 130
_PLOTTED = (".png", ".pdf", ".svg")
_DESCRIPTION = """\
Spectral figures of every weight in a checkpoint: safetensors, torch (.pt, .pth, .bin, .ckpt) and
its distributed checkpoints, .npz and .npy, Keras (.keras, .h5, .weights.h5), flax msgpack,
equinox, orbax folders, sharded Hugging Face folders, and adapters of peft and kohya.
Tensors are read one at a time where the format allows it; pickles only as weights, never as code.

Figures: the largest and the smallest singular value, Frobenius norm, stable and effective rank,
condition number, and the share of directions below 1 % of the largest.

Which map a tensor stands for is taken from its name and shape, its neighbours, and the model's
configuration in the file (Keras) or beside it (config.json, adapter_config.json). Where nothing
decides, the row says "ambiguous" and has the value of each reading. Weight norm, spectral norm,
pruning masks and low-rank updates (LoRA, DoRA, AdaLoRA, LoHa, LoKr) are put together before they
are measured, and updates are added to their base where it is in the file, or is compared with them.
Convolutions are given as the bracket of their operator norm over all input sizes, unless
--input-size says at which size to measure; stride 1 is assumed unless something says otherwise.
"""
_EPILOG = """\
PATTERN is that of file names, as in 'block2.*'; the last one that matches counts.
Exit status: 0; 1 if a file or a tensor could not be measured that should have been, with a
line for each on standard error; 2 for wrong arguments; 130 after Ctrl-C.
"""


def add_parser(commands: Any) -> None:
    """Add the command to `argparse` subparsers."""
    parser = commands.add_parser(
        "inspect",
        help="spectral figures of every weight in a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file or folder")
    _add_hints(parser)
    parser.add_argument(
        "--method",
        choices=["auto", "exact", "bounds"],
        default="auto",
        help="all singular values, or certified bounds of the largest; auto: bounds for matrices "
        "whose smaller side exceeds 2048",
    )
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        help="a second checkpoint of the same model, or low-rank updates of it",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors to leave alone; may be repeated",
    )
    _add_outputs(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_hints(parser: argparse.ArgumentParser) -> None:
    known = parser.add_argument_group("what the file does not say")
    known.add_argument(
        "--input-size",
        action="append",
        default=[],
        metavar="[PATTERN=]HxW",
        help="what convolutions see: 32x32, or 'block2.*=16x16'; may be repeated",
    )
    for option, value in (
        ("--stride", "N"),
        ("--dilation", "N"),
        ("--padding", "N|same|valid"),
        ("--groups", "N"),
    ):
        known.add_argument(
            option,
            action="append",
            default=[],
            metavar=f"[PATTERN=]{value}",
            help="of convolutions; may be repeated",
        )
    known.add_argument(
        "--boundary",
        choices=["zeros", "circular"],
        default="zeros",
        help="of convolutions with an input size (default: zeros)",
    )
    known.add_argument(
        "--layout",
        choices=["torch", "jax", "keras"],
        default="",
        help="order of a kernel's axes, where the file does not tell",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output (default: a table)")
    shape = output.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="JSON on standard output")
    shape.add_argument("--csv", action="store_true", help="CSV on standard output")
    output.add_argument(
        "-v", "--verbose", action="store_true", help="every name in the table's remarks"
    )
    output.add_argument("--html", metavar="FILE", help="also write a page with all spectra")
    output.add_argument("--plot", metavar="FILE", help="also draw all spectra (.png, .pdf, .svg)")


def run(given: argparse.Namespace) -> int:
    """Inspect as the arguments say; return the exit status."""
    other = None
    try:
        hints = _hints(given)
        _check_outputs(given)
        if given.compare:
            open_checkpoint(given.compare).close()  # an error shows now, not after hours of work
        found = _inspect(given.checkpoint, hints, given)
        if given.compare and not found.interrupted:
            other = _inspect(given.compare, hints, given)
    except CheckpointError as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted before anything was read", INTERRUPTED)
    for inspection in (found, *([other] if other else [])):
        for problem in inspection.problems:
            _fail(f"{inspection.path}: {problem}", 1)
    comparison = None
    if other is not None:
        comparison = compare(found, other)
        try:
            with shown_progress(given.method) as calls:
                known = differences(
                    comparison, given.checkpoint, given.compare, hints, method=given.method, **calls
                )
                comparison = replace(comparison, differences=known)
                comparison = with_updates(
                    comparison, found, other, hints, method=given.method, **calls
                )
        except KeyboardInterrupt:
            found.interrupted = True
    status = _write(given, found, other, comparison)
    if found.interrupted or (other and other.interrupted):
        return _fail("interrupted: the figures above are those of what was done", INTERRUPTED)
    return 1 if found.problems or (other and other.problems) else status


def _write(
    given: argparse.Namespace,
    found: Inspection,
    other: Inspection | None,
    comparison: Comparison | None,
) -> int:
    if given.json:
        more: dict[str, Any] = {}
        if comparison is not None:
            more = {
                "compared_with": given.compare,
                "comparison": records(comparison),
                "only_in_first": comparison.only_one,
                "only_in_second": comparison.only_other,
            }
        print(as_json(found, **more))
    elif given.csv:
        print(as_csv(found), end="")
    else:
        show(found, given.verbose)
        if comparison is not None:
            print()
            show_comparison(comparison, given.verbose)
    status = 0
    if given.html:
        from specops.inspection.page import as_html

        try:
            Path(given.html).write_text(as_html(found, comparison), encoding="utf-8")
        except OSError as error:
            status = _fail(f"--html {given.html}: {error}", 1)
    if given.plot:
        try:
            status = _plot(found, other, given.plot) or status
        except (OSError, ValueError) as error:
            status = _fail(f"--plot {given.plot}: {error}", 1)
    return status


def _plot(found: Inspection, other: Inspection | None, path: str) -> int:
    from specops import plots

    spectra = {
        _labelled(w): w.figures.drawn
        for w in found.measured
        if w.figures is not None and w.figures.drawn is not None and w.figures.drawn[0] > 0
    }
    if other is not None and found.measured and other.measured:
        norms = [{w.name: upper(w.figures) for w in i.measured} for i in (found, other)]
        axes = plots.norms(norms[0], compare=norms[1], labels=(found.path, other.path))
    elif spectra:
        axes = plots.singular_values(spectra, scale="normalized")
    else:
        return _fail("nothing to plot: no weight has all its singular values", 1)
    plots.save(axes, path)
    return 0


def _labelled(weight: WeightFigures) -> str:
    """The name, and of which map the spectrum is if it is not the map of the row."""
    f = weight.figures
    of = f.beside_of if f is not None and f.spectrum is None else ""
    return f"{weight.name} ({of})" if of else weight.name


def _inspect(path: str, hints: Hints, given: argparse.Namespace) -> Inspection:
    with shown_progress(given.method) as calls:
        return inspect_checkpoint(path, hints, method=given.method, **calls)


def _hints(given: argparse.Namespace) -> Hints:
    return Hints(
        input_size=_table(given.input_size, "--input-size", _size),
        stride=_table(given.stride, "--stride", _positive),
        dilation=_table(given.dilation, "--dilation", _positive),
        padding=_table(given.padding, "--padding", _zeros),
        groups=_table(given.groups, "--groups", _positive),
        boundary=given.boundary,
        layout=given.layout,
        exclude=tuple(given.exclude),
    )


def _table(given: list[str], option: str, read: Callable[[str], Any]) -> dict[str, Any]:
    found = {}
    for text in given:
        pattern, _, value = text.rpartition("=")
        try:
            found[pattern or "*"] = read(value)
        except ValueError:
            expected = _EXPECTED.get(option, "count")
            raise ValueError(f"{option} {text}: {value!r} is no {expected}") from None
    return found


_EXPECTED = {
    "--input-size": "size such as 32x32",
    "--padding": "number of zeros, 'same' or 'valid'",
}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _zeros(text: str) -> int | str:
    if text in ("same", "valid"):
        return text
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _size(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.lower().replace("×", "x").split("x"))


def _check_outputs(given: argparse.Namespace) -> None:
    """Raise for outputs that cannot be written: now, not after hours of work."""
    if given.csv and given.compare:
        raise ValueError("--csv holds one checkpoint: take --json or --html with --compare")
    inputs = [Path(path) for path in (given.checkpoint, given.compare) if path]
    for option in ("html", "plot"):
        text = getattr(given, option)
        if not text:
            continue
        path = Path(text)
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--{option} {text}: there is no such folder")
        if path.is_dir():
            raise ValueError(f"--{option} {text}: that is a folder")
        if any(path.exists() and known.exists() and path.samefile(known) for known in inputs):
            raise ValueError(f"--{option} {text} would replace the checkpoint")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise ValueError(f"--{option} {text}: no permission to write there")
    if given.plot and Path(given.plot).suffix.lower() not in _PLOTTED:
        raise ValueError(f"--plot {given.plot}: the name must end in {', '.join(_PLOTTED)}")
    if given.plot and not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install 'specops[inspect]'")


def _fail(message: str, status: int) -> int:
    print(f"specops inspect: {printable(message)}", file=sys.stderr)
    return status
