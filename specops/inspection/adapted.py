"""A checkpoint beside a file of low-rank updates of it: the weights that the network runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.errors import CheckpointError, SpecopsError
from specops.inspection.comparison import Comparison, Pair
from specops.inspection.configuration import Configuration
from specops.inspection.figures import Method
from specops.inspection.hints import Hints, bare_name
from specops.inspection.low_rank import UPDATE
from specops.inspection.merged import added, can_be_added, is_turned
from specops.inspection.plan import Item, load, plan_of
from specops.inspection.results import Inspection, WeightFigures
from specops.inspection.run import measured_as

_PEFT: Final = "base_model.model."


def with_updates(
    comparison: Comparison,
    one: Inspection,
    other: Inspection,
    hints: Hints | None = None,
    *,
    method: Method = "auto",
    progress: Callable[[int, int, str], None] | None = None,
    listed: Callable[[Sequence[Entry]], None] | None = None,
) -> Comparison:
    """The comparison with pairs of weights of the first, and those plus updates of the second.

    Where the second says how much of an update to add (α). Its figures are those of the
    difference. A pair that cannot be added or measured stays apart.
    """
    hints = hints or Hints()
    alone = set(comparison.only_one)
    bases = {bare_name(w.name): w for w in one.measured if w.name in alone}
    updates = [w for w in other.measured if w.name in set(comparison.only_other)]
    wanted = {w.name: bases[stem] for w in updates if (stem := _base_of(w.name)) in bases}
    if not wanted:
        return comparison
    pairs: dict[str, Pair] = {}
    with open_checkpoint(one.path) as first, open_checkpoint(other.path) as second:
        items = [{i.entry.name: i for i in plan_of(c, hints)} for c in (first, second)]
        adapter = Configuration.of(second).adapter
        if listed is not None:
            listed([items[0][base.name].entry for base in wanted.values()])
        for index, (name, base) in enumerate(wanted.items()):
            if progress is not None:
                progress(index, len(wanted), base.name)
            try:
                row = _sum(first, items[0][base.name], second, items[1][name], adapter, method)
            except (CheckpointError, SpecopsError, ArithmeticError, ValueError, MemoryError):
                continue
            if row is not None:
                pairs[name] = Pair(base.name, base, row)
    paired = {pair.name for pair in pairs.values()}
    own = {w.name: w.figures for w in updates if w.figures is not None}
    known = {pair.name: own[name] for name, pair in pairs.items()}
    return replace(
        comparison,
        pairs=[*comparison.pairs, *pairs.values()],
        only_one=[name for name in comparison.only_one if name not in paired],
        only_other=[name for name in comparison.only_other if name not in pairs],
        differences={**(comparison.differences or {}), **known},
    )


def _base_of(name: str) -> str:
    """The bare name of the weight that an update is of; empty if it is none."""
    stem = bare_name(name.removesuffix(UPDATE).removeprefix(_PEFT))
    return f"{stem}.weight" if name.endswith(UPDATE) else ""


def _sum(
    first: Checkpoint,
    base: Item,
    second: Checkpoint,
    update: Item,
    adapter: Mapping[str, Any],
    method: Method,
) -> WeightFigures | None:
    """The row of a weight plus its update; None if nothing says how much of it to add."""
    made = update.composed
    if made is None or not can_be_added(made.how):
        return None
    w = load(first, base)
    if isinstance(w, tuple):
        return None
    total = added(np.asarray(w), load(second, update), is_turned(made.sources[0], adapter))
    readings = [measured_as(total, reading, method) for reading in base.assumption.readings]
    return WeightFigures.of(
        base.entry.name,
        base.entry.shape,
        base.entry.dtype,
        [replace(m, why=f"{m.why}; with its {made.how}") for m in readings],
        sources=(base.entry.name, *made.sources),
    )
