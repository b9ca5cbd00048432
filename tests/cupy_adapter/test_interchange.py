"""Handing arrays to torch and back: what is refused, and that nothing is copied."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specops.errors import AdapterError, UnsupportedArrayError
from specops_cupy import from_torch, to_torch
from tests.cupy_adapter.libraries import CUPY, absent, needs_device

torch = pytest.importorskip("torch")


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    @property
    def device(self) -> Any:
        return SimpleNamespace(type="cuda", index=1)

    def detach(self) -> Any:
        """On the host again, where it can be exported."""
        return super().detach().as_subclass(torch.Tensor)


class Sparse(OnDevice):
    """One that says it is sparse as well."""

    layout = torch.sparse_coo


@pytest.fixture
def current(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Devices that torch was told to make current."""
    told: list[Any] = []

    @contextlib.contextmanager
    def device(which: Any) -> Any:
        told.append(which.index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    return told


def on_device(values: Any) -> Any:
    return torch.as_tensor(values).as_subclass(OnDevice)


@pytest.mark.parametrize("parameter", [False, True])
def test_the_memory_is_shared(cupy: Any, current: list[Any], parameter: bool) -> None:
    plain = torch.arange(6.0).reshape(2, 3)
    tensor = plain.as_subclass(OnDevice)
    if parameter:
        tensor = torch.nn.Parameter(plain).as_subclass(OnDevice)
        assert tensor.requires_grad
    array = from_torch(tensor)
    assert isinstance(array, cupy.ndarray)
    array[0, 0] = 7.0
    assert plain[0, 0] == 7.0
    assert current == [1]
    back = to_torch(array)
    back[1, 2] = -1.0
    assert plain[1, 2] == -1.0
    assert back.data_ptr() == plain.data_ptr()


def test_strides_are_kept(cupy: Any, current: list[Any]) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    array = from_torch(tensor.as_subclass(OnDevice))
    assert array.shape == (3, 2)
    assert array.strides == (4, 12)
    assert to_torch(array).stride() == tensor.stride()


@pytest.mark.parametrize(
    ("tensor", "kind", "remedy"),
    [
        (torch.ones(2), AdapterError, "asarray"),
        (on_device(torch.ones(2, dtype=torch.bfloat16)), UnsupportedArrayError, "float()"),
        (torch.eye(2).as_subclass(Sparse), UnsupportedArrayError, "to_dense"),
        (on_device(torch.ones(2, dtype=torch.complex64).conj()), UnsupportedArrayError, "resolve"),
        (np.ones(2), UnsupportedArrayError, "cupy.asarray"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    cupy: Any, current: list[Any], tensor: Any, kind: type[Exception], remedy: str
) -> None:
    with pytest.raises(kind) as caught:
        from_torch(tensor)
    assert remedy in str(caught.value)


def test_sharded_tensors_are_refused(cupy: Any) -> None:
    tensor = torch.ones(2)
    tensor.device_mesh = object()
    with pytest.raises(AdapterError, match="full_tensor"):
        from_torch(tensor)


def test_only_cupy_arrays_become_tensors(cupy: Any) -> None:
    with pytest.raises(UnsupportedArrayError, match=r"numpy\.ndarray.*torch\.from_dlpack"):
        to_torch(np.ones(2))
    with pytest.raises(UnsupportedArrayError, match="ascontiguousarray"):
        to_torch(cupy.asarray(np.ones(3))[::-1])


def test_without_torch(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from specops_cupy import interchange

    array = cupy.asarray(np.ones(2))
    monkeypatch.setattr(interchange, "util", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(AdapterError, match=r"specops\[torch\]"):
        to_torch(array)
    others = {name: module for name, module in sys.modules.items() if name != "torch"}
    monkeypatch.setattr(sys, "modules", others)
    with pytest.raises(UnsupportedArrayError, match="expected a torch tensor"):
        from_torch(np.ones(2))


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (from_torch, to_torch):
        with absent(monkeypatch), pytest.raises(AdapterError, match=r"specops\[cupy\]"):
            function(torch.ones(2))


@needs_device
def test_on_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    for dtype in (torch.float16, torch.float32, torch.float64, torch.complex64, torch.int32):
        tensor = torch.arange(6, device="cuda").reshape(2, 3).to(dtype).T
        array = from_torch(tensor)
        assert (array.shape, array.data.ptr) == ((3, 2), tensor.data_ptr())
        array[...] = array + 1
        CUPY.cuda.get_current_stream().synchronize()
        assert tensor.cpu()[0, 0] == 1
        back = to_torch(array)
        assert (back.data_ptr(), back.dtype) == (tensor.data_ptr(), dtype)
        back.zero_()
        torch.cuda.synchronize()
        assert not array.any()
    with pytest.raises(UnsupportedArrayError, match="bfloat16"):
        from_torch(torch.ones(2, device="cuda", dtype=torch.bfloat16))
