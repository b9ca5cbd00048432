"""Structured kernels on random geometries against the explicit matrix in double precision.

200 on each library, SPECOPS_CASES for more. Normal kernels, which test_property draws, have
well-separated values and never show what nearly equal ones do to an iteration.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import specops
from specops import Conv, Dense
from specops.linalg.golub_kahan import largest_singular_triplet
from specops.linalg.lanczos import lanczos
from specops.maps.convolution import ConvOperator
from specops.maps.matrix import MatrixOperator
from specops.tracking import track
from tests import oracle, structured
from tests.backends import BACKENDS, Backend, leave_to_others
from tests.strategies import Case, convolutions

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("SPECOPS_CASES", "200"))
_LIBRARIES = [b for b in BACKENDS if b.name in ("numpy", "torch", "jax", "cupy", "torch-cuda")]


@st.composite
def _matrices(draw: Any) -> Case:
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    return Case(Dense(), shape, False, draw(st.integers(0, 2**16)))


def _check(backend: Backend, case: Case, w: np.ndarray, dtype: str) -> None:
    given_ = backend.array(w, dtype)
    host = backend.numpy(given_).astype(float)
    sigma = oracle.spectrum(host, case.geometry)
    assume(sigma.size > 0)
    unit = sigma[0] or 1.0
    tolerance = 1e-5 if dtype == "float32" else 1e-10

    values = backend.numpy(specops.singular_values(given_, case.geometry))
    assert values.shape == sigma.shape
    assert np.abs(values - sigma).max() <= tolerance * unit
    norm = float(specops.spectral_norm(given_, case.geometry))
    assert abs(norm - sigma[0]) <= tolerance * unit
    # What is called a lower bound is none by rounding only.
    assert norm <= sigma[0] * (1 + tolerance)
    bounds = specops.spectral_norm_bounds(given_, case.geometry)
    assert float(bounds.lower) <= sigma[0] <= float(bounds.upper)
    rank = float(specops.stable_rank(given_, case.geometry))
    truth = float(np.sum((sigma / unit) ** 2))
    assert abs(rank - truth) <= 10 * tolerance * max(truth, 1.0)
    for share in (0.6, 1.0):
        cap = share * unit
        new = backend.numpy(
            specops.project_spectral_ball(given_, cap, case.geometry, distance_tolerance=0.5)
        )
        after = oracle.spectrum(new.astype(float), case.geometry)[0]
        assert after <= cap * (1 + tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", _LIBRARIES, ids=str)
def test_agrees_with_the_explicit_matrix(backend: Backend, dtype: str) -> None:
    # JAX compiles each shape anew, which is what takes the time.
    share = 20 if backend.name == "jax" else 2

    @settings(max_examples=max(1, CASES // share))
    @given(
        st.one_of(convolutions(), convolutions(), convolutions(), _matrices()),
        st.sampled_from(list(structured.KINDS)),
        st.sampled_from([1.0, 1.0, 1e-18, 1e18]),
        st.booleans(),
    )
    def run(case: Case, kind: str, scale: float, loud: bool) -> None:
        _check(backend, case, structured.weight(case, kind, scale, loud), dtype)

    run()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize("grid", [7, 9])
def test_norm_of_orthogonal_convolutions(
    backend: Backend, grid: int, scale: float, dtype: str
) -> None:
    """Too large to be decomposed, so iterated: every value is within rounding of the largest."""
    if dtype == "float64" and not backend.doubles:
        pytest.skip("no double precision")
    leave_to_others(backend, grid == 9)
    geometry = Conv((grid, grid), padding=1)
    for seed in range(6 if backend.name in ("numpy", "torch") else 1):
        rng = np.random.default_rng(seed)
        w = scale * structured.orthogonal(rng, 8, 8, (3, 3))
        found = backend.call(lambda x: specops.spectral_norm(x, geometry), backend.array(w, dtype))
        assert abs(float(found) / scale - 1) <= 1e-5


@pytest.mark.parametrize(
    ("channels", "points", "padding"),
    [((4, 1), (192,), (1,)), ((4, 4), (103,), (2,)), ((4, 4), (43, 89), (7, 0))],
)
def test_norm_of_a_kernel_whose_leader_the_start_hardly_sees(
    backend: Backend,
    channels: tuple[int, int],
    points: tuple[int, ...],
    padding: tuple[int, ...],
) -> None:
    """Signs that alternate along each axis: the largest values are close, and differ in symmetry.

    The map is a Kronecker product, so that its norm is the product of the factors'.
    """
    norm, kernel = math.sqrt(math.prod(channels)), np.ones(channels)
    for axis, (n, p) in enumerate(zip(points, padding, strict=True)):
        taps = (-1.0) ** np.arange((8, 2)[axis] if len(points) > 1 else 3)
        shape = (n + 2 * p - len(taps) + 1, n + 2 * p)
        rows = sum(t * np.eye(*shape, k=k) for k, t in enumerate(taps))
        norm *= np.linalg.norm(rows[:, p : p + n], 2)
        kernel = kernel[..., None] * taps
    geometry = Conv(points, padding=padding)
    w = backend.array(kernel, "float32")
    found = backend.call(lambda x: specops.spectral_norm(x, geometry), w)
    assert abs(float(found) / norm - 1) <= 1e-5


def _operators() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    n = 80
    two = np.r_[np.full(n // 2, 2.0), np.full(n // 2, 1.0)]
    u, v = structured.isometry(rng, n, n), structured.isometry(rng, n, n)
    return {
        "identity": np.eye(n),
        "isometry": u,
        "permutation": np.eye(n)[rng.permutation(n)],
        "identity and permutation": np.eye(n) + np.eye(n)[rng.permutation(n)],
        "two values": (u * two) @ v.T,
        "tall isometry": structured.isometry(rng, n, 30),
        "one value apart": u + 1e-3 * np.outer(u[:, 0], v[0]),
        "zero": np.zeros((n, n)),
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", list(_operators()))
def test_golub_kahan_where_values_are_equal(eager: Backend, name: str, dtype: str) -> None:
    if dtype == "float64" and not eager.doubles:
        pytest.skip("no double precision")
    given_ = eager.array(_operators()[name], dtype)
    a = eager.numpy(given_).astype(float)
    true, eps = np.linalg.norm(a, 2), float(np.finfo(dtype).eps)
    for seed in range(3):
        start = eager.array(np.random.default_rng(seed).standard_normal(a.shape[1]), dtype)
        xp = specops.arrays.namespace(given_)
        u, s, v = largest_singular_triplet(xp, MatrixOperator(given_), start)
        u, s, v = eager.numpy(u).astype(float), float(s), eager.numpy(v).astype(float)
        assert true * (1 - max(1e3 * eps, 1e-9)) <= s <= true * (1 + 16 * eps)
        assert np.linalg.norm(a @ v - u * s) <= 64 * eps * true
        if true:
            assert np.linalg.norm(v) == pytest.approx(1.0, rel=64 * eps)


@pytest.mark.parametrize("complex_", [False, True])
def test_golub_kahan_restarts(backend: Backend, complex_: bool) -> None:
    """Of values as close as those of a long chain it needs several bases, and stops by itself."""
    n = 300
    rng = np.random.default_rng(0)
    phases = np.exp(1j * rng.uniform(0, 6, n)) if complex_ else rng.choice([-1.0, 1.0], n)
    values = np.cos(np.linspace(0, 3.0, n)) + 2
    dtype = "complex64" if complex_ else "float32"
    given_ = backend.array(structured.isometry(rng, n, n) * values * phases, dtype)
    start = backend.array(rng.standard_normal(n), "float32")
    xp = specops.arrays.namespace(given_)
    start = xp.astype(start, given_.dtype)
    products = []

    class Counted(MatrixOperator):
        def matvec(self, x: Any) -> Any:
            products.append(1)
            return super().matvec(x)

    def norm(a: Any) -> Any:
        return largest_singular_triplet(xp, Counted(a), start)[1]

    found = float(backend.call(norm, given_))
    assert 3.0 * (1 - 1e-5) <= found <= 3.0 * (1 + 1e-6)
    # Where steps are compiled or traced they are not counted.
    assert len(products) < 400


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", list(_operators()))
def test_triplets_where_values_are_equal(
    eager: Backend, name: str, dtype: str, scale: float
) -> None:
    if dtype == "float64" and not eager.doubles:
        pytest.skip("no double precision")
    a, eps = _operators()[name], float(np.finfo(dtype).eps)
    start = eager.array(np.eye(a.shape[1])[:, :4], dtype)
    found = specops.top_singular_triplets(eager.array(scale * a, dtype), 3, start=start)[1]
    found = eager.numpy(found).astype(float) / scale
    wanted = np.linalg.svd(a, compute_uv=False)[:3]
    assert np.all(found <= wanted * (1 + 64 * eps))
    assert np.allclose(found, wanted, rtol=max(2e3 * eps, 1e-7), atol=1e-30)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "diagonal",
    [np.ones(60), np.r_[np.ones(30), -np.ones(30)], np.r_[np.ones(59), 1.001], np.zeros(60)],
    ids=["identity", "reflection", "one apart", "zero"],
)
def test_symmetric_lanczos_where_values_are_equal(
    eager: Backend, diagonal: np.ndarray, dtype: str
) -> None:
    if dtype == "float64" and not eager.doubles:
        pytest.skip("no double precision")
    q = structured.isometry(np.random.default_rng(0), 60, 60)
    a = eager.array((q * diagonal) @ q.T, dtype)
    exact = np.linalg.eigvalsh(eager.numpy(a).astype(float))
    eps = float(np.finfo(dtype).eps)
    for seed in range(4):
        start = eager.array(np.random.default_rng(seed).standard_normal(60), dtype)
        ritz = lanczos(lambda x: (a @ x[:, None])[:, 0], start, steps=60)
        assert exact.min() - 64 * eps <= ritz.values.min()
        assert ritz.values.max() <= exact.max() + 64 * eps
        assert ritz.values.max() >= exact.max() - 1e3 * eps
        # Every Ritz value has an eigenvalue within its residual.
        apart = np.abs(ritz.values[:, None] - exact[None, :]).min(axis=1)
        assert np.all(apart <= ritz.residuals + 64 * eps)


@pytest.mark.parametrize("complex_", [False, True])
def test_groups_of_equal_values(eager: Backend, complex_: bool) -> None:
    """One Krylov space for each group, all of them soon exhausted."""
    leave_to_others(eager, complex_)
    rng = np.random.default_rng(1)
    w = np.concatenate([structured.orthogonal(rng, 4, 4, (3, 3)) for _ in range(4)])
    if complex_:
        w = w * np.exp(1j * rng.standard_normal((16, 1, 1, 1)))
    geometry = Conv((9, 9), groups=4, padding=1)
    given_ = eager.array(w, "complex64" if complex_ else "float32")
    kernel, sizes = geometry.kernel(given_), geometry.sizes(tuple(given_.shape))
    start = eager.array(rng.standard_normal(sizes.matrix_shape()[1]), "float32")
    xp = specops.arrays.namespace(given_)
    if complex_:
        start = xp.astype(start, given_.dtype)
    _, s, _ = largest_singular_triplet(xp, ConvOperator(kernel, sizes), start)
    assert abs(float(s) - 1) <= 1e-5


def test_a_group_that_died_does_not_hide_the_norm(eager: Backend) -> None:
    """Weight decay leaves groups whose products with a vector have squares below all numbers."""
    geometry = Conv((5, 5), groups=2, padding=1)
    for seed in range(4):
        w = np.random.default_rng(seed).standard_normal((4, 1, 3, 3))
        w[2:] *= 1e-11
        found = track(geometry, "operator").start(eager.array(w, "float32"), "w")["sigma"]
        assert float(found) == pytest.approx(oracle.spectrum(w, geometry)[0], rel=1e-4)
