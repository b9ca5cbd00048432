"""Gram matrices, factorisations and scans in place: the numbers of the plain operations."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

from specops import backend
from specops.linalg.cholesky import has_cholesky
from specops.linalg.gram import below, gram
from specops.linalg.inside import inside

torch = pytest.importorskip("torch")

SHAPES = [(520, 530), (700, 515), (513, 1300), (40, 30)]


def matrix(shape: tuple[int, ...], dtype: str) -> Any:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape)
    if "complex" in dtype:
        values = values + 1j * rng.standard_normal(shape)
    return torch.asarray(values.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lower_triangles_are_those_of_the_gram_matrix(shape: tuple[int, int], dtype: str) -> None:
    a = matrix(shape, dtype)
    xp = compat.array_namespace(a)
    values = a.numpy().astype(np.result_type(dtype, np.float64))
    adjoint = values.conj().T
    exact = values @ adjoint if shape[0] <= shape[1] else adjoint @ values
    tolerance = 20 * np.finfo(dtype).eps * shape[0] * shape[1] ** 0.5
    assert np.abs(np.tril(gram(xp, a).numpy() - exact)).max() < tolerance
    limit = torch.asarray(3.0, dtype=backend.real_dtype(xp, a.dtype))
    for double in {a.dtype, backend.double_dtype(xp, a)}:
        shifted = below(xp, a, limit, double)
        assert shifted.dtype == double
        expected = 9.0 * np.eye(len(exact)) - exact
        close = 20 * torch.finfo(double).eps * shape[0] * shape[1] ** 0.5
        assert np.abs(np.tril(shifted.numpy()) - np.tril(expected)).max() < close


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("size", [30, 256, 299, 640])
@pytest.mark.parametrize("at", [0.0, 0.4, 1.0], ids=["first", "middle", "last"])
def test_only_positive_definite_matrices_have_a_factor(dtype: str, size: int, at: float) -> None:
    a = matrix((size, size), dtype)
    xp = compat.array_namespace(a)
    positive = a @ backend.adjoint(xp, a) / size + torch.eye(size, dtype=a.dtype)
    factor = torch.linalg.cholesky(positive)
    row = round(at * (size - 1))
    # Up to its row the matrix is L D Lᴴ with ones but for one number in D.
    for number, expected in ((1e-3, True), (-1e-3, False)):
        d = torch.ones(size, dtype=a.dtype)
        d[row] = number
        middle = (factor * d) @ backend.adjoint(xp, factor)
        above = torch.full_like(middle, math.nan).triu(1)
        poisoned = torch.where(torch.isnan(above.real), above, middle)
        assert bool(has_cholesky(xp, poisoned)) is expected


@pytest.mark.parametrize("shape", [(520, 600), (600, 520)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_inside_is_sharp_to_double_precision(shape: tuple[int, int], dtype: str) -> None:
    a = matrix(shape, dtype)
    xp = compat.array_namespace(a)
    largest = float(torch.linalg.matrix_norm(a.to(backend.double_dtype(xp, a)), 2))
    for factor, expected in ((1 + 1e-10, True), (1 - 1e-10, False)):
        limit = torch.asarray(largest * factor, dtype=torch.float64)
        for sharp in (True, False):
            assert bool(inside(xp, a, limit, sharp=sharp)) is expected
    kept = a.clone()
    inside(xp, a, torch.asarray(largest, dtype=torch.float64))
    assert torch.equal(a, kept)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [None, (-2, -1), -1])
def test_scans_of_torch_tensors_are_those_of_numpy(bad: float | None, axis: Any) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    if bad is not None:
        values[1, 2, 3] = bad
    tensor = torch.asarray(values)
    xp = compat.array_namespace(tensor)
    host = compat.array_namespace(values)
    for keepdims in (False, True):
        ours = backend.largest_entry(xp, tensor, axis, keepdims=keepdims).numpy()
        theirs = np.max(np.abs(values), axis=axis, keepdims=keepdims)
        np.testing.assert_array_equal(ours, theirs)
    ours = backend.all_finite(xp, tensor, axis).numpy()
    np.testing.assert_array_equal(ours, backend.all_finite(host, values, axis))
    assert bool(backend.all_finite(xp, tensor[:0]))
    half = tensor.to(torch.bfloat16)
    assert bool(backend.all_finite(xp, half)) is (bad is None)
