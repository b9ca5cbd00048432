"""Walking through a checkpoint, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike

import numpy as np

from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.errors import CheckpointError, SpecopsError
from specops.geometry import Conv, Dense, Geometry
from specops.inspection.assumptions import Reading
from specops.inspection.configuration import Configuration
from specops.inspection.figures import Method, figures_of, product_figures
from specops.inspection.hints import Hints
from specops.inspection.notes import followed_note, grouped_problems, notes_on, tied_note
from specops.inspection.plan import Item, Weight, load, plan_of
from specops.inspection.results import Inspection, Measured, WeightFigures, upper
from specops.inspection.rule_states import followed
from specops.inspection.spectrum import Figures
from specops.tables import some_names

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
        A file or folder; see `specops.checkpoints.open_checkpoint`.
    hints : Hints, optional
        What the file does not state: input sizes, strides, groups.
    method : "auto", "exact" or "bounds"
        All singular values, or certified bounds of the largest; "auto" takes bounds for
        matrices whose smaller side exceeds 2048.
    progress : callable, optional
        Called with (tensors done, tensors, name of the next).
    listed : callable, optional
        Called once with the list of what will be measured, before the first tensor is read.

    Returns
    -------
    Inspection
        After Ctrl-C it holds what was measured by then.

    Raises
    ------
    CheckpointError
        The file cannot be read at all.
    ValueError
        A pattern in `hints` matches no tensor.

    Notes
    -----
    Tensors are read one at a time if the format allows it. Maps are inferred from names, shapes,
    neighbours and configurations, and `WeightFigures.why` tells how. If nothing decides between
    several maps, `WeightFigures.readings` has the figures of each.
    """
    hints = hints or Hints()
    with open_checkpoint(path) as checkpoint:
        items = plan_of(checkpoint, hints)
        unused = hints.unused([item.entry.name for item in items])
        if unused:
            names = some_names([e.name for e in checkpoint.entries], unused[0])
            raise ValueError(
                f"no tensor matches {', '.join(map(repr, unused))}: they are called {names}"
            )
        result = Inspection(str(path), checkpoint.format, len(checkpoint.entries))
        result.problems += checkpoint.problems
        if not checkpoint.streams:
            result.notes.append(
                f"{checkpoint.format} cannot be read in parts: it is in memory whole"
            )
        stored = [item.entry.name for item in items]
        result.notes += tied_note(stored, Configuration.of(checkpoint))
        result.notes += followed_note(followed(stored))
        if listed is not None:
            listed([item.entry for item in items])
        try:
            for index, item in enumerate(items):
                if progress is not None:
                    progress(index, len(items), item.entry.name)
                result.weights.append(_row(checkpoint, item, method))
            if progress is not None:
                progress(len(items), len(items), "")
        except KeyboardInterrupt:
            result.interrupted = True
    result.problems += grouped_problems(result.weights)
    result.problems += _refused(items, hints)
    result.notes += notes_on(result.measured, method)
    return result


def _refused(items: list[Item], hints: Hints) -> list[str]:
    """Notes on hints for convolutions that match other weights."""
    found = []
    convolutions = any(
        isinstance(r.geometry, Conv) for item in items for r in item.assumption.readings
    ) or any(not item.assumption.harmless for item in items)
    if not convolutions:
        found += [f"{option}: refused, the file has no convolution" for option in hints.general()]
    for option, pattern, names in hints.meant([item.entry.name for item in items]):
        rows = [item.assumption for item in items if item.entry.name in names]
        convolutions = any(isinstance(r.geometry, Conv) for a in rows for r in a.readings)
        if not convolutions and all(a.harmless for a in rows):
            taken = rows[0].why or rows[0].skipped
            found.append(f"{option} {pattern}: refused, {names[0]!r} is no convolution ({taken})")
    return found


def _row(checkpoint: Checkpoint, item: Item, method: Method) -> WeightFigures:
    entry, assumed = item.entry, item.assumption
    small = entry.shape is not None and len(entry.shape) == 1 and "float" in entry.dtype
    if entry.problem or not (assumed.readings or small):
        return _skip(item, assumed.skipped, assumed.harmless)
    try:
        w = load(checkpoint, item)
        bad, size = _not_finite(w)
        if bad:
            reason = f"holds NaN or infinity in {bad} of {size} entries"
            return _skip(item, reason, harmless=False)
        if not assumed.readings:
            return _skip(item, assumed.skipped, assumed.harmless)
        readings = [measured_as(w, reading, method) for reading in assumed.readings]
    except CheckpointError as error:
        return _skip(item, str(error), harmless=False)
    except MemoryError:
        return _skip(item, "does not fit into memory", harmless=False)
    except (SpecopsError, ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
        return _skip(item, str(error), harmless=False)
    composed = item.composed
    how = "" if composed is None else f"; {composed.how}"
    return WeightFigures.of(
        entry.name,
        entry.shape,
        entry.dtype,
        [Measured(m.geometry, m.why + how, m.figures) for m in readings],
        sources=() if composed is None else composed.sources,
    )


def measured_as(w: Weight, reading: Reading, method: Method) -> Measured:
    """A weight measured as one of the maps that it may be.

    Raises
    ------
    OverflowError
        A figure is beyond double precision.
    """
    with np.errstate(all="ignore"):
        figures = measure(w, reading, method)
    if not math.isfinite(upper(figures)) or not math.isfinite(figures.frobenius or 0.0):
        raise OverflowError("its figures are beyond double precision")
    return Measured(described(reading.geometry), reading.why, figures)


def measure(w: Weight, reading: Reading, method: Method) -> Figures:
    """The figures of a weight, an array or two factors, in this reading."""
    if isinstance(w, tuple):
        assert isinstance(reading.geometry, Dense)
        return product_figures(*w, reading.geometry)
    seen = w if reading.shape is None else w.reshape(reading.shape)
    return figures_of(seen, reading.geometry, method)


def described(geometry: Geometry) -> str:
    """The geometry in a few words; of a convolution at a size, with its stride."""
    text = geometry.describe()
    sized = isinstance(geometry, Conv) and geometry.grid is not None
    return f"{text}, stride 1" if sized and "stride" not in text else text


def _skip(item: Item, reason: str, harmless: bool) -> WeightFigures:
    entry, first = item.entry, item.assumption.readings[:1]
    return WeightFigures(
        entry.name,
        entry.shape,
        entry.dtype,
        described(first[0].geometry) if first else "",
        item.assumption.why,
        None,
        reason,
        harmless,
        () if item.composed is None else item.composed.sources,
    )


def _not_finite(w: Weight) -> tuple[int, int]:
    """(how many entries are not finite, of how many), in slices to save the memory of a mask."""
    bad, size, step = 0, 0, 2**22
    for part in w if isinstance(w, tuple) else (w,):
        flat = part.reshape(-1)
        size += flat.size
        bad += sum(
            int(np.count_nonzero(~np.isfinite(flat[at : at + step])))
            for at in range(0, flat.size, step)
        )
    return bad, size
