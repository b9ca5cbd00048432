"""A checkpoint compared with low-rank updates of it: the weights with the updates added."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.errors import CheckpointError, SpecopsError
from specops.geometry import Dense
from specops.inspection.comparison import Comparison, Pair
from specops.inspection.configuration import Configuration
from specops.inspection.figures import Method
from specops.inspection.hints import Hints, bare_name
from specops.inspection.low_rank import UPDATE
from specops.inspection.low_rank.merged import added, is_turned
from specops.inspection.plan import Item, load, plan_of
from specops.inspection.results import Inspection, WeightFigures
from specops.inspection.run import measured_as
from specops.inspection.spectrum import Figures

_KOHYA: Final = re.compile(r"(?:lora|lycoris)_(?:(?:unet|te\d?|transformer)_)?(.+)")


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
    """The comparison, with pairs of a weight of the first and that weight plus its update.

    This needs the second to say how much of an update to add (α). The figures of the difference are
    those of the update. A weight and an update that cannot be added or measured stay unpaired.
    """
    hints = hints or Hints()
    bases = {w.name: w for w in one.measured if w.name in set(comparison.only_one)}
    updates = [w for w in other.measured if w.name in set(comparison.only_other)]
    wanted = {w.name: bases[found] for w in updates if (found := base_of(w.name, bases))}
    if not wanted:
        return comparison
    pairs: dict[str, Pair] = {}
    known: dict[str, Figures] = {}
    with open_checkpoint(one.path) as first, open_checkpoint(other.path) as second:
        items = [{i.entry.name: i for i in plan_of(c, hints)} for c in (first, second)]
        adapter = Configuration.of(second).adapter
        if listed is not None:
            listed([items[0][base.name].entry for base in wanted.values()])
        for index, (name, base) in enumerate(wanted.items()):
            if progress is not None:
                progress(index, len(wanted), base.name)
            try:
                added_up = _sum(first, items[0][base.name], second, items[1][name], adapter, method)
            except (CheckpointError, SpecopsError, ArithmeticError, ValueError, MemoryError):
                continue
            if added_up is not None:
                row, known[base.name] = added_up
                pairs[name] = Pair(base.name, base, row)
    paired = {pair.name for pair in pairs.values()}
    return replace(
        comparison,
        pairs=[*comparison.pairs, *pairs.values()],
        only_one=[name for name in comparison.only_one if name not in paired],
        only_other=[name for name in comparison.only_other if name not in pairs],
        differences={**(comparison.differences or {}), **known},
    )


def base_of(name: str, bases: Iterable[str]) -> str:
    """The name of the weight to which an update belongs; "" if it is none, or may be several.

    kohya's names have underscores for dots, and begin with the part of the model.
    """
    if not name.endswith(UPDATE):
        return ""
    layer = name.removesuffix(UPDATE)
    bare = bare_name(layer).replace(".base_layer", "")
    wanted = {f"{bare}.weight", f"{bare}.in_proj_weight"}
    found = [base for base in bases if bare_name(base) in wanted]
    kohya = _KOHYA.fullmatch(layer)
    if not found and kohya is not None:
        flat = {base: base.removesuffix(".weight").replace(".", "_") for base in bases}
        found = [base for base, text in flat.items() if text == kohya[1]] or [
            base for base, text in flat.items() if text.endswith(f"_{kohya[1]}")
        ]
    return found[0] if len(found) == 1 else ""


def _sum(
    first: Checkpoint,
    base: Item,
    second: Checkpoint,
    update: Item,
    adapter: Mapping[str, Any],
    method: Method,
) -> tuple[WeightFigures, Figures] | None:
    """(the row of a weight plus its update, the figures of the update); None if not possible."""
    composed = update.composed
    made = None if composed is None else composed.update
    if composed is None or made is None or made.obstacle:
        return None
    w = load(first, base)
    if isinstance(w, tuple):
        return None
    readings = base.assumption.readings
    geometry = readings[0].geometry
    last = isinstance(geometry, Dense) and geometry.out_axes == (-1,)
    tensors = {name: second.read(name) for name in made.sources}
    total = added(w, made, tensors, is_turned(made, w.shape, adapter, last))
    row = WeightFigures.of(
        base.entry.name,
        base.entry.shape,
        base.entry.dtype,
        [
            replace(m, why=f"{m.why}; with its {composed.how}")
            for m in (measured_as(total, reading, method) for reading in readings)
        ],
        sources=(base.entry.name, *made.sources),
    )
    own = update.assumption.geometry
    same = not made.lengths and own is not None and own.describe() == geometry.describe()
    # The factors of an update are cheaper to decompose than their product.
    difference = load(second, update) if same else total - w
    return row, measured_as(difference, readings[0], method).figures
