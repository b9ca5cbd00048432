"""What there is to measure in a checkpoint: its tensors, and weights composed of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specops.checkpoints import Checkpoint, Entry
from specops.inspection.assumptions import Assumption, Context, assume
from specops.inspection.composed import Composed, find_composed
from specops.inspection.configuration import Configuration
from specops.inspection.hints import Hints
from specops.inspection.results import TIED
from specops.inspection.rule_states import rule_states

_IN_ORDER = ("torch", "equinox")
"""Formats whose tensors have the order of the model's layers."""
EXCLUDED = "excluded, as asked"
_OF_RULES = "of the state of specops' rules"
Weight = np.ndarray | tuple[np.ndarray, np.ndarray]
"""An array, or two factors whose product is the weight."""


@dataclass(frozen=True)
class Item:
    """One row of an inspection before it is measured.

    Attributes
    ----------
    entry : Entry
        The entry of the tensor, or of the composed weight.
    assumption : Assumption
        The maps that it is assumed to be.
    composed : Composed, optional
        How the weight is composed, if it is computed from several tensors.
    """

    entry: Entry
    assumption: Assumption
    composed: Composed | None = None


def plan_of(checkpoint: Checkpoint, hints: Hints) -> list[Item]:
    """The rows of an inspection, in the order of the file."""
    configuration = Configuration.of(checkpoint)
    states = rule_states(e.name for e in checkpoint.entries)
    others = [e for e in checkpoint.entries if e.name not in states]
    kept = tuple(e for e in others if not hints.excludes(e.name))
    composed = find_composed(kept, configuration)
    whole = {c.sources[0]: c for c in composed}
    # A tensor belongs to the first weight composed of it: to an update, not to base plus update.
    belongs = {n: c.name for c in reversed(composed) for n in c.sources if n != c.base}
    listed: list[tuple[Entry, Composed | None]] = []
    for entry in checkpoint.entries:
        if entry.name in whole:
            c = whole[entry.name]
            listed.append((Entry(c.name, c.shape, entry.dtype), c))
        listed.append((entry, None))
    apart = states.union(belongs)
    weights = [e for e, c in listed if c is not None or e.name not in apart]
    ordered = checkpoint.format.startswith(_IN_ORDER)
    context = Context.of(weights, checkpoint.layout, hints, configuration, ordered)
    reasons = dict.fromkeys(states, _OF_RULES) | {n: f"a part of {w}" for n, w in belongs.items()}
    return [Item(e, _assumed(e, c, reasons, context), c) for e, c in listed]


def _assumed(
    entry: Entry, composed: Composed | None, reasons: dict[str, str], context: Context
) -> Assumption:
    if entry.problem:
        return Assumption(skipped=entry.problem, harmless=entry.harmless)
    if composed is None:
        if context.hints.excludes(entry.name):
            return Assumption(skipped=EXCLUDED)
        if entry.name in reasons:
            return Assumption(skipped=reasons[entry.name])
        if entry.same_as:
            return Assumption(skipped=f"{TIED} {entry.same_as}")
    assert entry.shape is not None
    return assume(entry.name, entry.shape, entry.dtype, context)


def load(checkpoint: Checkpoint, item: Item) -> Any:
    """The weight of a row, in memory; a low-rank one as its two factors."""
    if item.composed is None:
        w = checkpoint.read(item.entry.name)
        return w.astype(np.float32) if w.dtype == np.float16 else w
    tensors = {name: checkpoint.read(name) for name in item.composed.sources}
    with np.errstate(all="ignore"):
        return item.composed.make(tensors)
