"""Rules whose numbers are known to a program alone: taken out of them, and put in again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from specops_jax.one_firing import acting
from specops_jax.program import Item

Numbers = Mapping[str, Any]


def parted(item: Item, step: Any) -> tuple[Item, dict[str, jax.Array]]:
    """(the item without arrays, which may be traced, and schedules; those at this step)."""
    found = acting(item, partial(item.rule.numbers_at, step, item.name, item.geometry))
    if not found:
        return item, {}
    unknown = {key: x for key, x in found.items() if isinstance(x, jax.Array)}
    return with_numbers(item, found | dict.fromkeys(unknown, 1.0)), unknown


def with_numbers(item: Item, numbers: Numbers) -> Item:
    """The item with numbers in the place of schedules and arrays."""
    if not numbers:
        return item
    rule = item.rule.with_numbers(numbers)
    return replace(item, assignment=replace(item.assignment, rule=rule))
