"""The explicit matrix of a layer, from its forward pass alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops.geometry import Dense, Geometry
from specops.spectra import linear_operator
from specops.testing.cases import LayerCase

_BATCH = 512


def explicit_matrix(case: LayerCase) -> np.ndarray:
    """The layer applied to the unit vectors, minus its value at zero (a bias).

    Returns
    -------
    array, shape (outputs, inputs)
        In double precision; both sides flattened as the layer orders them.
    """
    inputs = math.prod(case.input_shape)
    offset = _applied(case, np.zeros((1, inputs)))
    columns = []
    for first in range(0, inputs, _BATCH):
        units = np.zeros((min(_BATCH, inputs - first), inputs))
        units[np.arange(len(units)), first + np.arange(len(units))] = 1.0
        columns.append(_applied(case, units) - offset)
    return np.concatenate(columns).T


def is_linear(case: LayerCase, matrix: np.ndarray, rtol: float) -> bool:
    """Whether the layer maps a random vector as the matrix does."""
    x = np.random.default_rng(0).standard_normal((1, matrix.shape[1]))
    y = _applied(case, x) - _applied(case, np.zeros_like(x))
    return bool(np.allclose(y[0], matrix @ x[0], rtol=0, atol=rtol * np.abs(y).max()))


def parts_of(matrix: np.ndarray, weight: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    """The explicit matrix divided into the maps of the geometry: one block for each split."""
    if not isinstance(geometry, Dense) or geometry.splits is None:
        return [matrix]
    stacked = math.prod([weight.shape[a] for a in geometry.batch_axes])
    total = sum(geometry.splits)
    if matrix.shape[0] != stacked * geometry.repeats * total:
        return [matrix]
    rows = matrix.reshape(stacked * geometry.repeats, total, matrix.shape[1])
    ends = np.cumsum(geometry.splits)[:-1]
    return [part.reshape(-1, matrix.shape[1]) for part in np.split(rows, ends, axis=1)]


def described(weight: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    """The matrices that specops reads in the weight; a stack becomes a block diagonal matrix."""
    operators: Any = linear_operator(np.asarray(weight, np.float64), geometry)
    result = []
    for operator in operators if isinstance(operators, tuple) else (operators,):
        matrix = np.asarray(operator.to_matrix())
        rows, columns = matrix.shape[-2:]
        stack = matrix.reshape(-1, rows, columns)
        diagonal = np.zeros((len(stack), rows, len(stack), columns))
        diagonal[np.arange(len(stack)), :, np.arange(len(stack))] = stack
        result.append(diagonal.reshape(len(stack) * rows, -1))
    return result


def _applied(case: LayerCase, x: np.ndarray) -> np.ndarray:
    batch = x.reshape(len(x), *case.input_shape).astype(np.float32)
    y = np.asarray(case.apply(batch), dtype=np.float64)
    if y.ndim == 0 or len(y) != len(x):
        raise ValueError(
            f"{case.label}: apply() returned an array of shape {y.shape} for a batch of {len(x)} "
            f"inputs: its first axis must be the batch"
        )
    return y.reshape(len(x), -1)
