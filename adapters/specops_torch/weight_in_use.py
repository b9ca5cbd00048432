"""The tensor that a layer under a forward rule answers with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specops.training.cautions import caution


class WeightInUse(torch.Tensor):
    """The weight in use when it is read; writing to it writes to the raw parameter.

    So initialisers, ``layer.weight.copy_(...)``, ``layer.weight[3:] = ...``, ``.data``, ``.grad``,
    ``.requires_grad`` and hooks on gradients mean what they mean on the plain layer. Results of
    operations are plain tensors. A view of it, or its use as ``out=`` of an operation, has the
    memory of the weight in use, not of the parameter: what is written there is lost. A warning
    follows if the tensor itself was still held then (as by an initialiser), but not after
    ``layer.weight[0].fill_(...)``.
    """

    # As torch.nn.Parameter: operations see a plain tensor, at no cost.
    __torch_function__ = nn.Parameter.__torch_function__
    raw: nn.Parameter
    made: int

    @staticmethod
    def of(used: torch.Tensor, raw: nn.Parameter) -> WeightInUse:
        """The weight in use, computed from `raw`."""
        tensor: WeightInUse = used.as_subclass(WeightInUse)
        tensor.raw, tensor.made = raw, -1 if used.is_inference() else used._version
        return tensor

    def __del__(self) -> None:
        if self.made >= 0 and self._version > self.made:
            caution(
                f"numbers written into a view of a weight in use (shape {tuple(self.shape)}), or "
                f"by out= (as an embedding's max_norm does), are lost: write to the parameter, of "
                f"model.named_parameters(), or before attaching",
            )

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


def _method(name: str) -> Any:
    def method(self: WeightInUse, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.raw, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in ("data", "grad", "requires_grad"):
    setattr(WeightInUse, _name, _of_the_parameter(_name))


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
for _name in (
    "__setitem__",
    "register_hook",
    "register_post_accumulate_grad_hook",
    *(f"__i{name}__" for name in _OPERATORS),
    *(name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")),
):
    if hasattr(torch.Tensor, _name):
        setattr(WeightInUse, _name, _method(_name))
