"""Walking through a checkpoint, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike

import numpy as np

from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.errors import CheckpointError, SpecopsError
from specops.geometry import Geometry
from specops.inspection.assumptions import Assumption, assume
from specops.inspection.figures import Method, figures_of
from specops.inspection.hints import Context, Hints
from specops.inspection.notes import grouped_problems, notes_on
from specops.inspection.results import Inspection, WeightFigures, upper

Progress = Callable[[int, int, str], None]


def inspect_checkpoint(
    path: str | PathLike[str],
    hints: Hints | None = None,
    *,
    method: Method = "auto",
    progress: Progress | None = None,
    listed: Callable[[Sequence[Entry]], None] | None = None,
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
    listed : callable, optional
        Called once with what the file lists, before the first tensor is read.

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
        if listed is not None:
            listed(entries)
        try:
            _walk(checkpoint, context, method, result, progress)
        except KeyboardInterrupt:
            result.interrupted = True
    result.problems += grouped_problems(result.weights)
    result.notes += notes_on(result.measured, method)
    return result


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
