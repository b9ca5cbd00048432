"""Which kinds of arrays are measured: the others are refused by name, with what to do instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import specops
from specops import Dense, arrays, errors, measures
from specops.arrays import kinds, solvers
from tests.agreement import OPERATIONS, RULES
from tests.backends import Backend
from tests.test_agreement import PROTOCOLS, compute

strict = pytest.importorskip("array_api_strict")
VALUES = np.array([[3.0, 1.0], [0.5, 4.0]])
_ENTRY = {
    "singular_values": lambda w: specops.singular_values(w),
    "spectral_norm": lambda w: specops.spectral_norm(w, Dense()),
    "spectral_norm_bounds": lambda w: specops.spectral_norm_bounds(w),
    "stable_rank": lambda w: specops.stable_rank(w),
    "effective_rank": lambda w: specops.effective_rank(w),
    "condition_number": lambda w: specops.condition_number(w),
    "linear_operator": lambda w: specops.linear_operator(w),
    "top_singular_triplets": lambda w: specops.top_singular_triplets(w, 1),
    "top_singular_triplets, start": lambda w: specops.top_singular_triplets(VALUES, 1, start=w),
    "project_spectral_ball": lambda w: specops.project_spectral_ball(w, 1.0),
    "project_stable_rank": lambda w: specops.project_stable_rank(w, ratio=0.5),
    "clip_singular_values": lambda w: specops.clip_singular_values(w, 1.0, 2.0),
    "polar_factor": lambda w: specops.polar_factor(w),
    "project_schatten_ball": lambda w: specops.project_schatten_ball(w, 1.0, p=1),
    "balance_norms": lambda w: specops.balance_norms([w, VALUES]),
    "margins": lambda w: measures.margins(w, np.array([0, 1])),
} | {
    name: lambda w, make=make: make(1.0).update(w, Dense(), make(1.0).init(VALUES, Dense(), "w"))
    for name, make in RULES.items()
}


class Reader:
    """What numpy.asarray reads, and nothing more."""

    shape, ndim, dtype = VALUES.shape, 2, VALUES.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return VALUES


class Frame(Reader):
    """Like a table."""

    def to_numpy(self) -> np.ndarray:
        return VALUES


class Sparse(Reader):
    """Like scipy's, which numpy.asarray only wraps."""

    def toarray(self) -> np.ndarray:
        return VALUES

    todense = toarray


class Standard(Reader):
    """An array of a library of the standard."""

    def __array_namespace__(self, api_version: Any = None) -> Any:
        return np


class Lazy(Standard):
    """Like dask's."""

    def compute(self) -> np.ndarray:
        return VALUES


class Coordinates(Standard):
    """Like those of pydata's sparse."""

    def todense(self) -> np.ndarray:
        return VALUES


class Node(Standard):
    """Like those of ndonnx."""

    def unwrap_numpy(self) -> np.ndarray:
        return VALUES


class Masked(Standard):
    """Like those of marray."""

    mask = VALUES > 1.0


class Measured(np.ndarray):
    """NumPy's, with ufuncs of its own, as for units."""

    def __array_ufunc__(self, *inputs: Any, **options: Any) -> Any:
        return NotImplemented


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (VALUES.tolist, r"got list: .*numpy\.asarray"),
    "reader": (Reader, r"got tests Reader: .*numpy\.asarray"),
    "frame": (Frame, r"Frame, .*w\.to_numpy\(\)"),
    "sparse": (Sparse, r"Sparse, which is sparse: .*w\.toarray\(\)"),
    "lazy": (Lazy, r"Lazy, which is not computed yet: .*w\.compute\(\)"),
    "coordinates": (Coordinates, r"Coordinates, which is sparse: .*w\.todense\(\)"),
    "node": (Node, r"Node, .*w\.unwrap_numpy\(\)"),
    "masked": (Masked, r"Masked, which has masked entries.*replace"),
    "numpy.ma": (
        lambda: np.ma.masked_array(VALUES, mask=VALUES > 3.5),
        r"numpy MaskedArray, which has masked entries.*w\.filled\(0\.0\)",
    ),
    "numpy.ma without a mask": (lambda: np.ma.masked_array(VALUES), r"w\.filled\(0\.0\)"),
    "numpy.matrix": (
        lambda: VALUES.view(np.matrix),
        r"numpy matrix, which has its own products.*numpy\.asarray",
    ),
    "units": (lambda: VALUES.view(Measured), r"Measured, .*numpy\.asarray"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("function", _ENTRY)
def test_refused_by_name_and_with_a_remedy(function: str, kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(errors.UnsupportedArrayError, match=message) as raised:
        _ENTRY[function](make())
    assert isinstance(raised.value, TypeError)


def _dask() -> Any:
    return pytest.importorskip("dask.array").asarray(VALUES)


def _sparse() -> Any:
    return pytest.importorskip("sparse").COO.from_numpy(VALUES)


def _ndonnx() -> Any:
    return pytest.importorskip("ndonnx").asarray(VALUES)


def _pandas() -> Any:
    return pytest.importorskip("pandas").DataFrame(VALUES)


def _xarray() -> Any:
    return pytest.importorskip("xarray").DataArray(VALUES)


def _scipy() -> Any:
    return pytest.importorskip("scipy.sparse").csr_array(VALUES)


def _bcoo() -> Any:
    return pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(VALUES)


def _torch_masked() -> Any:
    torch = pytest.importorskip("torch")
    # It has a constructor that warns that it may change.
    with pytest.warns(UserWarning, match="prototype"):
        return torch.masked.masked_tensor(torch.tensor(VALUES), torch.tensor(VALUES > 1.0))


def _torch_nested() -> Any:
    torch = pytest.importorskip("torch")
    return torch.nested.nested_tensor([torch.tensor(VALUES)], layout=torch.jagged)


def _torch_mkldnn() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no MKL-DNN")
    return torch.tensor(VALUES).float().to_mkldnn()


@pytest.mark.filterwarnings("ignore:onnxruntime")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_dask, r"dask Array, .*w\.compute\(\)"),
        (_sparse, r"sparse COO, .*w\.todense\(\)"),
        (_ndonnx, r"ndonnx Array, .*w\.unwrap_numpy\(\)"),
        (_pandas, r"pandas DataFrame, .*w\.to_numpy\(\)"),
        (_xarray, r"xarray DataArray, .*w\.to_numpy\(\)"),
        (_scipy, r"scipy csr_array, .*w\.toarray\(\)"),
        (_bcoo, r"jax BCOO, .*w\.todense\(\)"),
        (_torch_masked, r"torch MaskedTensor, .*w\.to_tensor\(0\.0\)"),
        (_torch_nested, r"nested tensor: .*w\.unbind\(\)"),
        (_torch_mkldnn, r"MKL-DNN: .*w\.to_dense\(\)"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_the_real_ones(make: Callable[[], Any], message: str) -> None:
    w = make()
    for function in _ENTRY.values():
        with pytest.raises(errors.UnsupportedArrayError, match=message):
            function(w)
    # The remedy is one.
    (remedy,) = re.findall(r"w\\\.(\w+)", message)
    dense = getattr(w, remedy)(*((0.0,) if remedy == "to_tensor" else ()))
    assert specops.spectral_norm(dense[0] if isinstance(dense, tuple) else dense) > 0.0


def test_numpy_subclasses_that_compute_as_numpy_does_are_measured(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "w", dtype=np.float64, mode="w+", shape=VALUES.shape)
    mapped[:] = VALUES
    assert specops.spectral_norm(mapped) == specops.spectral_norm(VALUES)


STRICT = Backend("array_api_strict", strict.asarray)
_FEW = (
    ("stack", "float64"),
    ("split", "float32"),
    ("circular", "float64"),
    ("circular, zero", "float32"),
    ("zeros, transposed", "float32"),
)


_MEASURED = [n for n in _ENTRY if n not in RULES and "start" not in n and n != "margins"]


@pytest.mark.parametrize("name", _MEASURED)
def test_every_function_refuses_what_is_no_matrix_of_numbers(eager: Backend, name: str) -> None:
    function = _ENTRY[name]
    for dtype in ("int32", "bool"):
        with pytest.raises(errors.UnsupportedArrayError, match=f"{dtype}.* cast the weight"):
            function(eager.convert(VALUES.astype(dtype)))
    for shape in ((0, 2), (2, 0)):
        with pytest.raises(errors.GeometryError, match=r"empty: shape \(\d, \d\)"):
            function(eager.array(np.ones(shape)))
    if name != "linear_operator":
        with pytest.raises(errors.NonFiniteError, match="NaN or infinity"):
            function(eager.array(VALUES * [1.0, np.inf]))
    if name != "spectral_norm":
        for shape in ((), (4,), (2, 2, 2)):
            with pytest.raises(errors.GeometryError, match="needs a geometry"):
                function(eager.array(np.ones(shape)))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_versions_of_the_standard_agree(name: str) -> None:
    assert kinds.OLDEST == "2023.12"
    for case, dtype in _FEW:
        with strict.ArrayAPIStrictFlags(api_version="2024.12"):
            wanted = compute(STRICT, name, case, dtype)
        with strict.ArrayAPIStrictFlags(api_version=kinds.OLDEST):
            got = compute(STRICT, name, case, dtype)
        if isinstance(wanted, type):
            assert got is wanted
            continue
        assert got.keys() == wanted.keys()
        for key in got:
            np.testing.assert_array_equal(got[key], wanted[key], f"{key} of {case}")


def test_bounds_that_are_arrays() -> None:
    w = STRICT.array(VALUES)
    rule = specops.NormalizeIfAbove(lambda *_: STRICT.array(np.asarray(1.0)), norm="operator")
    new, _, _ = rule.update(w, Dense(), {})
    assert float(specops.spectral_norm(new)) == pytest.approx(1.0)


@pytest.mark.parametrize("device", ["CPU_DEVICE", "device1"])
def test_a_solver_that_gives_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(strict.linalg, "svd", fail)
    values = np.stack([VALUES, VALUES[::-1] * [1.0, 4.0]])
    a = strict.asarray(values, device=strict.Device(device))
    u, s, vh = solvers.svd(strict, a)
    np.testing.assert_allclose(STRICT.numpy(s), np.linalg.svd(values)[1], rtol=1e-12)
    np.testing.assert_allclose(STRICT.numpy((u * s[:, None, :]) @ vh), values, rtol=1e-12)


def test_masked_bounds_are_no_bounds() -> None:
    with pytest.raises(ValueError, match="must be a positive finite number"):
        specops.project_spectral_ball(VALUES, np.ma.masked_array(1.0, mask=True))


@pytest.mark.filterwarnings("ignore:The 2021.12 version of the array API")
@pytest.mark.parametrize("version", ["2021.12", "2022.12"])
def test_older_versions_are_refused_by_name(version: str) -> None:
    w = strict.asarray(VALUES)
    assert specops.spectral_norm(w) > 1.0
    with strict.ArrayAPIStrictFlags(api_version=version):
        for function in _ENTRY.values():
            with pytest.raises(
                errors.UnsupportedArrayError,
                match=rf"array_api_strict follows version {version}.*2023\.12 or later.*asarray",
            ):
                function(w)
    assert specops.spectral_norm(w) > 1.0


def _library(**attributes: Any) -> Any:
    library = ModuleType("somelibrary")
    contents = {"linalg": strict.linalg, "__array_api_version__": "2024.12"} | attributes
    vars(library).update(contents)

    class Array(Standard):
        def __array_namespace__(self, api_version: Any = None) -> Any:
            return library

    return Array()


def test_a_library_without_linear_algebra_or_of_no_version() -> None:
    plain = _library()
    assert arrays.namespace(plain).__name__ == "somelibrary"
    silent = _library()
    del silent.__array_namespace__().__array_api_version__
    assert arrays.namespace(silent).__name__ == "somelibrary"
    bare = _library()
    del bare.__array_namespace__().linalg
    with pytest.raises(errors.UnsupportedArrayError, match=r"somelibrary has no linear algebra"):
        specops.spectral_norm(bare)
    with pytest.raises(errors.UnsupportedArrayError, match=r"somelibrary follows version 2022\.12"):
        specops.spectral_norm(_library(__array_api_version__="2022.12"))


def test_a_missing_argument_names_the_rule() -> None:
    for kind in vars(specops.rules).values():
        if inspect.isclass(kind) and hasattr(kind, "update") and kind not in PROTOCOLS:
            with pytest.raises(TypeError, match=rf"^{kind.__name__}\.__init__\(\) "):
                kind(no_such_argument=1)
