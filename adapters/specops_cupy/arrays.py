"""Dicts of arrays, possibly nested: names of the arrays, and what a plan needs to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from specops import arrays
from specops.errors import AdapterError
from specops.tables import some_names
from specops.training.constrained import Constrained
from specops.training.parameter import Parameter
from specops.training.weight import Weight, unmeasurable
from specops.typing import Array
from specops_cupy.device import on_device_of

_UNKNOWN_MAP = (
    "a bare array does not say which linear map it is: pass geometries={{{name!r}: ...}}, "
    "Dense(...) or Conv(...)"
)


def flatten(model: Any) -> dict[str, Any]:
    """The entries of a nested dict by path: keys joined by dots.

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


class Entry(Parameter):
    """An array of the dict."""

    def __init__(self, name: str, array: Any) -> None:
        self.weight, self.array = _weight(name, array), array

    def read(self) -> Array:
        """The array itself."""
        return self.array

    def write(self, value: Array) -> None:
        """Write the value in place."""
        self.array[...] = value

    def identity(self) -> int:
        """A number for the memory and the view of it."""
        return hash(_place(self.array))

    def check_writable(self) -> None:
        """Raise if the array is read-only: CuPy's never are, but NumPy's may be."""
        check_writeable(self.weight.name, self.array)

    def context(self) -> AbstractContextManager[None]:
        """The context of the array's device."""
        return on_device_of(self.array)


def entries(leaves: Mapping[str, Any]) -> list[Entry]:
    """Every entry of the dict, with all further names of an array that has several.

    Maps are never guessed from shapes. One array under two names, or two arrays that are the same
    view of the same memory, count once. Views that overlap in other ways are not recognised.
    """
    result: list[Entry] = []
    seen: dict[Any, Entry] = {}
    for name, leaf in leaves.items():
        entry = Entry(name, leaf)
        if not entry.weight.skipped:
            first = seen.setdefault(_place(leaf), entry)
            if first is not entry:
                reason = f"tied to {first.weight.name}"
                entry.weight = replace(entry.weight, obstacle="", skipped=reason)
                first.aliases = (*first.aliases, name)
        result.append(entry)
    return result


def matched(
    gradients: Any, entries: Sequence[Entry], constrained: Sequence[Constrained[Entry]]
) -> dict[str, Array]:
    """The gradients of constrained arrays, checked, by name; missing ones are left out."""
    given = flatten(gradients)
    names = [entry.weight.name for entry in entries]
    unknown = [name for name in given if name not in names]
    if unknown:
        raise AdapterError(
            f"{unknown[0]} has a gradient but is no entry of the model, whose entries are called "
            f"{some_names(names, unknown[0])}"
        )
    result = {}
    for c in constrained:
        own = (c.name, *c.parameter.aliases)
        name = next((n for n in own if given.get(n) is not None), None)
        if name is not None:
            _check_gradient(name, given[name], c.parameter.array)
            result[c.name] = given[name]
    return result


def _check_gradient(name: str, gradient: Any, array: Array) -> None:
    if not is_array(gradient) or library(gradient) != library(array):
        raise AdapterError(
            f"the gradient of {name} is a {type(gradient).__module__}."
            f"{type(gradient).__name__}, no array of {library(array)} as its weight: "
            f"convert it first"
        )
    if gradient.shape != array.shape:
        raise AdapterError(
            f"{name} has shape {tuple(array.shape)}, but its gradient {tuple(gradient.shape)}: "
            f"pass the gradient of the array itself"
        )
    is_complex = arrays.is_complex(array)
    if unmeasurable(arrays.dtype_name(gradient.dtype)) or arrays.is_complex(gradient) != is_complex:
        raise AdapterError(
            f"the gradient of {name} has dtype {arrays.dtype_name(gradient.dtype)}, its weight "
            f"{arrays.dtype_name(array.dtype)}: cast it to that first"
        )
    check_writeable(f"the gradient of {name}", gradient)


def check_writeable(name: str, x: Array) -> None:
    """Raise if an array is read-only; called before the first of several is written."""
    if not getattr(getattr(x, "flags", None), "writeable", True):
        raise AdapterError(
            f"{name} is read-only, so no array was changed: pass a copy that can be written to"
        )


def is_array(x: Any) -> bool:
    """Whether it is an array that can be written to in place, not a scalar."""
    # NumPy's scalars have all of these but the last.
    return all(hasattr(x, name) for name in ("shape", "dtype", "ndim", "__setitem__"))


def library(x: Array) -> str:
    """The package of an array's type."""
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
    return Weight.of(name, shape, dtype, obstacle=_UNKNOWN_MAP.format(name=name))


def _place(x: Array) -> Any:
    """A key that is equal for two arrays that are the same view of the same memory."""
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
