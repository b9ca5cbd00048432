"""Products with vectors, and the warnings they leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops.arrays.products import coimages, images
from specops.maps.matrix import MatrixOperator
from tests.backends import Backend

# One column of zeros: an infinite entry against it is an invalid operation.
MATRIX = [[0.0, 1.0, 2.0, 0.0, 1.0], [0.0, 2.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("operator", [MatrixOperator, specops.linear_operator])
def test_products_are_those_of_the_matrix(
    backend: Backend, operator: Any, rng: np.random.Generator
) -> None:
    a, x, y = (rng.standard_normal(size) for size in ((3, 5), (2, 5), (2, 3)))
    of = operator(backend.array(a, "float32"))
    forward = backend.numpy(of.matvec(backend.array(x, "float32")))
    np.testing.assert_allclose(forward, x @ a.T, rtol=1e-5, atol=1e-5)
    back = backend.numpy(of.rmatvec(backend.array(y, "float32")))
    np.testing.assert_allclose(back, y @ a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["images", "coimages", "operator", "solver"])
def test_numpy_does_not_warn_of_lanes_that_hold_no_number(backend: Backend, name: str) -> None:
    """Its flag is raised on purpose here; BLAS raises it with finite matrices as well."""
    w = backend.array(MATRIX, "float32")
    x = backend.array([np.inf, 1.0, 1.0, 1.0, 1.0], "float32")
    y = backend.array([1.0, np.inf, np.inf], "float32")
    got = {
        "images": lambda: images(w, x[None, ...]),
        "coimages": lambda: coimages(w, y[None, ...]),
        "operator": lambda: specops.linear_operator(w).matvec(x),
        "solver": lambda: MatrixOperator(w).rmatvec(y),
    }[name]()
    assert np.isnan(backend.numpy(got)).any()


def test_large_matrices_of_torch_by_blocks_of_rows() -> None:
    torch = pytest.importorskip("torch")
    a, x, y = (torch.randn(*s, dtype=torch.float64) for s in ((512, 300), (2, 300), (2, 512)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(images(a, x), x @ a.T)
        torch.testing.assert_close(coimages(a, y), y @ a)
    finally:
        torch.set_num_threads(threads)
