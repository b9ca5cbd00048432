"""Walking through a checkpoint, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.errors import CheckpointError, SpecopsError
from specops.geometry import Geometry
from specops.inspection.assumptions import Assumption, assume
from specops.inspection.figures import BOUNDED, LANCZOS, Figures, Method, figures_of
from specops.inspection.hints import Context, Hints

_NAMED = 3
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class WeightFigures:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name, shape, dtype
        As stored; no shape where it is not known.
    geometry : str
        The map that it is taken for, in words.
    why : str
        How that was decided.
    figures : Figures, optional
        None if it was skipped.
    skipped : str
        Why it was; empty if it was not.
    harmless : bool
        Whether nothing is missing: biases, counters.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    geometry: str = ""
    why: str = ""
    figures: Figures | None = None
    skipped: str = ""
    harmless: bool = True


@dataclass
class Inspection:
    """What a checkpoint holds.

    Attributes
    ----------
    path, format : str
    weights : list of WeightFigures
        In the order of the file.
    problems : list of str
        One line each: of the file, and of tensors that should have been measured.
    notes : list of str
        What to know about the figures.
    interrupted : bool
        Whether the rest was not reached.
    total : int
        Tensors in the file.
    """

    path: str
    format: str
    total: int
    weights: list[WeightFigures] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def measured(self) -> list[WeightFigures]:
        """The weights that have figures."""
        return [w for w in self.weights if w.figures is not None]

    @property
    def listed(self) -> list[WeightFigures]:
        """Those measured, and those that should have been."""
        return [w for w in self.weights if not (w.skipped and w.harmless)]

    def decisions(self) -> dict[str, list[str]]:
        """Names of what was measured, by what it was taken for and why."""
        found: dict[str, list[str]] = {}
        for weight in self.measured:
            found.setdefault(weight.why, []).append(weight.name)
        return found

    def by_reason(self) -> dict[str, list[str]]:
        """Names of what was skipped, by the reason."""
        found: dict[str, list[str]] = {}
        for weight in self.weights:
            if weight.skipped:
                found.setdefault(weight.skipped, []).append(weight.name)
        return found

    def totals(self) -> dict[str, Any]:
        """Counts, and the extremes over the weights that were measured."""
        found = [w for w in self.measured if w.figures is not None]
        largest = max(found, key=lambda w: upper(w.figures), default=None)
        return {
            "tensors": self.total,
            "measured": len(found),
            "skipped": len(self.weights) - len(found),
            "parameters": sum(math.prod(w.shape) for w in self.weights if w.shape is not None),
            "largest_sigma_max": None if largest is None else upper(largest.figures),
            "largest_sigma_max_in": None if largest is None else largest.name,
        }


def upper(figures: Figures | None) -> float:
    """σ_max, or what it is at most."""
    assert figures is not None
    sigma = figures.sigma_max
    return sigma[1] if isinstance(sigma, tuple) else sigma


def inspect_checkpoint(
    path: str | PathLike[str],
    hints: Hints | None = None,
    *,
    method: Method = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """The spectral figures of every weight in a checkpoint.

    Parameters
    ----------
    path : path
        Of a file or folder; see `specops.checkpoints.open_checkpoint`.
    hints : Hints, optional
        What the file does not say: input sizes, strides, groups.
    method : "auto", "exact" or "bounds"
        All singular values, or certified bounds of the largest; "auto" takes bounds for
        matrices whose smaller side exceeds 2048.
    progress : callable, optional
        Called with (tensors done, tensors, name of the next).

    Returns
    -------
    Inspection
        After Ctrl-C of what was done by then.

    Raises
    ------
    CheckpointError
        The file cannot be read at all.
    ValueError
        A pattern in `hints` matches no tensor.

    Notes
    -----
    Tensors are read one at a time where the format allows it. Maps are guessed from names and
    shapes; how is in `WeightFigures.why`.
    """
    hints = hints or Hints()
    with open_checkpoint(path) as checkpoint:
        entries = checkpoint.entries
        unused = hints.unused([entry.name for entry in entries])
        if unused:
            names = ", ".join(repr(e.name) for e in entries[:5])
            raise ValueError(
                f"no tensor matches {', '.join(map(repr, unused))}: they are called {names}, …"
            )
        result = Inspection(str(path), checkpoint.format, len(entries))
        result.problems += checkpoint.problems
        if not checkpoint.streams:
            result.notes.append(
                f"{checkpoint.format} cannot be read in parts: it is in memory whole"
            )
        context = Context.of(entries, checkpoint.layout, hints)
        try:
            _walk(checkpoint, context, method, result, progress)
        except KeyboardInterrupt:
            result.interrupted = True
    result.problems += _grouped(result.weights)
    result.notes += _notes(result.measured, method)
    return result


def _grouped(weights: list[WeightFigures]) -> list[str]:
    """A line for each reason why what should have been measured was not."""
    found: dict[str, list[str]] = {}
    for weight in weights:
        if weight.skipped and not weight.harmless:
            found.setdefault(weight.skipped, []).append(weight.name)
    lines = []
    for reason, names in found.items():
        shown = ", ".join(map(repr, names[:_NAMED]))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"{shown}{more}: {reason}")
    return lines


def _notes(measured: list[WeightFigures], method: Method) -> list[str]:
    notes = []
    if any(w.geometry.startswith(("conv any", "transposed conv any")) for w in measured):
        notes.append(
            "convolutions without an input size: σ_max is the supremum over all sizes, [lower, "
            "upper], at stride 1 unless given, in one group unless they look depthwise; the "
            "other figures are of the reshaped kernel"
        )
    texts = {
        BOUNDED: "certified bounds of σ_max alone",
        LANCZOS: "σ_max by Lanczos at this input size, not all singular values",
    }
    for key, text in texts.items():
        names = [w.name for w in measured if w.figures is not None and key in w.figures.method]
        if names:
            why = "asked for" if method == "bounds" else "too large: --method exact insists"
            notes.append(f"{text} ({why}) of {len(names)}: {', '.join(names)}")
    return notes


def _walk(
    checkpoint: Checkpoint,
    context: Context,
    method: Method,
    result: Inspection,
    progress: Progress | None,
) -> None:
    for index, entry in enumerate(checkpoint.entries):
        if progress is not None:
            progress(index, len(checkpoint.entries), entry.name)
        if entry.problem:
            found = _skip(entry, entry.problem, harmless=entry.harmless)
        else:
            assert entry.shape is not None
            assumed = assume(entry.name, entry.shape, entry.dtype, context)
            found = _measured(checkpoint, entry, assumed, method)
        result.weights.append(found)
    if progress is not None:
        progress(len(checkpoint.entries), len(checkpoint.entries), "")


def _measured(
    checkpoint: Checkpoint, entry: Entry, assumed: Assumption, method: Method
) -> WeightFigures:
    geometry = assumed.geometry
    small = entry.shape is not None and len(entry.shape) == 1 and "float" in entry.dtype
    if geometry is None and not small:
        return _skip(entry, assumed.skipped, assumed.harmless)
    try:
        w = checkpoint.read(entry.name)
        bad = _not_finite(w)
        if bad:
            reason = f"holds NaN or infinity in {bad} of {w.size} entries"
            return _skip(entry, reason, harmless=False, geometry=geometry, why=assumed.why)
        if geometry is None:
            return _skip(entry, assumed.skipped, assumed.harmless)
        if w.dtype == np.float16:
            w = w.astype(np.float32)
        if assumed.shape is not None:
            w = w.reshape(assumed.shape)
        with np.errstate(all="ignore"):
            figures = figures_of(w, geometry, method)
        if not math.isfinite(upper(figures)) or not math.isfinite(figures.frobenius):
            raise OverflowError("its figures are beyond double precision")
    except CheckpointError as error:
        return _skip(entry, str(error), harmless=False)
    except MemoryError:
        return _skip(entry, "does not fit into memory", harmless=False)
    except (SpecopsError, ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
        return _skip(entry, str(error), harmless=False, geometry=geometry, why=assumed.why)
    return WeightFigures(
        entry.name, entry.shape, entry.dtype, geometry.describe(), assumed.why, figures
    )


def _skip(
    entry: Entry,
    reason: str,
    harmless: bool,
    geometry: Geometry | None = None,
    why: str = "",
) -> WeightFigures:
    described = "" if geometry is None else geometry.describe()
    return WeightFigures(
        entry.name, entry.shape, entry.dtype, described, why, None, reason, harmless
    )


def _not_finite(w: np.ndarray) -> int:
    """In slices: a mask of the whole would be another copy."""
    flat = w.reshape(-1)
    step = 2**22
    return sum(
        int(np.count_nonzero(~np.isfinite(flat[at : at + step])))
        for at in range(0, flat.size, step)
    )
