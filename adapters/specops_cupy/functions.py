"""The core functions, for CuPy arrays on any of several devices.

They compute what the functions of the same names in `specops` compute, which take CuPy arrays
as well. What is added is that the array's own device is made the current one, where constants
and work space go, and that an array of another library is refused instead of being measured on
the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import specops
from specops.errors import UnsupportedArrayError
from specops_cupy.device import on_device_of, require

F = TypeVar("F", bound=Callable[..., Any])


def _on_device(function: F) -> F:
    name = function.__name__

    @functools.wraps(function)
    def wrapped(w: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(w, require().ndarray):
            raise UnsupportedArrayError(
                f"expected a CuPy array, got {type(w).__module__}.{type(w).__name__}: "
                f"specops.{name} takes it where it is, cupy.asarray moves it to the device"
            )
        with on_device_of(w):
            return function(w, *args, **kwargs)

    return cast(F, wrapped)


clip_singular_values = _on_device(specops.clip_singular_values)
condition_number = _on_device(specops.condition_number)
effective_rank = _on_device(specops.effective_rank)
linear_operator = _on_device(specops.linear_operator)
polar_factor = _on_device(specops.polar_factor)
project_schatten_ball = _on_device(specops.project_schatten_ball)
project_spectral_ball = _on_device(specops.project_spectral_ball)
project_stable_rank = _on_device(specops.project_stable_rank)
singular_values = _on_device(specops.singular_values)
spectral_norm = _on_device(specops.spectral_norm)
spectral_norm_bounds = _on_device(specops.spectral_norm_bounds)
stable_rank = _on_device(specops.stable_rank)
top_singular_triplets = _on_device(specops.top_singular_triplets)
