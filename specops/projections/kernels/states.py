"""States that solvers of kernels leave for the next call, from NumPy arrays and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from specops import arrays
from specops.typing import Array, State


def state_of(values: Mapping[str, np.ndarray], like: Array) -> State:
    """The values as arrays of the library and device of `like`."""
    return {
        key: arrays.constant(value, like, complex=value.dtype.kind == "c")
        for key, value in values.items()
    }


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled back to length 1, which storing may have changed by rounding; zeros stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1.0))
