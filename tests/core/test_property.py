"""Random geometries against the explicit matrix: 300 of them, SPECOPS_CASES for more."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import assume, given, settings

import specops
from tests import oracle
from tests.backends import BACKENDS
from tests.strategies import Case, convolutions

CASES = int(os.environ.get("SPECOPS_CASES", "300"))
_EAGER = [b for b in BACKENDS if not b.traced and b.name in ("numpy", "torch")]
_STRICT = [b for b in BACKENDS if b.name.startswith("array_api_strict")]
_JAX = [b for b in BACKENDS if b.name.startswith("jax")]
_GPU = [b for b in BACKENDS if b.name in ("cupy", "torch-cuda")]


def check(case: Case, backend: object, dtype: str) -> None:
    w = case.weight()
    complex_dtype = {"float32": "complex64", "float64": "complex128"}[dtype]
    given = backend.array(w, complex_dtype if case.complex else dtype)  # type: ignore[attr-defined]
    host = backend.numpy(given)  # type: ignore[attr-defined]
    sigma = oracle.spectrum(host.astype(np.complex128 if case.complex else float), case.geometry)
    assume(sigma.size > 0)
    scale = sigma[0] or 1.0
    single = host.dtype in (np.float32, np.complex64)
    tolerance = (1e-5 if single else 1e-10) * scale
    call = backend.call  # type: ignore[attr-defined]
    values = backend.numpy(  # type: ignore[attr-defined]
        call(lambda x: specops.singular_values(x, case.geometry), given)
    )
    assert values.shape == sigma.shape
    assert np.abs(values - sigma).max() <= tolerance
    norm = float(call(lambda x: specops.spectral_norm(x, case.geometry), given))
    assert abs(norm - sigma[0]) <= tolerance

    def ends(x: object) -> object:
        bounds = specops.spectral_norm_bounds(x, case.geometry)
        return bounds.lower, bounds.upper

    lower, upper = (float(end) for end in call(ends, given))
    assert lower <= sigma[0] <= upper


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", [*_EAGER, *_GPU], ids=str)
def test_every_value(backend: object, dtype: str) -> None:
    @settings(max_examples=CASES)
    @given(convolutions())
    def run(case: Case) -> None:
        check(case, backend, dtype)

    run()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", _STRICT, ids=str)
def test_every_value_strictly(backend: object, dtype: str) -> None:
    share = 3 if str(backend).endswith("CPU_DEVICE") else 10

    @settings(max_examples=max(1, CASES // share))
    @given(convolutions())
    def run(case: Case) -> None:
        check(case, backend, dtype)

    run()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", _JAX, ids=str)
def test_every_value_compiled(backend: object, dtype: str) -> None:
    """JAX compiles each shape anew, which takes the time; NumPy and torch draw the many."""
    share = 60 if str(backend) == "jax" else 30

    @settings(max_examples=max(1, CASES // share))
    @given(convolutions())
    def run(case: Case) -> None:
        check(case, backend, dtype)

    run()
