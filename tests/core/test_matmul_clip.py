"""Clipping with products alone: the result, and the bound of its error, which must hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import array_api_compat as compat
import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specops.linalg import clip_by_products as matmul_clip
from specops.linalg import definite, matrix_sign, polar_express
from specops.linalg.clip_by_products import clip_by_products
from specops.linalg.polar_by_products import polar_by_products
from specops.linalg.rounding import product_rounding
from tests.backends import Backend


def matrices(spectra: Any, m: int, n: int, seed: int = 0, *, complex: bool = False) -> np.ndarray:
    """Random matrices with the given singular values (..., min(m, n))."""
    spectra = np.asarray(spectra, dtype=np.float64)
    rng = np.random.default_rng(seed)

    def orthonormal(rows: int) -> np.ndarray:
        x = rng.standard_normal((*spectra.shape[:-1], rows, spectra.shape[-1]))
        return np.linalg.qr(x + 1j * rng.standard_normal(x.shape) if complex else x)[0]

    return (orthonormal(m) * spectra[..., None, :]) @ orthonormal(n).conj().swapaxes(-1, -2)


def projected(w: np.ndarray, limit: Any) -> np.ndarray:
    """The nearest matrices of norm at most `limit`, in double precision."""
    u, s, vh = np.linalg.svd(w.astype("D" if np.iscomplexobj(w) else "d"), full_matrices=False)
    return (u * np.minimum(s, np.asarray(limit, np.float64)[..., None])[..., None, :]) @ vh


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x - y, axis=(-2, -1))


def spectra(size: int, top: float) -> np.ndarray:
    """Spectra with σ₁ = top, in units of the limit, that are hard for a sign or a root."""
    rng = np.random.default_rng(size)
    signs = rng.choice([-1.0, 1.0], size)
    rows = [
        np.linspace(0.0, top, size),
        np.full(size, top),
        np.ones(size),
        *(1.0 + signs * gap for gap in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)),
        np.where(np.arange(size) < size // 3, 0.5 * top, 0.0),
        np.zeros(size),
        np.repeat([top, 1.0, 0.3], -(-size // 3))[:size],
        top * np.logspace(0.0, -8.0, size),
    ]
    stacked = np.stack(rows)
    stacked[:, 0] = top
    return stacked


def clip(backend: Backend, w: np.ndarray, limit: Any, norms: Any) -> tuple[np.ndarray, np.ndarray]:
    given = backend.array(w)
    real = np.float64 if w.dtype in (np.float64, np.complex128) else np.float32
    arrays = (backend.array(np.asarray(v, dtype=real)) for v in (limit, norms))
    space = compat.array_namespace(given)
    x, error = backend.call(lambda *v: clip_by_products(space, *v), given, *arrays)
    backend.same_kind(x, given)
    assert error.shape == w.shape[:-2]
    return backend.numpy(x), backend.numpy(error)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_nearest_within_the_bound(backend: Backend, dtype: str) -> None:
    tops = np.asarray([1.0001, 1.1, 2.0])
    values = 3.0 * np.stack([spectra(12, top) for top in tops])
    w = matrices(values, 12, 17, complex=dtype == "complex128").astype(dtype)
    limit = np.full(w.shape[:-2], 3.0)
    x, error = clip(backend, w, limit, (limit * tops[:, None]) * (1.0 + 1e-6))
    if not backend.doubles:
        w = w.astype(np.complex64 if dtype.startswith("c") else np.float32)
    eps = np.finfo(x.dtype).eps
    oracle = 1e-14 * limit * np.sqrt(12)
    true = distance(x, projected(w, limit))
    assert np.all(true <= error + oracle)
    # A compiler cannot know that the ratio is at most 2.
    size = limit * np.sqrt(12)
    assert np.all(true <= (20 if backend.traced else 6) * eps * size + oracle)
    assert np.all(error <= 120 * eps * size)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (5, 1), (4, 9), (9, 4), (7, 7)])
def test_shapes(m: int, n: int) -> None:
    for complex in (False, True):
        w = matrices(np.linspace(2.0, 0.1, min(m, n)), m, n, complex=complex)
        x, error = clip_by_products(xp, w, np.asarray(1.0), np.asarray(2.0))
        assert error.shape == ()
        assert distance(x, projected(w, 1.0)) <= 1e-13
        assert error <= 1e-12


@pytest.mark.parametrize("ratio", [4.9, 8.0, 30.0, 100.0])
def test_far_outside_in_stages(ratio: float) -> None:
    w = matrices(spectra(9, ratio), 9, 9).astype(np.float32)
    norms = np.full(12, ratio * (1.0 + 1e-6), dtype=np.float32)
    x, error = clip_by_products(xp, w, np.ones(12, dtype=np.float32), norms)
    true = distance(x, projected(w, np.ones(12)))
    assert np.all(true <= error)
    assert np.all(true <= 2e-5)
    assert np.all(error <= 60 * ratio * np.finfo(np.float32).eps * 3.0)


def test_each_matrix_for_itself(backend: Backend) -> None:
    values = [[3, 1, 0.2], [0.9, 0.5, 0.1], [0, 0, 0], [8, 7, 0], [2, 1, 0], [2, 1, 0], [90, 9, 1]]
    w = matrices(values, 3, 4).astype(np.float32)
    w[4, 0, 0] = np.nan
    limit = np.asarray([1.5, 1.0, 0.5, 4.0, 1.0, 1.0, 1.0])
    norms = np.asarray(values)[:, 0] * (1.0 + 1e-6)
    norms[5] = np.inf
    x, error = clip(backend, w, limit, norms)
    inside, unknown = [1, 2], [4, 5]
    np.testing.assert_array_equal(x[inside + unknown], w[inside + unknown])
    np.testing.assert_array_equal(error[inside], 0.0)
    np.testing.assert_array_equal(error[unknown], np.inf)
    clipped = [0, 3]
    np.testing.assert_allclose(x[clipped], projected(w[clipped], limit[clipped]), atol=1e-5)
    assert np.all((error[clipped] > 0) & (error[clipped] < 3e-4))
    # Out of a single stage's reach, which is all that a compiler knows of.
    far = distance(x[6], projected(w[6], limit[6]))
    assert not error[6] < far
    if not backend.traced:
        assert far < 1e-5


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 9),
    values=st.lists(
        st.one_of(
            st.floats(0.0, 6.0),
            st.sampled_from([0.0, 1.0, 2.0, 1.0 + 1e-6, 1.0 - 1e-6, 1e-7]),
            st.floats(-1e-3, 1e-3).map(lambda gap: 1.0 + gap),
        ),
        min_size=1,
        max_size=9,
    ),
    excess=st.sampled_from([1e-6, 1e-3, 0.5]),
    limit=st.floats(0.1, 10.0),
    complex=st.booleans(),
    plain=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_bound_always_holds(
    m: int,
    values: list[float],
    excess: float,
    limit: float,
    complex: bool,
    plain: bool,
    seed: int,
) -> None:
    n = len(values)
    if plain:
        w = np.diag(values)[: min(m, n)]
    else:
        w = matrices(values[: min(m, n)], m, n, seed, complex=complex)
    w = (limit * w).astype(np.complex64 if complex else np.float32)
    c = np.asarray(limit, dtype=np.float32)
    norms = np.asarray(np.linalg.norm(w, 2) * (1.0 + excess), dtype=np.float32)
    x, error = clip_by_products(xp, w, c, norms)
    assert distance(x, projected(w, c)) <= error + 1e-14 * limit
    assert error <= 3e-4 * limit * 3.0


@pytest.mark.parametrize("fill", ["constant", "signs", "hadamard", "gaussian"])
@pytest.mark.parametrize("ratio", [1.001, 2.0, 4.9])
def test_the_bound_holds_where_rounding_errors_agree(fill: str, ratio: float) -> None:
    rng = np.random.default_rng(0)
    hadamard = np.ones((1, 1))
    while len(hadamard) < 256:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    w = {
        "constant": np.full((256, 256), 1.0 / 3.0),
        "signs": np.sign(rng.standard_normal((256, 200))),
        "hadamard": hadamard,
        "gaussian": rng.standard_normal((200, 256)),
    }[fill]
    w = (0.7 * ratio * w / np.linalg.norm(w, 2)).astype(np.float32)
    c, norms = np.float32(0.7), np.asarray(0.7 * ratio * (1.0 + 1e-5), dtype=np.float32)
    x, error = clip_by_products(xp, w, np.asarray(c), norms)
    true = distance(x, projected(w, c))
    assert true <= 0.5 * error
    assert error <= 3e-4 * ratio


def test_a_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.diag(np.asarray([2.0, 1.05, 0.95, 0.1]))
    limit, norms = np.asarray(1.0), np.asarray(2.0)
    right = clip_by_products(xp, w, limit, norms)[0]
    for wrong in range(4):
        flip = np.where(np.arange(4) == wrong, -1.0, 1.0)
        monkeypatch.setattr(
            matmul_clip,
            "polar_iteration",
            lambda xp, x, q, flip=flip: flip * matrix_sign.polar_iteration(xp, x, q),
        )
        x, error = clip_by_products(xp, w, limit, norms)
        assert distance(x, right) > 0.04
        assert error >= distance(x, right)


def test_a_sign_that_does_not_commute_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # An exact involution with a definite H: only the skew part of TS tells.
    w = np.diag([2.0, 0.1])
    cosine, sine = np.cos(0.01), np.sin(0.01)
    turn = np.asarray([[cosine, -sine], [sine, cosine]])
    monkeypatch.setattr(
        matmul_clip,
        "polar_iteration",
        lambda xp, x, q: turn @ matrix_sign.polar_iteration(xp, x, q) @ turn.T,
    )
    x, error = clip_by_products(xp, w, np.asarray(1.0), np.asarray(2.0))
    assert 1e-3 < distance(x, np.diag([1.0, 0.1])) <= error < 0.2


def test_errors_of_stages_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def once(xp: Any, reach: float, w: Any, limit: Any, ratio: Any) -> Any:
        limits.append(float(limit))
        return w, limit

    monkeypatch.setattr(matmul_clip, "_clip_once", once)
    _, error = clip_by_products(xp, 64.0 * np.eye(2), np.asarray(1.0), np.asarray(64.0))
    np.testing.assert_allclose(limits, [16.0, 4.0, 1.0])
    np.testing.assert_allclose(error, 21.0)


def test_a_wrong_root_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrices([2.0, 1.2, 0.5, 0.1], 4, 4)
    basis = np.linalg.svd(w)[2].T

    def wrong(xp: Any, b: Any, largest: Any, quintics: Any) -> Any:
        signature = (basis * np.asarray([1.0, -1.0, 1.0, 1.0])) @ basis.T
        g = matrix_sign.inverse_root(xp, b, largest, quintics) @ signature
        return 0.5 * (g + g.T)

    monkeypatch.setattr(matmul_clip, "inverse_root", wrong)
    assert clip_by_products(xp, w, np.asarray(1.0), np.asarray(2.0))[1] == np.inf


@pytest.mark.parametrize("noise", [1e-5, 1e-3])
@pytest.mark.parametrize("where", ["polar_iteration", "inverse_root"])
def test_imprecise_products_are_seen(
    monkeypatch: pytest.MonkeyPatch, noise: float, where: str
) -> None:
    rng = np.random.default_rng(0)
    exact = getattr(matrix_sign, where)

    def noisy(*arguments: Any) -> Any:
        result = exact(*arguments)
        error = noise * rng.standard_normal(result.shape)
        return result + error + error.T

    monkeypatch.setattr(matmul_clip, where, noisy)
    for values in spectra(16, 2.0):
        w = matrices(values, 16, 16)
        x, error = clip_by_products(xp, w, np.asarray(1.0), np.asarray(2.0))
        assert distance(x, projected(w, 1.0)) <= error
        assert error > noise


@pytest.mark.parametrize("claimed", [1.001, 1.5, 2.9])
def test_norms_that_are_too_small_are_never_believed(claimed: float) -> None:
    w = matrices(spectra(8, 3.0), 8, 8)
    with np.errstate(all="ignore"):
        x, error = clip_by_products(xp, w, np.ones(12), np.full(12, claimed))
    true = distance(np.where(np.isfinite(error)[:, None, None], x, 0.0), projected(w, 1.0))
    assert np.all((true <= error + 1e-14) | np.isinf(error))


@pytest.mark.parametrize(
    ("dtype", "ratio", "expected"),
    [("float32", 2.0, 47), ("float32", 4.9, 57), ("float64", 2.0, 99), ("float64", 4.9, 102)],
)
def test_number_of_products(dtype: str, ratio: float, expected: int) -> None:
    torch = pytest.importorskip("torch")
    space = compat.array_namespace(torch.zeros(1))
    count = 0

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal count
            count += function in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul)
            return function(*args, **(kwargs or {}))

    w = torch.asarray(matrices(spectra(6, ratio)[0], 6, 6).astype(dtype))
    limit, norms = torch.asarray(1.0, dtype=w.dtype), torch.asarray(ratio, dtype=w.dtype)
    with Count():
        clip_by_products(space, w, limit, norms)
    assert count == expected


@pytest.mark.parametrize(("low", "high"), [(0.05, 1.0), (0.3, 1.7), (0.9, 1.1)])
def test_the_quintic_is_polar_express(low: float, high: float) -> None:
    a, b, c = polar_express.best_quintic(low, high)
    x = np.linspace(low, high, 200_001)
    error = 1.0 - x * (a + x**2 * (b + x**2 * c))
    largest = np.abs(error).max()
    # Chebyshev: with three coefficients, four points of alternating sign.
    peaks = np.sign(error[np.abs(error) > largest * (1.0 - 1e-6)])
    assert np.count_nonzero(np.diff(peaks)) == 3


@pytest.mark.parametrize(
    ("lower", "accuracy", "most"),
    [(1e-5, 1e-6, 11), (1e-6, 1e-6, 12), (1e-14, 1e-15, 27), (0.5, 1e-7, 3), (0.2, 1e-15, 4)],
)
def test_the_composition_is_a_sign_and_takes_rounding(
    lower: float, accuracy: float, most: int
) -> None:
    quintics = polar_express.sign_quintics(lower, accuracy)
    assert len(quintics) <= most
    exact = noisy = np.geomspace(lower, 1.0, 100_001)
    rng = np.random.default_rng(0)
    for a, b, c in quintics:
        exact = exact * (a + exact**2 * (b + exact**2 * c))
        noisy = noisy * (a + noisy**2 * (b + noisy**2 * c))
        noisy = noisy * (1.0 + 1e-5 * rng.uniform(-1.0, 1.0, noisy.shape))
        assert exact.min() > 0.0
    assert np.abs(1.0 - exact).max() <= accuracy
    assert np.abs(1.0 - noisy).max() <= accuracy + 2e-5


def test_the_published_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first of the authors' list, for l = 1e-3 and their cushion.
    monkeypatch.setattr(polar_express, "CUSHION", 0.02407327424182761)
    first = polar_express.sign_quintics(1e-3, 1e-3)[0]
    published = (8.28721201814563, -23.595886519098837, 17.300387312530933)
    np.testing.assert_allclose(first, published, rtol=1e-12)


def test_sign_quintics_refuses_an_empty_interval() -> None:
    with pytest.raises(ValueError, match="lower must be in"):
        polar_express.sign_quintics(1.0, 1e-3)


def test_negative_part(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    values = np.asarray(
        [[3, 2, 1, 1, 0.5, 0.1], [3, 2, 1, 0, 0, 0], [3, 2, 1, 0, 0, -0.5], [0, 0, 0, 0, 0, 0]]
    )
    a = (q * values[:, None, :]) @ q.T
    a = (0.5 * (a + a.swapaxes(-1, -2))).astype(np.float32)
    given, shift = backend.array(a), backend.array(np.full(4, 1e-6, dtype=np.float32))
    space = compat.array_namespace(given)
    bound = backend.numpy(
        backend.call(lambda x, s: definite.negative_part(space, x, s), given, shift)
    )
    true = np.linalg.norm(np.minimum(np.linalg.eigvalsh(a.astype(np.float64)), 0.0), axis=-1)
    proven = [0, 1, 3]
    assert np.all(bound[proven] >= true[proven])
    assert np.all(bound[proven] <= 2e-5)
    assert not bound[2] < true[2]


def test_negative_part_of_what_the_shift_hides() -> None:
    a = -0.05 * np.eye(4)
    assert definite.negative_part(xp, a, np.asarray(0.1)) >= 0.1


def test_inverse_root() -> None:
    q = np.linalg.qr(matrices(np.ones(7), 7, 7, complex=True))[0]
    b = (q * np.geomspace(1.0, 4.0, 7)) @ q.conj().T
    g = matrix_sign.inverse_root(
        xp, 0.5 * (b + b.conj().T), np.asarray(4.0), polar_express.sign_quintics(0.499, 1e-15)
    )
    np.testing.assert_array_equal(g, g.conj().T)
    np.testing.assert_allclose(g, (q / np.sqrt(np.geomspace(1.0, 4.0, 7))) @ q.conj().T, atol=1e-14)


def test_other_errors_pass() -> None:
    broken = SimpleNamespace(
        astype=xp.astype, eye=xp.eye, tril=xp.tril, linalg=SimpleNamespace(cholesky=lambda a: 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        definite.negative_part(broken, np.eye(2), np.zeros(()))


@pytest.mark.parametrize("length", [1, 3, 30, 300])
def test_product_rounding(length: int) -> None:
    rng = np.random.default_rng(length)
    for a in (
        rng.standard_normal((length, length)),
        np.full((length, length), 1.0 / 3.0),
        np.full((length, length), 1.0001),
        np.outer(np.ones(length), rng.standard_normal(length)),
    ):
        w = a.astype(np.float32)
        product = w.T @ w
        true = np.linalg.norm(product - w.T.astype(np.float64) @ w.astype(np.float64))
        bound = product_rounding(xp, w.T, w, product)
        assert true <= bound
        assert bound <= (2 + 0.2 * length) * np.finfo(np.float32).eps * np.linalg.norm(w) ** 2


@pytest.mark.parametrize("tall", [False, True])
def test_polar_factor(backend: Backend, tall: bool) -> None:
    values = np.stack([np.linspace(1.0, 0.1, 4), np.full(4, 7.0), 1e-3 + np.arange(4) ** 2])
    w = matrices(values, 9, 4) if tall else matrices(values, 4, 9)
    given = backend.array(w)
    space = compat.array_namespace(given)
    x, error = backend.call(lambda a: polar_by_products(space, a), given)
    backend.same_kind(x, given)
    x, error = backend.numpy(x), backend.numpy(error)
    u, _, vh = np.linalg.svd(w, full_matrices=False)
    eps = np.finfo(x.dtype).eps
    np.testing.assert_allclose(x, u @ vh, atol=4e5 * eps)
    # What the condition number amplifies is not in the residual.
    assert np.all(distance(x, u @ vh)[:2] <= error[:2] + 40 * eps)
    assert np.all(error <= 100 * eps)


def test_the_polar_factor_of_a_deficient_matrix_says_so() -> None:
    w = matrices([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], 3, 5)
    x, error = polar_by_products(xp, w)
    s = np.linalg.svd(x, compute_uv=False)
    assert np.all(error >= np.linalg.norm(1.0 - s**2, axis=-1) - 1e-14)
    assert np.all(error > 0.9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["vmap", "compile"])
def test_under_the_transforms_of_torch(how: str) -> None:
    torch = pytest.importorskip("torch")
    space = compat.array_namespace(torch.zeros(1))
    w = torch.asarray(matrices([[2.0, 1.0, 0.2], [3.0, 2.0, 0.5]], 3, 4))
    limit, norms = torch.ones(2, dtype=w.dtype), torch.asarray([2.0, 3.0], dtype=w.dtype)

    def function(*arrays: Any) -> Any:
        return clip_by_products(space, *arrays)

    if how == "vmap":
        function = torch.vmap(function)
    else:
        function = torch.compile(function, backend="eager", fullgraph=True)
    x, error = function(w, limit, norms)
    true = distance(x.numpy(), projected(w.numpy(), np.ones(2)))
    assert np.all(true <= error.numpy() + 1e-14)
    assert np.all(error.numpy() <= 1e-12)
