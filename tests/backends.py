"""The array libraries that every core test runs on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

from specops.arrays.kinds import OLDEST

REQUIRED = ("numpy", "array_api_strict", "torch", "jax")


@dataclass(frozen=True)
class Backend:
    """One library, on one device, eager or compiled."""

    name: str
    convert: Callable[[np.ndarray], Any]
    doubles: bool = True
    traced: bool = False

    def __repr__(self) -> str:
        return self.name

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """A host array on this backend."""
        values = np.asarray(values, dtype=dtype)
        if not self.doubles:
            values = values.astype({"f": np.float32, "c": np.complex64}[values.dtype.kind])
        return self.convert(values)

    def call(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """The function's value; compiled, where this backend compiles."""
        if self.traced:
            import jax

            return jax.jit(function)(*arrays)
        return function(*arrays)

    def numpy(self, x: Any) -> np.ndarray:
        """Back on the host, any dtype and device."""
        if compat.is_torch_array(x):
            return x.detach().cpu().to(_widened(x)).numpy()
        if compat.is_cupy_array(x):
            return x.get()
        if not isinstance(x, np.ndarray | np.generic) and not compat.is_jax_array(x):
            xp = compat.array_namespace(x)
            x = compat.to_device(x, xp.__array_namespace_info__().default_device())
        return np.asarray(x)

    def same_kind(self, result: Any, given: Any, dtype: Any = None) -> None:
        """Assert namespace, device and dtype: those of `given` unless `dtype` is named."""
        assert compat.array_namespace(result) is compat.array_namespace(given)
        if not self.traced:
            assert compat.device(result) == compat.device(given)
        expected = given.dtype if dtype is None else dtype
        assert result.dtype == expected


def _widened(x: Any) -> Any:
    import torch

    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


def available() -> tuple[list[Backend], dict[str, str]]:
    """Backends that work here, and why the others do not."""
    found = [Backend("numpy", _read_only)]
    missing: dict[str, str] = {}
    try:
        import array_api_strict as strict
    except ImportError as error:
        missing["array_api_strict"] = str(error)
    else:
        # What the oldest version has, later ones have too.
        strict.set_array_api_strict_flags(api_version=OLDEST)
        for device, doubles in (("CPU_DEVICE", True), ("device1", True), ("no_x64", False)):
            on = strict.Device(device)
            found.append(
                Backend(
                    f"array_api_strict-{device}",
                    lambda v, on=on: strict.asarray(v, device=on),
                    doubles,
                )
            )
    try:
        import torch
    except ImportError as error:
        missing["torch"] = str(error)
    else:
        found.append(Backend("torch", lambda v: torch.asarray(np.array(v))))
        if torch.cuda.is_available():
            found.append(Backend("torch-cuda", lambda v: torch.asarray(np.array(v)).cuda()))
    try:
        import jax
    except ImportError as error:
        missing["jax"] = str(error)
    else:
        jax.config.update("jax_enable_x64", True)
        found.append(Backend("jax", jax.numpy.asarray))
        found.append(Backend("jax-jit", jax.numpy.asarray, traced=True))
    try:
        import cupy
    except ImportError:
        missing["cupy"] = "cupy is not installed"
    else:
        if cupy.cuda.is_available():
            found.append(Backend("cupy", cupy.asarray))
        else:
            missing["cupy"] = "no CUDA device"
    return found, missing


BACKENDS, MISSING = available()
if os.environ.get("CI") and (lost := [name for name in REQUIRED if name in MISSING]):
    raise RuntimeError(f"required backends are missing: {lost}: {MISSING}")


EVERY_CASE = "SPECOPS_CASES" in os.environ
"""Whether to spare nothing: JAX compiles each operation for each new shape, the strict library
checks each, and both run the lines that NumPy and torch run on all cases."""
SAMPLED = {"jax": 2, "jax-jit": 6, "jax_eager_gradient": 3, "array_api_strict-CPU_DEVICE": 4} | {
    f"array_api_strict-{device}": 2 for device in ("device1", "no_x64")
}
"""Cases of one test that these run otherwise: backends, and ways to differentiate."""


def leave_to_others(backend: Backend, when: bool = True) -> None:
    """Skip a dear case on JAX without jit."""
    if when and backend.name == "jax" and not EVERY_CASE:
        pytest.skip("NumPy, torch and compiled JAX see this case")
