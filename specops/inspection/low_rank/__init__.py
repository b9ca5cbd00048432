"""Low-rank updates of weights, as peft, kohya and LyCORIS store them: LoRA, LoHa, LoKr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from specops.inspection.low_rank.lora import loras
from specops.inspection.low_rank.lycoris import products
from specops.inspection.low_rank.update import UPDATE, Shapes, Tensors, Update

__all__ = ["UPDATE", "Tensors", "Update", "find_updates"]


def find_updates(shapes: Shapes, adapter: Mapping[str, Any]) -> Iterator[Update]:
    """Each update in a file. If a layer has only one, its name is the layer's plus `UPDATE`."""
    found = list(loras(shapes, adapter))
    adapters = Counter(update.layer for update in found)
    for update in found:
        if adapters[update.layer] == 1:
            yield update
            continue
        which = update.sources[0].removeprefix(update.layer).strip(".")
        several = "one of several of its layer"
        yield replace(update, name=f"{update.layer} (update by {which})", obstacle=several)
    yield from products(shapes, adapter)
