"""`linear_operator` against its explicit matrix, and in SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.spectra import LinearOperator
from tests import oracle
from tests.backends import Backend

MAPS: dict[str, tuple[tuple[int, ...], Any]] = {
    "matrix": ((3, 4), None),
    "matrix, one input": ((3, 1), None),
    "matrix, one output": ((1, 4), None),
    "matrix, axes": ((2, 3, 4), Dense(out_axes=(1,))),
    "stack": ((4, 3, 5), Dense(out_axes=(1,), batch_axes=(0,))),
    "stack of as many": ((4, 3, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    "two batch axes": ((2, 3, 2, 4), Dense(out_axes=(2,), batch_axes=(0, 1))),
    "zeros": ((3, 2, 3, 3), Conv((3, 4))),
    "zeros, strided": ((4, 2, 3), Conv((7,), stride=2, padding=1)),
    "circular, grouped": ((4, 2, 3, 3), Conv((4, 6), stride=2, groups=2, boundary="circular")),
    "zeros, transposed": ((3, 4, 3), Conv((4,), stride=2, padding=1, transposed=True)),
    "circular, transposed": (
        (3, 2, 3),
        Conv((3,), stride=2, transposed=True, boundary="circular", layout="IO*"),
    ),
    "one input": ((3, 1, 1), Conv((1,))),
}
KINDS = ("float64", "complex128")
FEW = {("stack", "complex128"), ("matrix, one output", "float64")}
FEW |= {("one input", "float64"), ("zeros, transposed", "complex128")}
"""On the library that compiles every product for itself."""


def draw(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return values + 1j * rng.standard_normal(shape) if kind.startswith("complex") else values


def adjoint(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a.conj(), -2, -1)


class Check:
    """Products of an operator on a backend, beside NumPy's with its explicit matrix."""

    def __init__(self, backend: Backend, a: LinearOperator) -> None:
        self.backend, self.a = backend, a
        self.matrix = backend.numpy(a.to_matrix())
        self.tolerance = 1e-12 if backend.doubles else 1e-5

    def same(self, got: Any, wanted: np.ndarray) -> None:
        got = self.backend.numpy(got)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=self.tolerance * np.abs(wanted).max())

    def products(self, kind: str) -> None:
        """All ways to apply it, to vectors of this kind."""
        matrix, batch = self.matrix, self.matrix.shape[:-2]
        rows, columns = matrix.shape[-2:]
        assert self.a.shape == (rows, columns)
        for vector, several, a, n in (
            (self.a.matvec, self.a.matmat, matrix, columns),
            (self.a.rmatvec, self.a.rmatmat, adjoint(matrix), rows),
        ):
            for lead in (batch, (2, *batch)):
                x = draw((*lead, n), kind)
                given = self.backend.array(x)
                y = (a @ x[..., None])[..., 0]
                self.same(vector(given), y)
                if n != 1:
                    self.same(vector(given[..., None]), y[..., None])
                for k in (1, 3):
                    x = draw((*lead, n, k), kind)
                    self.same(several(self.backend.array(x)), a @ x)
        x = draw((columns,), kind)
        self.same(self.a @ self.backend.array(x), matrix @ x)
        x = draw((*batch, columns, 2), kind)
        self.same(self.a @ self.backend.array(x), matrix @ x)
        if columns != 1:
            x = draw((columns, 1), kind)
            self.same(self.a.matvec(self.backend.array(x)), matrix @ x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAPS)
def test_every_product_is_that_of_the_matrix(eager: Backend, name: str, kind: str) -> None:
    shape, geometry = MAPS[name]
    compiles = eager.name == "jax"
    if compiles and (name, kind) not in FEW:
        pytest.skip("compiles for seconds")
    w = eager.array(draw(shape, kind, seed=1))
    a = specops.linear_operator(w, geometry)
    assert isinstance(a, LinearOperator)
    assert a.dtype == w.dtype
    for operator in (a,) if compiles else (a, a.H, a.H.H):
        check = Check(eager, operator)
        for vectors in KINDS:
            check.products(vectors)
    np.testing.assert_array_equal(eager.numpy(a.H.to_matrix()), adjoint(eager.numpy(a.to_matrix())))
    assert a.H.shape == a.shape[::-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAPS)
def test_the_matrix_is_that_of_the_layer(name: str, kind: str) -> None:
    shape, geometry = MAPS[name]
    if isinstance(geometry, Conv):
        w = draw(shape, kind, seed=1)
        matrix = oracle.conv_matrix(w, geometry)
        a = specops.linear_operator(w, geometry)
        np.testing.assert_allclose(a.to_matrix(), matrix, atol=1e-12)
        np.testing.assert_allclose(a.H.to_matrix(), matrix.conj().T, atol=1e-12)


def test_blocks_are_operators_each(eager: Backend) -> None:
    found = specops.linear_operator(eager.array(draw((5, 3), "float64")), Dense(splits=(2, 3)))
    assert isinstance(found, tuple)
    assert [a.shape for a in found] == [(2, 3), (3, 3)]
    for a in found:
        Check(eager, a).products("float64")


def test_half_precision_computes_in_single(eager: Backend) -> None:
    xp_half = {"torch": "float16", "jax": "float16", "numpy": "float16"}
    if eager.name not in xp_half:
        pytest.skip("it has no half precision")
    w, x = (eager.array(draw(shape, "float64"), "float16") for shape in ((3, 4), (4,)))
    a = specops.linear_operator(w)
    assert "float32" in str(a.dtype)
    assert (a @ x).dtype == a.dtype == a.H.dtype


def test_single_input_leaves_the_last_axis_to_the_inputs() -> None:
    a = specops.linear_operator(np.array([[2.0], [3.0]]))
    assert a.matvec(np.ones((4, 1))).shape == (4, 2)
    assert a.matvec(np.ones((1, 1))).tolist() == [[2.0, 3.0]]
    assert a.matmat(np.ones((1, 1))).tolist() == [[2.0], [3.0]]
    assert (a @ np.ones((1, 4))).shape == (2, 4)


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (4, 2), (1, 4, 3)])
def test_vectors_of_other_lengths_are_refused(shape: tuple[int, ...]) -> None:
    a = specops.linear_operator(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\) or columns \(\.\.\., 4, 1\).*3×4"):
        a.matvec(np.ones(shape))
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, k\) for <LinearOperator 3×4>"):
        a.rmatmat(np.ones((4, 2)))
    with pytest.raises(TypeError, match="unsupported operand"):
        a @ [1.0, 2.0, 3.0, 4.0]


class TestSciPy:
    """It is a dependency of tests only."""

    @pytest.fixture(autouse=True)
    def _linalg(self) -> None:
        self.linalg = pytest.importorskip("scipy.sparse.linalg")

    @pytest.mark.parametrize("kind", ["float32", *KINDS])
    @pytest.mark.parametrize("name", [n for n in MAPS if "stack" not in n and "two" not in n])
    def test_operators_are_taken(self, name: str, kind: str) -> None:
        shape, geometry = MAPS[name]
        w = draw(shape, kind).astype(kind)
        ours = specops.linear_operator(w, geometry)
        a, matrix = self.linalg.aslinearoperator(ours), ours.to_matrix()
        assert isinstance(a, self.linalg.LinearOperator)
        assert (a.shape, a.dtype) == (matrix.shape, np.dtype(kind))
        rows, columns = matrix.shape
        x, y = draw((columns, 3), kind).astype(kind), draw((rows, 3), kind).astype(kind)
        near = {"rtol": 0, "atol": 1e-4 if kind == "float32" else 1e-12}
        np.testing.assert_allclose(a @ x, matrix @ x, **near)
        np.testing.assert_allclose(a @ x[:, :1], matrix @ x[:, :1], **near)
        np.testing.assert_allclose(a @ x[:, 0], matrix @ x[:, 0], **near)
        np.testing.assert_allclose(a.H @ y, adjoint(matrix) @ y, **near)
        np.testing.assert_allclose(a.T @ y, matrix.T @ y, **near)
        np.testing.assert_allclose((a.H @ a) @ x, adjoint(matrix) @ matrix @ x, **near)
        theirs = self.linalg.aslinearoperator(ours.H)
        np.testing.assert_allclose(theirs @ y, adjoint(matrix) @ y, **near)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["zeros", "zeros, transposed", "circular, grouped"])
    def test_svds_finds_the_norm(self, name: str, kind: str) -> None:
        shape, geometry = MAPS[name]
        w = draw(shape, kind)
        norm = float(specops.spectral_norm(w, geometry))
        ours = specops.linear_operator(w, geometry)
        for a in (ours, self.linalg.aslinearoperator(ours), self.linalg.aslinearoperator(ours.H)):
            u, s, vh = self.linalg.svds(a, k=1)
            assert float(s[0]) == pytest.approx(norm, rel=1e-9)
            np.testing.assert_allclose(a @ adjoint(vh), norm * u, atol=1e-9 * norm)

    def test_least_squares(self) -> None:
        w = draw((4, 3, 3, 3), "float64")
        a = specops.linear_operator(w, Conv((5, 5), padding=1))
        wanted = draw((a.shape[1],), "float64")
        found = self.linalg.lsmr(a, a @ wanted, atol=1e-12, btol=1e-12, maxiter=1000)[0]
        np.testing.assert_allclose(a @ found, a @ wanted, atol=1e-8)

    def test_jax_weights(self) -> None:
        jnp = pytest.importorskip("jax.numpy")
        w = draw((3, 2, 3, 3), "float64")
        a = specops.linear_operator(jnp.asarray(w), Conv((4, 4)))
        s = self.linalg.svds(a, k=1, return_singular_vectors=False)
        assert float(s[0]) == pytest.approx(float(specops.spectral_norm(w, Conv((4, 4)))))


def test_subclasses_of_tensors_that_require_gradients() -> None:
    torch = pytest.importorskip("torch")

    class Tagged(torch.Tensor):
        pass

    values = torch.arange(1.0, 9.0).reshape(4, 2, 1)
    # One tap sees all of the grid.
    w = torch.nn.Parameter(values.as_subclass(Tagged))
    a = specops.linear_operator(w, Conv((3,), groups=2))
    image = a.rmatvec(torch.ones(a.shape[0]))
    matrix = oracle.conv_matrix(values.numpy(), Conv((3,), groups=2))
    np.testing.assert_array_equal(image.detach().numpy(), matrix.T.sum(axis=1))
    (gradient,) = torch.autograd.grad(image.sum(), w)
    np.testing.assert_array_equal(gradient.numpy(), 3.0)


def test_measures_of_derivatives_take_it() -> None:
    w, geometry = np.random.default_rng(0).standard_normal((3, 2, 3, 3)), Conv((6, 6), padding=1)
    found = specops.measures.local_lipschitz(specops.linear_operator(w, geometry))
    assert found.value == pytest.approx(float(specops.spectral_norm(w, geometry)), rel=1e-3)
    a = w.reshape(6, 9) @ w.reshape(6, 9).T
    ends = specops.measures.spectrum_ends(specops.linear_operator(a))
    expected = np.linalg.eigvalsh(a)[[0, -1]]
    np.testing.assert_allclose([ends.smallest, ends.largest], expected, atol=1e-3)


def test_measures_take_complex_matrices(eager: Backend) -> None:
    values = draw((5, 4), "complex128")
    tolerance = 1e-9 if eager.doubles else 1e-4
    found = specops.measures.local_lipschitz(specops.linear_operator(eager.array(values)))
    assert found.value == pytest.approx(np.linalg.norm(values, 2), rel=tolerance)
    hermitian = specops.linear_operator(eager.array(values @ adjoint(values)))
    ends = specops.measures.spectrum_ends(hermitian)
    expected = np.linalg.eigvalsh(values @ adjoint(values))[[0, -1]]
    atol = tolerance * expected[1]
    np.testing.assert_allclose([ends.smallest, ends.largest], expected, atol=atol)
