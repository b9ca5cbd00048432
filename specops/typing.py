"""Types that the whole project shares: what the Array API standard leaves without a class."""

from __future__ import annotations

from typing import Any, TypeAlias

Array: TypeAlias = Any
"""An array of any library that follows the Array API standard, which defines no class."""
Namespace: TypeAlias = Any
"""The module of functions that belongs to an array."""
State: TypeAlias = dict[str, Array]
"""The state of a rule or an iteration: a flat dict of arrays."""
