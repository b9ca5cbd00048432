"""Arrays passed to torch and back without a copy (DLPack)."""

from __future__ import annotations

import sys
from importlib import import_module, util
from typing import Any

from specops.errors import AdapterError, UnsupportedArrayError
from specops.typing import Array
from specops_cupy.device import on_device_of, require

Tensor = Any


def from_torch(tensor: Tensor) -> Array:
    """A CuPy array on the memory of a torch tensor.

    Parameters
    ----------
    tensor : torch.Tensor or Parameter, shape (...)
        On a CUDA device, dense. One that requires a gradient is shared without its graph.

    Returns
    -------
    cupy.ndarray
        Of the same shape, strides and dtype, on the same device.

    Raises
    ------
    AdapterError
        CuPy cannot be used here, the tensor is on another kind of device, or sharded.
    UnsupportedArrayError
        No tensor, a layout other than strided, a dtype that CuPy lacks (bfloat16), or a
        conjugation or negation that torch has put off.

    Warnings
    --------
    Both are the same memory: writing to one changes the other. torch does not notice what CuPy
    writes. Between a forward and its backward pass that gives wrong gradients without an error,
    so write only after the optimizer's step.

    Notes
    -----
    Streams: the array may be read at once on the stream that is CuPy's current one during this
    call; torch's own current stream is waited for (on the device, not the host). No order is
    kept for anything queued later. Either run both on one stream::

        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            ...

    or synchronise before the other side goes on.

    Lifetime: each side keeps the memory alive. torch gives it to others as soon as both are
    gone, in the order of its own stream, so keep the tensor until CuPy's work has finished.
    """
    cupy = require()
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        raise UnsupportedArrayError(
            f"expected a torch tensor, got {type(tensor).__module__}.{type(tensor).__name__}: "
            f"cupy.asarray or cupy.from_dlpack take other arrays"
        )
    if hasattr(tensor, "device_mesh"):
        raise AdapterError(
            "the tensor is sharded (DTensor): its local part is not the matrix. Gather it with "
            "full_tensor() first"
        )
    if tensor.device.type != "cuda":
        raise AdapterError(
            f"the tensor is on {tensor.device}, and CuPy cannot see that memory: move it with "
            f'tensor.to("cuda"), or copy it with cupy.asarray(tensor.numpy())'
        )
    problem = _why_not(torch, tensor)
    if problem:
        raise UnsupportedArrayError(problem)
    # torch exports tensors of its current device only.
    with torch.cuda.device(tensor.device):
        return cupy.from_dlpack(tensor.detach())


def to_torch(array: Array) -> Tensor:
    """A torch tensor on the memory of a CuPy array.

    Parameters
    ----------
    array : cupy.ndarray, shape (...)
        Of a dtype that torch has, without negative strides.

    Returns
    -------
    torch.Tensor
        Of the same shape, strides and dtype, on the same device, without a gradient.

    Raises
    ------
    AdapterError
        CuPy or torch cannot be used here.
    UnsupportedArrayError
        No CuPy array, or negative strides.

    Warnings
    --------
    Both are the same memory, as with `from_torch`, whose notes on streams and lifetimes hold
    with the sides exchanged: torch's current stream waits for CuPy's during this call and for
    nothing later.
    """
    cupy = require()
    if not isinstance(array, cupy.ndarray):
        raise UnsupportedArrayError(
            f"expected a CuPy array, got {type(array).__module__}.{type(array).__name__}: "
            f"torch.from_dlpack takes other arrays"
        )
    if any(stride < 0 for stride in array.strides):
        raise UnsupportedArrayError(
            f"torch has no negative strides, got {array.strides}: cupy.ascontiguousarray(array) "
            f"is a copy without"
        )
    if util.find_spec("torch") is None:
        raise AdapterError("torch is not installed: pip install 'specops[torch]'")
    # Imported here, because only this function needs torch.
    torch: Any = import_module("torch")
    with on_device_of(array):
        return torch.from_dlpack(array)


def _why_not(torch: Any, tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return f"the tensor's layout is {tensor.layout}: to_dense() is a copy that can be shared"
    if tensor.dtype == torch.bfloat16:
        return "CuPy has no bfloat16: tensor.float() is a copy that can be shared"
    if tensor.is_conj() or tensor.is_neg():
        return (
            "the tensor's conjugation or negation is put off: tensor.resolve_conj().resolve_neg() "
            "is a copy that can be shared"
        )
    return ""
