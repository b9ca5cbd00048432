"""A layer answers its attribute with the weight in use.

The layer's class becomes a subclass of itself in which the attribute is a property: reading it
computes the weight in use from the raw parameter, which stays where it was, under its own name.
Nothing is put in and taken out around a forward pass, so it does not matter who reads the
weight, when, or in which thread.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from specops.errors import AdapterError
from specops_torch.in_use import InUse

_HELD = "_specops_in_use"
_live: WeakSet[InUse] = WeakSet()
"""Those of attachments; not those that came along when a model was copied."""


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
        # Others may have made a subclass of ours since; then the properties give the parameter.
        if "plain" in vars(type(module)):
            module.__class__ = type(module).plain


def is_read_through(module: nn.Module) -> bool:
    """Whether a forward rule acts on a weight of this module."""
    return bool(module.__dict__.get(_HELD))


def brought_together(module: nn.Module, attribute: str, parameter: Any) -> torch.Tensor:
    """The whole weight that a layer of a sharded parameter uses; a collective."""
    whole: torch.Tensor = parameter.full_tensor()
    in_use = module.__dict__.get(_HELD, {}).get(attribute)
    return whole if in_use is None else in_use.of_whole(whole)


class _Reading:
    """What the subclasses have in common."""

    plain: type[nn.Module]
    """The layer's own class."""
    attributes: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the layer's own class is copied and pickled, which others can import."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            make, arguments = _make, (self.plain, self.attributes, *arguments[1:])
        return (make, arguments, *rest)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Without the weight in use, which torch would compute to see whether the name is taken."""
        held = self.__dict__.get(_HELD, {})
        in_use = held.pop(name, None)
        try:
            super().register_parameter(name, param)  # type: ignore[misc]
        finally:
            if in_use is not None:
                held[name] = in_use

    def __prepare_scriptable__(self) -> Any:
        names = ", ".join(in_use.name for in_use in self.__dict__.get(_HELD, {}).values())
        raise AdapterError(
            f"torch.jit.script cannot compile what computes {names} in each forward pass: "
            f"attachment.detach(fold=True) writes the weights in use into the parameters first "
            f"(torch.jit.trace, torch.compile and torch.export work as they are)"
        )


class _Recurrent(_Reading):
    """Recurrent layers keep their weights in a list: theirs is made whenever it is read."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        del weights

    def _update_flat_weights(self) -> None:
        """The list is never out of date."""

    def flatten_parameters(self) -> None:
        """The weights in use have no memory of their own to be laid out in."""


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
            # Python would take it for a missing property, and give the raw parameter instead.
            raise AdapterError(f"{in_use.name}: {in_use.rule!r} failed: {error}") from error

    def write(self: Any, value: Any) -> None:
        # Parameters are set by torch.nn.Module before it comes to this.
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
