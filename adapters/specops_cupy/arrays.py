"""Dicts of arrays, possibly nested: the names of what they hold, and what a plan may know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from specops import arrays
from specops.errors import AdapterError
from specops.training.plan import Weight
from specops.typing import Array

_FLOATS = ("float16", "float32", "float64", "complex64", "complex128")
_UNKNOWN_MAP = (
    "a bare array does not say which linear map it is: pass geometries={{{name!r}: ...}}, "
    "Dense(...) or Conv(...)"
)


def flatten(model: Any) -> dict[str, Any]:
    """What a dict holds, by its path: keys joined by dots.

    Raises
    ------
    AdapterError
        No dict, or two entries of one path.
    """
    if not isinstance(model, Mapping):
        raise AdapterError(
            f"expected a dict of arrays, got {type(model).__module__}.{type(model).__name__}: "
            f'pass {{"w": array}}'
        )
    leaves: dict[str, Any] = {}
    _collect(model, "", leaves)
    return leaves


def check_library(leaves: Mapping[str, Any]) -> None:
    """Raise `AdapterError` unless there are arrays, and of one library."""
    libraries = {library(x): name for name, x in leaves.items() if is_array(x)}
    if not libraries:
        raise AdapterError("the dict holds no arrays, so there is nothing to constrain")
    if len(libraries) > 1:
        examples = ", ".join(f"{name} is {kind}'s" for kind, name in libraries.items())
        raise AdapterError(
            f"the arrays are of several libraries ({examples}): move them to one first, for "
            f"example with cupy.asarray"
        )


def rebuild(
    model: Mapping[Any, Any], replaced: Mapping[str, Any], path: str = ""
) -> dict[Any, Any]:
    """A dict of the same structure, with some arrays replaced by path."""
    result: dict[Any, Any] = {}
    for key, value in model.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            result[key] = rebuild(value, replaced, f"{name}.")
        else:
            result[key] = replaced.get(name, value)
    return result


def describe(leaves: Mapping[str, Any]) -> tuple[list[Weight], dict[str, tuple[str, ...]]]:
    """(every entry as a plan sees it, further names of those that stand under several).

    Which map an array is, is never guessed from its shape. One array under two names, or two
    that are the same view of the same memory, count once; views that overlap otherwise are not
    recognised.
    """
    weights: list[Weight] = []
    seen: dict[Any, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for name, leaf in leaves.items():
        weight = _weight(name, leaf)
        if not weight.skipped:
            place = _place(leaf)
            first = seen.setdefault(place, name)
            if first != name:
                weight = replace(weight, obstacle="", skipped=f"tied to {first}")
                aliases[first] = (*aliases.get(first, ()), name)
        weights.append(weight)
    return weights, aliases


def measurable(weight: Weight) -> Weight:
    """The weight, whose obstacle a user's geometry may have removed although it remains."""
    if weight.skipped or weight.dtype in _FLOATS:
        return weight
    return replace(weight, geometry=None, obstacle=_not_measurable(weight.dtype))


def is_writeable(x: Array) -> bool:
    """Whether an array can be written to; CuPy's always can."""
    return bool(getattr(getattr(x, "flags", None), "writeable", True))


def is_array(x: Any) -> bool:
    """Whether it is an array that can be written to in place, and no scalar."""
    # NumPy's scalars have all but the last.
    return all(hasattr(x, name) for name in ("shape", "dtype", "ndim", "__setitem__"))


def library(x: Array) -> str:
    """The package that an array is of."""
    return type(x).__module__.partition(".")[0]


def _collect(model: Mapping[Any, Any], path: str, leaves: dict[str, Any]) -> None:
    for key, value in model.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            _collect(value, f"{name}.", leaves)
        elif name in leaves:
            raise AdapterError(f"two entries of the dict have the path {name!r}: rename one")
        else:
            leaves[name] = value


def _weight(name: str, leaf: Any) -> Weight:
    if not is_array(leaf):
        kind = type(leaf).__name__
        return Weight(name, (), kind, skipped=f"no array but {kind}")
    shape, dtype = tuple(leaf.shape), arrays.dtype_name(leaf.dtype)
    if leaf.ndim < 2:
        return Weight(name, shape, dtype, skipped=f"{leaf.ndim}-d: a bias or scale, no matrix")
    if 0 in shape:
        return Weight(name, shape, dtype, skipped="empty")
    obstacle = _UNKNOWN_MAP.format(name=name) if dtype in _FLOATS else _not_measurable(dtype)
    return Weight(name, shape, dtype, obstacle=obstacle)


def _not_measurable(dtype: str) -> str:
    return f"dtype {dtype} cannot be measured: keep a float32 weight"


def _place(x: Array) -> Any:
    """What two arrays share that are the same memory in the same shape."""
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is None:
        interface = getattr(x, "__array_interface__", None)
    if interface is None:
        return id(x)
    return (
        interface["data"][0],
        interface["shape"],
        interface["typestr"],
        getattr(x, "strides", None),
    )
