"""Reading a layer's attribute (``layer.weight``) gives the weight in use.

The layer's class is replaced by a subclass of it in which the attribute is a property: reading it
computes the weight in use from the raw parameter, which stays where it was, under its own name.
Nothing is swapped around a forward pass, so it does not matter who reads the weight, when, or in
which thread.
"""

from __future__ import annotations

import copyreg
from functools import cache
from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from specops.errors import AdapterError
from specops_torch.in_use import InUse

_HELD = "_specops_in_use"
_LOOKS = "_specops_looks"
"""The handle of a hook on what is loaded into a layer."""
_live: WeakSet[InUse] = WeakSet()
"""The weights in use of attachments; not their copies in copied models."""


def read_through(module: nn.Module, attribute: str, in_use: InUse) -> None:
    """Let the module answer `attribute` with the weight in use.

    Raises
    ------
    AdapterError
        The weight is under a forward rule of another attachment.
    """
    held: dict[str, InUse] = module.__dict__.setdefault(_HELD, {})
    other = held.get(attribute)
    if other is not None and other is not in_use and other in _live:
        raise AdapterError(
            f"{in_use.name} is under a forward rule already, {other.rule!r}: detach that "
            f"attachment first"
        )
    held[attribute] = in_use
    _live.add(in_use)
    if _LOOKS not in module.__dict__:
        module.__dict__[_LOOKS] = module.register_load_state_dict_post_hook(_look_at_loaded)
    kind: Any = type(module)
    names = kind.attributes if issubclass(kind, _Reading) else ()
    if attribute not in names:
        base = kind.plain if "plain" in vars(kind) else kind
        module.__class__ = _reading(base, (*names, attribute))


def answer_plainly(module: nn.Module, attribute: str, in_use: InUse) -> None:
    """Undo `read_through`."""
    _live.discard(in_use)
    held = module.__dict__.get(_HELD, {})
    if held.get(attribute) is not in_use:
        return
    del held[attribute]
    if not held:
        del module.__dict__[_HELD]
        module.__dict__.pop(_LOOKS).remove()
        # If others have subclassed our class since, its properties give the parameter from now on.
        if "plain" in vars(type(module)):
            module.__class__ = type(module).plain


def _look_at_loaded(module: nn.Module, _: Any) -> None:
    """Let compiled code, which does not look by itself, use what was loaded."""
    for attribute, in_use in module.__dict__.get(_HELD, {}).items():
        raw = module._parameters.get(attribute)
        if raw is not None:
            in_use.loaded(raw)


def is_read_through(module: nn.Module) -> bool:
    """Whether a forward rule acts on a weight of this module."""
    return bool(module.__dict__.get(_HELD))


def brought_together(module: nn.Module, attribute: str, parameter: Any) -> torch.Tensor:
    """The whole weight that a layer with a sharded parameter uses; a collective call."""
    whole: torch.Tensor = parameter.full_tensor()
    in_use = module.__dict__.get(_HELD, {}).get(attribute)
    return whole if in_use is None else in_use.of_whole(whole)


class _Reading:
    """The base of the classes that layers get."""

    plain: type[nn.Module]
    """The layer's own class."""
    attributes: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by way of the layer's own class, which can be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            make, arguments = _make, (self.plain, self.attributes, *arguments[1:])
        return (make, arguments, *rest)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Answer plainly while torch checks if the name is taken, but not to other threads."""
        in_use = self.__dict__.get(_HELD, {}).get(name)
        if in_use is not None:
            in_use.asked_by = get_ident()
        try:
            super().register_parameter(name, param)  # type: ignore[misc]
        finally:
            if in_use is not None:
                in_use.asked_by = None

    def __prepare_scriptable__(self) -> Any:
        names = ", ".join(in_use.name for in_use in self.__dict__.get(_HELD, {}).values())
        raise AdapterError(
            f"torch.jit.script cannot compile what computes {names} in each forward pass: "
            f"attachment.detach(fold=True) writes the weights in use into the parameters first "
            f"(torch.jit.trace, torch.compile and torch.export work as they are)"
        )


class _Recurrent(_Reading):
    """For recurrent layers, which keep their weights in a list: it is made when it is read."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        del weights

    def _update_flat_weights(self) -> None:
        """Nothing to do: the list is never out of date."""

    def flatten_parameters(self) -> None:
        """Nothing to do: weights in use have no fixed memory that could be laid out."""


def _property(attribute: str) -> property:
    def read(self: Any) -> Any:
        # Replicas of DataParallel hold plain tensors.
        raw = self._parameters.get(attribute)
        raw = self.__dict__.get(attribute) if raw is None else raw
        in_use = self.__dict__.get(_HELD, {}).get(attribute)
        if raw is None and attribute not in self._parameters and attribute not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
        if in_use is None or raw is None:
            return raw
        try:
            return in_use(raw)
        except AttributeError as error:
            # Python would take it for a missing attribute, and give the raw parameter instead.
            raise AdapterError(f"{in_use.name}: {in_use.rule!r} failed: {error}") from error

    def write(self: Any, value: Any) -> None:
        # Not for parameters, which torch.nn.Module sets itself before Python calls this.
        self.__dict__[attribute] = value

    def delete(self: Any) -> None:
        self.__dict__.pop(attribute, None)

    return property(read, write, delete)


@cache
def _reading(plain: Any, attributes: tuple[str, ...]) -> type[nn.Module]:
    common = _Recurrent if issubclass(plain, nn.RNNBase) else _Reading
    names = ("__module__", "__qualname__", "__doc__")
    entries: dict[str, Any] = {name: getattr(plain, name) for name in names}
    entries |= {"plain": plain, "attributes": attributes}
    entries |= {attribute: _property(attribute) for attribute in attributes}
    return type(plain.__name__, (common, plain), entries)


def _make(plain: Any, attributes: tuple[str, ...], *arguments: Any) -> Any:
    kind = _reading(plain, attributes)
    return kind.__new__(kind, *arguments)
