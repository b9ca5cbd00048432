"""Taking numbers that only the running program knows out of rules, and putting them in again."""

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
    """(the item without arrays and schedules, their values at this step), which may be traced."""
    found = acting(item, partial(item.rule.numbers_at, step, item.name, item.geometry))
    if not found:
        return item, {}
    unknown = {key: x for key, x in found.items() if isinstance(x, jax.Array)}
    return with_numbers(item, found | dict.fromkeys(unknown, 1.0)), unknown


def with_numbers(item: Item, numbers: Numbers) -> Item:
    """The item with these numbers in place of its schedules and arrays."""
    if not numbers:
        return item
    rule = item.rule.with_numbers(numbers)
    return replace(item, assignment=replace(item.assignment, rule=rule))
