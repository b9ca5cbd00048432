"""Nearest points in half precision, by each method, and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.geometry import Geometry
from tests import oracle
from tests.backends import BACKENDS, Backend
from tests.core.nearest import (
    LAYERS,
    ROUNDING,
    SINGLE,
    clipped,
    dtypes_of,
    norm,
    normal,
    slowly,
    squared,
)

_STORED: list[tuple[tuple[int, ...], Geometry]] = [
    ((12, 9), Dense()),
    LAYERS[0],
    LAYERS[3],
    ((2, 4, 5), Dense((1,), batch_axes=(0,))),
]
HALF = [
    (library, dtype, shape, geometry)
    for library, dtype in (("torch", "float16"), ("torch", "bfloat16"), ("jax", "bfloat16"))
    # JAX compiles the stack no differently.
    for shape, geometry in (_STORED[:-1] if library == "jax" else _STORED)
]


def _half(library: str, dtype: str, values: np.ndarray) -> tuple[Any, np.ndarray]:
    """(an array in half precision, what it stores in double)."""
    if library == "torch":
        torch = pytest.importorskip("torch")
        w = torch.asarray(values).to(getattr(torch, dtype))
        return w, w.double().numpy()
    jnp = pytest.importorskip("jax.numpy")
    w = jnp.asarray(values).astype(dtype)
    return w, np.asarray(w).astype(np.float64)


def _double(x: Any) -> np.ndarray:
    return x.double().numpy() if hasattr(x, "double") else np.asarray(x).astype(np.float64)


@pytest.mark.parametrize(("library", "dtype", "shape", "geometry"), HALF)
def test_half_precision_is_nearest_as_stored(
    library: str, dtype: str, shape: tuple[int, ...], geometry: Geometry
) -> None:
    eps = 2.0**-10 if dtype == "float16" else 2.0**-7
    for scale in (2.0**-8, 2.0**8) if dtype == "float16" else (2.0**-60, 2.0**60):
        w, exact = _half(library, dtype, normal(shape, 33) * scale)
        bound = 0.5 * norm(exact, geometry)
        got, info = specops.project_spectral_ball(
            w, bound, geometry, gap_tolerance=1e-6, return_info=True
        )
        assert got.dtype == w.dtype
        result = _double(got)
        assert norm(result, geometry) <= bound * (1 + 1e-6)
        if isinstance(geometry, Conv):
            truth, error = slowly(exact / scale, geometry, bound / scale)
            truth, error = truth * scale, error * scale**2
        else:
            truth, error = clipped(oracle.dense_matrix(exact, geometry), bound), 0.0
            result, exact = (oracle.dense_matrix(x, geometry) for x in (result, exact))
        gap = float(np.max(_double(info.gap)))
        assert gap <= 2 * eps
        distance = np.sqrt(squared(result - truth))
        assert distance <= np.sqrt((gap + SINGLE) * squared(exact)) + np.sqrt(error)
        # Rounding, and the shrinking that undoes its excess, are all that was lost.
        assert distance <= 2.5 * eps * np.sqrt(squared(exact))
        again, info = specops.project_spectral_ball(got, bound, geometry, return_info=True)
        assert again is got
        assert info.iterations == 0


PRODUCTS: list[tuple[tuple[int, ...], Dense]] = [
    ((20, 20), Dense()),
    ((9, 24), Dense()),
    ((24, 9), Dense()),
    ((3, 8, 6), Dense((1,), batch_axes=(0,))),
]


@pytest.mark.parametrize("method", ["svd", "eigh", "products"])
def test_dense_methods_agree(eager: Backend, method: str) -> None:
    for shape, geometry in PRODUCTS[:1] if eager.name == "jax" else PRODUCTS:
        for dtype in dtypes_of(eager, "float32", "float64", "complex128"):
            check_dense_method(eager, shape, geometry, dtype, method)


def check_dense_method(
    eager: Backend, shape: tuple[int, ...], geometry: Dense, dtype: str, method: str
) -> None:
    """By the explicit matrices: feasible, nearest, and what was inside is untouched."""
    values = normal(shape, 34, complex=dtype == "complex128")
    w = eager.array(values, dtype)
    single = dtype == "float32" or not eager.doubles
    eps = 2.0 ** (-23 if single else -52)
    exact = oracle.dense_matrix(eager.numpy(w).astype(values.dtype), geometry)
    norms = np.linalg.norm(exact, 2, axis=(-2, -1))
    # Between the norms of a stack as well: then some are inside already.
    for bound in (0.95 * float(norms.min()), 0.2 * float(norms.min()), float(norms.mean()) * 0.99):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method=method, return_info=True
        )
        result = oracle.dense_matrix(eager.numpy(got).astype(values.dtype), geometry)
        truth = clipped(exact, bound)
        # In double the reference itself is off by some units, whichever BLAS computes it.
        room = 2 if single else 8
        assert np.linalg.norm(result, 2, axis=(-2, -1)).max() <= bound * (1 + room * eps)
        np.testing.assert_allclose(result, truth, atol=100 * eps * norms.max())
        error = np.sum(np.abs(result - truth) ** 2, axis=(-2, -1))
        whole = np.sum(np.abs(exact) ** 2, axis=(-2, -1))
        assert (error <= (eager.numpy(info.gap) + 64 * eps**2 * shape[-1]) * whole).all()
        assert (eager.numpy(info.gap) <= 100 * eps).all()
        np.testing.assert_allclose(eager.numpy(info.norm_before), norms, rtol=100 * eps)
        inside = norms <= bound * (1 - 1e-4)
        np.testing.assert_array_equal(result[inside], exact[inside])


COMPILED = [b for b in BACKENDS if b.traced]


@pytest.mark.parametrize("compiler", COMPILED, ids=repr)
@pytest.mark.parametrize(("shape", "geometry"), [LAYERS[1], LAYERS[8], ((5, 4), Dense())])
def test_compiled_points_are_nearest(
    compiler: Backend, shape: tuple[int, ...], geometry: Geometry
) -> None:
    w = normal(shape, 6)
    # Compiled, a torus around a small layer is constrained, as by the accelerated method.
    bound = 0.5 * norm(w, geometry, "accelerated")

    def both(x: Any) -> tuple[Any, Any]:
        point, info = specops.project_spectral_ball(
            x, bound, geometry, iterations=60, return_info=True
        )
        return point, info.gap

    point, gap = compiler.call(both, compiler.array(w))
    got, gap = compiler.numpy(point), float(compiler.numpy(gap))
    assert norm(got, geometry, "accelerated") <= bound * (1 + 1e-12)
    if isinstance(geometry, Conv):
        truth, error = slowly(w, geometry, bound, method="accelerated")
    else:
        truth, error = clipped(w, bound), 0.0
    assert gap <= 1e-8
    error = np.sqrt(error) + np.sqrt((gap + ROUNDING) * squared(w))
    assert np.sqrt(squared(got - truth)) <= error
