"""Which array library something belongs to, and that each does what the standard alone would."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

import specops
from specops import arrays
from specops.arrays import libraries
from specops.arrays.libraries import if_loaded, library, library_of
from specops.arrays.standard import Library
from tests.backends import Backend

NUMPY, STANDARD = "NumPy", "Library"


def told(x: Any) -> str:
    """The name of the class that an array's library is known by."""
    return type(library(x)).__name__


class Subclassed(np.ndarray):
    """An array of NumPy with another name."""


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.zeros(3), NUMPY),
        (np.zeros(()), NUMPY),
        (np.zeros(3).view(Subclassed), NUMPY),
        (np.ma.masked_array([1.0]), NUMPY),
        (np.float32(1.0), NUMPY),
        (np.bool_(True), NUMPY),
        (True, STANDARD),
        (1.0, STANDARD),
        ([1.0], STANDARD),
        (None, STANDARD),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_of_numpy_and_python(x: Any, expected: str) -> None:
    assert told(x) == expected
    assert library(x) is library(x)


def test_of_each_backend(backend: Backend) -> None:
    expected = {"numpy": NUMPY, "torch": "Torch", "jax": "Jax", "cupy": "CuPy"}
    name = expected.get(backend.name.partition("-")[0], STANDARD)
    x = backend.array(np.eye(2))
    seen = [told(x)]

    def look(x: Any) -> Any:
        seen.extend((told(x), told(x[0, 0] > 0), type(library_of(namespace(x))).__name__))
        return x

    namespace = compat.array_namespace
    backend.call(look, x)
    assert seen == [name] * 4
    assert library(x) is library_of(namespace(x))


def test_of_subclasses_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.eye(2))
    buffer = torch.nn.Buffer(torch.eye(2)) if hasattr(torch.nn, "Buffer") else parameter

    class Tagged(torch.Tensor):
        pass

    mapped: list[str] = []
    torch.func.vmap(lambda x: (mapped.append(told(x)), x)[1])(torch.eye(2))
    torch.func.grad(lambda x: (mapped.append(told(x)), x.sum())[1])(torch.eye(2))
    of_each = [told(x) for x in (parameter, buffer, torch.eye(2).as_subclass(Tagged))]
    assert {*of_each, *mapped} == {"Torch"}
    assert len(mapped) == 2


def test_of_tracers() -> None:
    jax = pytest.importorskip("jax")
    seen: list[tuple[str, bool, bool | None]] = []

    def look(x: Any) -> Any:
        known = library(x)
        flag = x.sum() > 0
        seen.append((told(x), known.is_concrete(x), library(flag).truth(flag)))
        return x.sum()

    w = jax.numpy.eye(2)
    for transform in (lambda f: f, jax.jit, jax.vmap, jax.grad):
        transform(look)(w)
    assert [name for name, _, _ in seen] == ["Jax"] * 4
    assert [(concrete, truth) for _, concrete, truth in seen[:2]] == [(True, True), (False, None)]
    assert not any(concrete for _, concrete, _ in seen[1:])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("numpy", NUMPY),
        ("array_api_compat.numpy", NUMPY),
        ("array_api_compat.torch", "Torch"),
        ("jax.numpy", "Jax"),
        ("jax.experimental.array_api", "Jax"),
        ("array_api_strict", STANDARD),
        ("numpy_of_another", STANDARD),
        ("dask.array", STANDARD),
    ],
)
def test_of_namespaces_by_their_names(name: str, expected: str) -> None:
    if expected in ("Torch", "Jax"):
        pytest.importorskip(expected.lower())
    xp = type(sys)(name)
    assert type(library_of(xp)).__name__ == expected
    assert library_of(xp) is library_of(xp)


def test_nothing_is_imported_to_find_out() -> None:
    source = """
import sys
import numpy as np
from specops.arrays.libraries import if_loaded, library
kinds = [type(library(x)).__name__ for x in (np.eye(2), np.float64(1), True, 1.0, "w")]
assert kinds == ["NumPy", "NumPy", "Library", "Library", "Library"], kinds
assert [if_loaded(name) for name in ("torch", "jax", "cupy")] == [None] * 3
assert not {"torch", "jax", "cupy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_of_modules_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = if_loaded("numpy")
    assert known is library(np.eye(2))
    # Another dictionary: an entry taken out and put back comes last, and pickle, which takes the
    # first module that has an object, then calls torch's by the names of array_api_compat.
    others = {name: module for name, module in sys.modules.items() if name != "torch"}
    monkeypatch.setattr(sys, "modules", others)
    assert if_loaded("torch") is None


def test_a_library_that_comes_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class ndarray:
        pass

    late: Any = type(sys)("cupy")
    late.ndarray = ndarray
    monkeypatch.setattr(libraries, "_BY_TYPE", dict(libraries._BY_TYPE))
    assert told(1.5) == STANDARD
    monkeypatch.setitem(sys.modules, "cupy", late)
    assert told(ndarray()) == "CuPy"
    assert told(1.5) == STANDARD


MATRIX = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, -7.0]])
DEFINITE = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]])
INDEFINITE = np.diag([1.0, -1.0, 1.0])


def lower(x: np.ndarray) -> np.ndarray:
    return np.tril(x)


# What is asked of a library, on an array `x`, as NumPy arrays in double precision.
ASKED: dict[str, Callable[[Library, Any, Any], Any]] = {
    "largest_entry": lambda of, xp, x: of.largest_entry(xp, x, None, False),
    "largest_entry, kept": lambda of, xp, x: of.largest_entry(xp, x, (-1,), True),
    "all_finite": lambda of, xp, x: of.all_finite(xp, x, None),
    "all_finite, axis": lambda of, xp, x: of.all_finite(xp, x, (-1,)),
    "argmax": lambda of, xp, x: of.argmax(xp, xp.reshape(x, (-1,))),
    "adjoint": lambda of, xp, x: of.adjoint(xp, x),
    "rows": lambda of, xp, x: of.rows(xp, x),
    "rows of a tall one": lambda of, xp, x: of.rows(xp, of.adjoint(xp, x)),
    "zeros": lambda of, xp, x: of.zeros((2, 3), x),
    "matmul": lambda of, xp, x: of.matmul(x, of.adjoint(xp, x)),
    "complex_of": lambda of, xp, x: of.complex_of(xp, x, 2 * x, xp.complex128),
    "add_at": lambda of, xp, x: of.add_at(xp.asarray(x, copy=True), (0, 1), x[1, 2]),
    "add_diagonal": lambda of, xp, x: of.add_diagonal(
        xp, xp.matrix_transpose(x) @ x, xp.ones((1,), dtype=x.dtype, device=of.device(x))
    ),
}


OF_BAD_ENTRIES = [name for name in ASKED if name.startswith(("largest", "all_"))]


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, None) for name in ASKED]
    + [(name, bad) for name in OF_BAD_ENTRIES for bad in (math.nan, -math.inf)],
)
def test_each_does_what_the_standard_would(eager: Backend, name: str, bad: float | None) -> None:
    if not eager.doubles and name == "complex_of":
        pytest.skip("the device has no doubles")
    values = MATRIX.copy()
    if bad is not None:
        values[0, 2] = bad
    with np.errstate(invalid="ignore"):
        expected = ASKED[name](Library(), compat.array_namespace(values), values.copy())
    x = eager.array(values)
    got = ASKED[name](library(x), compat.array_namespace(x), x)
    np.testing.assert_allclose(eager.numpy(got), expected, rtol=1e-6)
    np.testing.assert_array_equal(eager.numpy(x), eager.numpy(eager.array(values)))


def test_gram_matrices_on_and_below_the_diagonal(eager: Backend) -> None:
    for values in (MATRIX, MATRIX.T):
        x = eager.array(values)
        got = library(x).gram(compat.array_namespace(x), x, x.dtype)
        np.testing.assert_allclose(lower(eager.numpy(got)), lower(MATRIX @ MATRIX.T), rtol=1e-6)


def test_factors_of_stacks_where_some_have_none(eager: Backend) -> None:
    stack = np.stack([DEFINITE, INDEFINITE, 2 * DEFINITE, -DEFINITE, DEFINITE])
    a = eager.array(stack)
    xp, known = compat.array_namespace(a), library(a)
    factor, exist = known.try_cholesky(xp, a)
    expected = [True, False, True, False, True]
    assert eager.numpy(exist).tolist() == expected
    assert eager.numpy(known.has_cholesky(xp, a)).tolist() == expected
    good = eager.numpy(factor)[expected]
    np.testing.assert_allclose(good @ np.swapaxes(good, -1, -2), stack[expected], atol=1e-6)
    assert not bool(known.try_cholesky(xp, a[1, ...])[1])


def test_eigenvalues_ascend(eager: Backend) -> None:
    a = eager.array(DEFINITE)
    values, vectors = library(a).eigh(compat.array_namespace(a), a)
    values, vectors = eager.numpy(values), eager.numpy(vectors)
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose((vectors * values) @ vectors.T, DEFINITE, atol=1e-5)


def test_there_and_back(eager: Backend) -> None:
    x = eager.array(MATRIX)
    known, xp = library(x), compat.array_namespace(x)
    host = known.to_numpy(x)
    assert type(host) is np.ndarray
    np.testing.assert_array_equal(host, eager.numpy(x))
    for back in (known.placed(xp, host, x), known.from_host(host, x)):
        assert compat.array_namespace(back) is xp
        np.testing.assert_array_equal(eager.numpy(back), host)
    flipped = known.from_host(host[::-1, ::-1], x)
    np.testing.assert_array_equal(eager.numpy(flipped), host[::-1, ::-1])


def test_start_vectors_are_these_numbers_whatever_the_version_and_process() -> None:
    unit = arrays.start_vector("layer.0.weight", 4)
    # The dot product may be summed in another order.
    expected = [0.07790776377895553, -0.11526961604054937, 0.9442552907795099, -0.2983709801500979]
    np.testing.assert_allclose(unit, expected, rtol=1e-15)
    assert abs(unit @ arrays.start_vector("layer.1.weight", 4)) < 0.99


def test_views_share_memory_and_only_where_values_are_constant(eager: Backend) -> None:
    x = eager.array(MATRIX)
    known = library(x)
    view = known.on_host(x)
    assert view is None or (view == eager.numpy(x)).all()
    if known.is_constant_on_host(x):
        assert np.shares_memory(known.host_view(x), view)
    assert known.is_constant_on_host(x) == (eager.name in ("numpy", "torch"))


def test_tensors_with_a_derivative_have_no_view() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.eye(2))
    known = library(parameter)
    assert known.on_host(parameter) is None
    assert not known.is_constant_on_host(parameter)
    assert not known.is_concrete(parameter)
    with torch.no_grad():
        assert known.is_constant_on_host(parameter)
        assert known.host_view(parameter).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert known.to_numpy(parameter).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert not known.stop_gradient(parameter).requires_grad


def test_values_mapped_by_vmap_are_unknown() -> None:
    torch = pytest.importorskip("torch")
    found: list[Any] = []

    def look(x: Any) -> Any:
        known = library(x)
        found.append((known.is_traced(x), known.is_concrete(x), known.truth(x.sum() > 0)))
        return x + known.zeros((2,), x)

    torch.func.vmap(look)(torch.eye(2))
    assert found == [(True, False, None)]
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    assert found[1] == (False, False, True)


def test_control_flow_where_values_are_known(eager: Backend) -> None:
    one = eager.array(np.asarray(1.0))
    known = library(one)
    assert float(known.fori(2, 5, lambda j, c: c + j, one)) == 10.0
    assert float(known.while_loop(lambda c: c < 10, lambda c: c * 2, one)) == 16.0
    assert [known.cond(flag, lambda: "yes", lambda: "no") for flag in (one > 0, one < 0)] == [
        "yes",
        "no",
    ]
    assert float(known.compiled(lambda n, x: x * n, (3,), one)) == 3.0
    assert [known.truth(one > 0), known.truth(one < 0)] == [True, False]
    assert known.is_concrete(one)
    assert not known.is_traced(one)
    assert not known.is_staged(one)


def test_records_leave_the_transformations_of_jax() -> None:
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    conv = specops.Conv((5, 5))
    kernel = jax.numpy.asarray(rng.normal(size=(2, 3, 3, 3)))
    bounds = jax.jit(lambda k: specops.spectral_norm_bounds(k, conv))(kernel)
    exact = specops.spectral_norm(np.asarray(kernel), conv)
    assert bounds.lower <= exact <= bounds.upper
    project = jax.jit(lambda k: specops.project_spectral_ball(k, 1.0, conv, return_info=True))
    assert project(kernel)[1].constrained == "torus"
    stack = jax.numpy.asarray(rng.normal(size=(4, 3, 5)))
    for function in (
        lambda w: specops.project_spectral_ball(w, 1.0, return_info=True),
        lambda w: specops.project_stable_rank(w, target=1.5, return_info=True),
    ):
        array, info = jax.vmap(function)(stack)
        alone, of_one = function(stack[2])
        np.testing.assert_allclose(array[2], alone, atol=1e-6)
        for field in ("norm_after", "rank_after"):
            if hasattr(info, field):
                np.testing.assert_allclose(getattr(info, field)[2], getattr(of_one, field), 1e-5)
