"""Kernels of so many taps that an operator takes them in parts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from specops import Conv, linear_operator
from specops.maps import convolution
from specops.maps.convolution import ConvOperator
from tests import oracle
from tests.backends import Backend, leave_to_others

LAYERS: list[tuple[tuple[int, ...], Conv]] = [
    ((4, 3, 3, 2), Conv((5, 4), stride=(2, 1), padding=1)),
    ((6, 2, 5), Conv((7,), groups=3, boundary="circular")),
    ((4, 3, 2, 2), Conv((3, 3), transposed=True, stride=2, layout="IO*")),
]


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
@pytest.mark.parametrize("at_once", [1, 100])
def test_products_in_parts_are_those_of_the_matrix(
    backend: Backend,
    shape: tuple[int, ...],
    geometry: Conv,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_to_others(backend, at_once > 1)
    monkeypatch.setattr(convolution, "_SEEN_AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    w = rng.standard_normal(shape)
    matrix = oracle.conv_matrix(w, geometry)
    x, y = rng.standard_normal((2, matrix.shape[1])), rng.standard_normal((2, matrix.shape[0]))
    given = backend.array(w)

    def products(w: object, x: object, y: object) -> tuple[object, object]:
        operator = linear_operator(w, geometry)
        return operator.matvec(x), operator.rmatvec(y)

    image, back = backend.call(products, given, backend.array(x), backend.array(y))
    atol = 1e-9 if backend.doubles else 1e-4
    np.testing.assert_allclose(backend.numpy(image), x @ matrix.T, atol=atol)
    np.testing.assert_allclose(backend.numpy(back), y @ matrix, atol=atol)


def test_the_gradient_in_parts_is_that_of_all_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, rng = Conv((5, 4), stride=(2, 1), padding=1), np.random.default_rng(1)
    w = rng.standard_normal((4, 3, 3, 2))
    operator = ConvOperator(geometry.kernel(w), geometry.sizes(w.shape))
    u, v = (rng.standard_normal(n) for n in operator.shape)
    whole = operator.gradient(u, v)
    monkeypatch.setattr(convolution, "_SEEN_AT_ONCE", 1)
    np.testing.assert_allclose(operator.gradient(u, v), whole, rtol=1e-12)


def test_what_the_taps_of_a_large_kernel_see_is_not_held_at_once() -> None:
    geometry = Conv((24, 24), groups=64)
    w = np.random.default_rng(1).standard_normal((64, 1, 25, 25)).astype("float32")
    operator = linear_operator(w, geometry)
    x = np.ones(operator.shape[1], "float32")
    tracemalloc.start()
    operator.rmatvec(operator.matvec(x))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 24²·25²·64 entries are 92 MB.
    assert peak < 60e6
