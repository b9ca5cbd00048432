"""The tensor that a layer under a forward rule answers with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class WeightInUse(torch.Tensor):
    """Read, it is the weight in use; what is written to it reaches the raw parameter.

    Initialisers, ``layer.weight.copy_(...)``, ``layer.weight[3:] = ...``, ``.data``, ``.grad``
    and ``.requires_grad`` so mean what they mean on the plain layer. Results of operations are
    plain tensors. A view of it, and ``out=`` of an operation, are of these numbers and not of
    the parameter.
    """

    # As torch.nn.Parameter: operations see a plain tensor, at no cost.
    __torch_function__ = nn.Parameter.__torch_function__
    raw: nn.Parameter

    @staticmethod
    def of(used: torch.Tensor, raw: nn.Parameter) -> WeightInUse:
        """The weight in use, computed from `raw`."""
        tensor: WeightInUse = used.as_subclass(WeightInUse)
        tensor.raw = raw
        return tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.detach().clone()


def _of_the_parameter(name: str) -> property:
    def read(self: WeightInUse) -> Any:
        return getattr(self.raw, name)

    def write(self: WeightInUse, value: Any) -> None:
        setattr(self.raw, name, value)

    def delete(self: WeightInUse) -> None:
        delattr(self.raw, name)

    return property(read, write, delete)


def _in_place(name: str) -> Any:
    def method(self: WeightInUse, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.raw, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in ("data", "grad"):
    setattr(WeightInUse, _name, _of_the_parameter(_name))


def _requires_grad(self: WeightInUse, value: bool) -> None:
    self.raw.requires_grad = value


_own: Any = torch.Tensor.requires_grad
_whether: Any = property(_own.__get__, _requires_grad)
WeightInUse.requires_grad = _whether
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
for _name in (
    "__setitem__",
    *(f"__i{name}__" for name in _OPERATORS),
    *(name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")),
):
    if hasattr(torch.Tensor, _name):
        setattr(WeightInUse, _name, _in_place(_name))
