"""The graph of a model's operations on its input, as `torch.fx` traces it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from specops.errors import AdapterError
from specops_torch.own_forward import computes_plainly, hook_of_others
from specops_torch.sizes import unrecorded

_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_HALF = (torch.float16, torch.bfloat16)
HINT = "Compute its factor, and give those of all layers to specops.measures.lipschitz_upper_bound"


@dataclass(frozen=True)
class Operations:
    """A graph, and the tensors in it that do not depend on the input."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]


def operations_of(model: nn.Module) -> Operations:
    """The graph of a model; attributes that tracing sets on its modules are restored."""
    check_hooks(type(model).__name__, model)
    called = type(model).__call__ is nn.Module.__call__
    if not called or not _wraps(vars(model).get("forward"), type(model)):
        raise AdapterError(
            f"{type(model).__name__} is called in a way of its own, which torch.fx does not see: a "
            f"forward set on the object, or a __call__. {HINT}"
        )
    tracer = _Tracer()
    if computes_plainly(model):
        graph = fx.Graph()
        graph.output(graph.call_module("", (graph.placeholder("input"),)))
        return Operations(graph, {})
    defaults = _defaults(model)
    try:
        with _restored(model):
            graph = tracer.trace(model, concrete_args=defaults)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(
            f"torch.fx cannot follow {type(model).__name__}: {str(error).splitlines()[0]}. {HINT}"
        ) from error
    return Operations(graph, tracer.constants)


def output_of(model: nn.Module, x: torch.Tensor) -> tuple[Any, bool]:
    """(the model's own output, whether half precision occurred); the model is restored."""
    with _restored(model), unrecorded(model.modules()), _Dtypes() as met:
        return model(x), met.half


class _Dtypes(TorchFunctionMode):
    """Notices results in half precision, also where autocast makes them."""

    half = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        self.half |= isinstance(found, torch.Tensor) and found.dtype in _HALF
        return found


def _wraps(forward: Any, kind: Any) -> bool:
    """Whether a forward set on an object only wraps its class's (by `functools.wraps`)."""
    found = None if forward is None else inspect.unwrap(forward)
    return found is None or getattr(found, "__func__", found) is inspect.unwrap(kind.forward)


def check_hooks(name: str, module: nn.Module) -> None:
    """Raise if a third-party hook may change what a module computes."""
    hook = hook_of_others(module)
    if hook is not None:
        raise AdapterError(
            f"{name} has a hook, {hook!r}: its Lipschitz constant is not known. {HINT}"
        )


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The defaults of all arguments of a forward pass except the first."""
    given = list(inspect.signature(model.forward).parameters.values())
    rest = [p for p in given[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in rest if p.default is p.empty]
    if needed or not given:
        raise AdapterError(
            f"{type(model).__name__} takes {', '.join(needed) or 'no input'}: the bound is of "
            f"models that map one tensor to one. Wrap it, and fix the other arguments"
        )
    return {p.name: p.default for p in rest}


class _Proxy(fx.Proxy):
    """Records in-place operators (``+=``), which also change other views of the tensor."""


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def call(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


for _name in _IN_PLACE:
    setattr(_Proxy, f"__i{_name}__", _in_place(f"i{_name}"))


class _Tracer(fx.Tracer):
    """A tracer with torch's modules as single operations, and existing tensors as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[str, torch.Tensor] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if computes_plainly(m):
            name = f"{module_qualified_name} ({type(m).__name__})"
            check_hooks(name, m)
            if m.training:
                raise AdapterError(f"{name}: the forward pass puts it into training. {HINT}")
            return True
        return False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Parameters as tensors: what is computed from them alone is a constant, too.
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            name = f"constant {len(self.constants)}"
            self.constants[name] = a.detach()
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore attributes afterwards: a traced forward pass may set them to proxies."""
    held = [
        space
        for module in model.modules()
        for space in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    before: list[dict[str, Any]] = [dict(space) for space in held]
    try:
        yield
    finally:
        for space, known in zip(held, before, strict=True):
            if list(map(id, space.values())) != list(map(id, known.values())):
                space.clear()
                space.update(known)
