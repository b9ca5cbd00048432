"""The difference of two checkpoints, weight by weight, as a map of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.errors import CheckpointError, SpecopsError
from specops.inspection.comparison import Comparison
from specops.inspection.figures import Method
from specops.inspection.hints import Hints
from specops.inspection.plan import Item, Weight, load, plan_of
from specops.inspection.run import measure
from specops.inspection.spectrum import Figures

Path = str | PathLike[str]


def differences(
    comparison: Comparison,
    one: Path,
    other: Path,
    hints: Hints | None = None,
    *,
    method: Method = "auto",
    progress: Callable[[int, int, str], None] | None = None,
    listed: Callable[[Sequence[Entry]], None] | None = None,
) -> dict[str, Figures]:
    """Figures of W′ − W for the pairs of a comparison, by the name in the first checkpoint.

    Two weights are in memory at a time. A pair that cannot be subtracted or measured is left out;
    of an ambiguous weight the likeliest reading counts. `progress` and `listed` are those of
    `inspect_checkpoint`.
    """
    hints = hints or Hints()
    found = {}
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        items = [{i.entry.name: i for i in plan_of(c, hints)} for c in (first, second)]
        if listed is not None:
            listed([items[0][pair.one.name].entry for pair in comparison.pairs])
        for index, pair in enumerate(comparison.pairs):
            if progress is not None:
                progress(index, len(comparison.pairs), pair.name)
            try:
                found[pair.name] = _figures(
                    first, items[0][pair.one.name], second, items[1][pair.other.name], method
                )
            except (CheckpointError, SpecopsError, ArithmeticError, ValueError, MemoryError):
                continue
    return found


def _figures(
    first: Checkpoint, one: Item, second: Checkpoint, other: Item, method: Method
) -> Figures:
    difference = _minus(load(second, other), load(first, one))
    return measure(difference, one.assumption.readings[0], method)


def _minus(a: Weight, b: Weight) -> Any:
    if isinstance(a, tuple) and isinstance(b, tuple):
        # B′A′ − BA is also a product of two factors, whose rank is the sum of both ranks.
        return np.concatenate([a[0], -b[0]], axis=1), np.concatenate([a[1], b[1]])
    if isinstance(a, tuple) or isinstance(b, tuple):
        raise ValueError("one is a low-rank update, the other is not")
    wide = np.result_type(a.dtype, b.dtype, np.float32)
    return a.astype(wide) - b.astype(wide)
