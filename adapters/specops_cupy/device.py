"""Whether CuPy can be used here, and on which device an array's work belongs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, util
from typing import Any

from specops.errors import AdapterError


def find() -> tuple[Any, str]:
    """(cupy or None, its version and device, or why it cannot be used).

    Without a device the wheel can be imported; only allocations fail, with a driver's message.
    """
    if util.find_spec("cupy") is None:
        return None, "cupy is not installed: pip install 'specops[cupy]'"
    try:
        with warnings.catch_warnings():
            # It warns if it does not find a toolkit, which is no failure.
            warnings.simplefilter("ignore")
            cupy: Any = import_module("cupy")
        usable = cupy.cuda.is_available()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, (
            f"cupy is installed, but does not load ({type(error).__name__}: {first}): install "
            f"the wheel of this machine's CUDA version"
        )
    if not usable:
        return None, (
            f"cupy {cupy.__version__} is installed, but there is no device that it can use: "
            f"look for a GPU and a driver as new as its CUDA version (nvidia-smi)"
        )
    return cupy, f"cupy {cupy.__version__}, {_devices(cupy)}"


def require() -> Any:
    """The cupy module; raises `AdapterError` with the remedy if it cannot be used."""
    cupy, detail = find()
    if cupy is None:
        raise AdapterError(detail)
    return cupy


@contextmanager
def on_device_of(x: Any) -> Iterator[None]:
    """Make the device of `x` the current one, on which CuPy allocates new arrays."""
    device: Any = getattr(x, "device", None)
    if hasattr(device, "__enter__"):
        with device:
            yield
    else:
        yield


def _devices(cupy: Any) -> str:
    runtime = cupy.cuda.runtime
    count = int(runtime.getDeviceCount())
    name = runtime.getDeviceProperties(0)["name"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    return f"{count} × {name}" if count > 1 else name
