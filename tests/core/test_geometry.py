"""Geometries check their arguments and fit only the arrays that have them."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given

import specops
from specops import Conv, Dense, errors
from specops.maps import convolution
from specops.maps.convolution import ConvOperator
from specops.maps.windows import GatheredWindows, SlicedWindows
from tests import oracle
from tests.backends import Backend
from tests.strategies import Case, convolutions


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Conv(0), "input_shape must be at least 1"),
        (lambda: Conv(()), "input_shape is empty"),
        (lambda: Conv((8.5, 8)), "input_shape must be an integer"),
        (lambda: Conv((8, 8), stride=0), "stride must be at least 1"),
        (lambda: Conv((8, 8), stride=True), "stride must be an integer"),
        (lambda: Conv((8, 8), stride=(1, 1, 1)), "3 entries for 2 spatial axes"),
        (lambda: Conv((8, 8), dilation=-1), "dilation must be at least 1"),
        (lambda: Conv((8, 8), groups=0), "groups must be at least 1"),
        (lambda: Conv((8, 8), groups=(2,)), "groups must be an integer"),
        (lambda: Conv((8, 8), padding=-1), "padding must be at least 0"),
        (lambda: Conv((8, 8), padding="full"), "padding must be"),
        (lambda: Conv((8, 8), padding=((0, 1),)), "pair for each spatial axis"),
        (lambda: Conv((8, 8), boundary="reflect"), "no convolution on a torus"),
        (lambda: Conv((8, 8), boundary="replicate"), "no convolution on a torus"),
        (lambda: Conv((8, 8), boundary="wrap"), 'boundary must be "zeros" or "circular"'),
        (lambda: Conv((8, 8), layout="HWIO"), "layout must be one of"),
        (lambda: Conv((8, 8), boundary=["zeros"]), 'boundary must be "zeros" or "circular"'),  # type: ignore[arg-type]
        (lambda: Conv((8, 8), layout=["OI*"]), "layout must be one of"),  # type: ignore[arg-type]
        (lambda: Conv((8, 8), transposed=1), "transposed must be True or False"),
        (lambda: Conv((8, 8), output_padding=1), "only applies to transposed"),
        (lambda: Dense(out_axes=()), "out_axes is empty"),
        (lambda: Dense(out_axes=(0, 0)), "named twice"),
        (lambda: Dense(out_axes=(0,), batch_axes=(0,)), "named twice"),
        (lambda: Dense(out_axes=1.0), "out_axes must be an integer"),
        (lambda: Dense(splits=()), "splits is empty"),
        (lambda: Dense(splits=(3, 0)), "splits must be at least 1"),
        (lambda: Dense(splits=(3, 1), repeats=0), "repeats must be at least 1"),
        (lambda: Dense(repeats=2), "repeats=2 of what"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(errors.GeometryError, match=message) as raised:
        build()
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("shape", "geometry", "message"),
    [
        ((3, 3), Conv((8, 8)), "has 2 axes"),
        ((4, 3, 3), Conv((8, 8)), "has 3 axes"),
        ((4, 3, 0, 3), Conv((8, 8)), "empty"),
        ((5, 3, 3, 3), Conv((8, 8), groups=2), "groups=2 does not divide the 5 output"),
        ((4, 3, 5), Conv((3,), padding="valid"), "leaves no output"),
        ((4, 3, 3), Conv((8,), boundary="circular", padding="valid"), "circular convolution has 8"),
        ((4, 3, 3), Conv((8,), boundary="circular", padding=3), "circular convolution has 8"),
        (
            (4, 3, 2),
            Conv((5,), stride=2, boundary="circular", padding=0),
            'has 3. Use padding="same", or sizes that the stride 2 divides',
        ),
        ((4, 3, 2), None, "needs a geometry"),
        ((4,), None, "needs a geometry"),
        ((), None, "needs a geometry"),
        ((4, 3, 2), Dense(out_axes=(3,)), "does not fit an array with 3 axes"),
        ((4, 3), Dense(out_axes=(0, 1)), "exactly once"),
        ((4, 3, 2), Dense(out_axes=(0,), in_axes=(1,)), "exactly once"),
        ((4, 3, 2), Dense(out_axes=(0,), in_axes=(-3, 1, 2)), "exactly once"),
        ((0, 3), Dense(), "empty"),
        ((6, 3), Dense(splits=(2, 2)), "add up to 4"),
        ((6, 3), Dense(splits=(2, 2), repeats=2), "add up to 8 in 2 turns"),
        ((6, 3), "conv", "must be Dense"),
    ],
)
def test_arrays_that_do_not_fit(shape: tuple[int, ...], geometry: Any, message: str) -> None:
    with pytest.raises(errors.GeometryError, match=message):
        specops.spectral_norm(np.ones(shape), geometry)
    with pytest.raises(errors.GeometryError, match=message):
        specops.project_spectral_ball(np.ones(shape), 1.0, geometry)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.ones((2, 2), dtype=np.int32), "int32"),
        (np.ones((2, 2), dtype=bool), "bool"),
        ([[1.0, 2.0], [3.0, 4.0]], "got list"),
        (3.0, "got float"),
    ],
)
def test_arrays_that_cannot_be_measured(w: Any, message: str) -> None:
    with pytest.raises(errors.UnsupportedArrayError, match=message) as raised:
        specops.spectral_norm(w)
    assert isinstance(raised.value, TypeError)


def test_torch_arrays_that_cannot_be_measured() -> None:
    torch = pytest.importorskip("torch")
    for w, message in [
        (torch.empty(3, 3, device="meta"), "materialise"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.nn.LazyLinear(3).weight, "run one forward"),
        (torch.ones(3, 3).to(torch.float8_e4m3fn), "float8"),
        (torch.ones(3, 3, dtype=torch.int8), "int8"),
    ]:
        with pytest.raises(errors.UnsupportedArrayError, match=message):
            specops.spectral_norm(w)


def test_frozen_hashable_and_equal_however_written() -> None:
    assert Conv((8, 8), stride=2) == Conv([8, 8], stride=(2, 2), padding="SAME")
    assert hash(Conv(8)) == hash(Conv((8,)))
    assert Conv(np.int64(8)) == Conv(8)
    assert Dense(out_axes=1) == Dense(out_axes=(1,))
    with pytest.raises(AttributeError):
        Conv(8).groups = 2  # type: ignore[misc]
    for geometry in (Conv((8, 8), stride=2), Dense(splits=(2, 3))):
        assert pickle.loads(pickle.dumps(geometry)) == copy.deepcopy(geometry) == geometry


@pytest.mark.parametrize("kind", [SlicedWindows, GatheredWindows])
@given(case=convolutions())
def test_products_are_those_of_the_explicit_matrix_and_adjoint(kind: Any, case: Case) -> None:
    w = case.weight()
    matrix = oracle.conv_matrix(w, case.geometry)
    if case.geometry.transposed:
        matrix = matrix.T
    if w.dtype.kind == "c" and case.geometry.transposed:
        matrix = matrix.conj()
        w = w.conj()
    sizes = case.geometry.sizes(w.shape)
    with mock.patch.object(convolution, "windows", lambda sizes, _: kind(sizes)):
        operator = ConvOperator(case.geometry.kernel(w), sizes)
    assert operator.shape == matrix.shape
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((2, n)) for n in matrix.shape[::-1])
    x, y = x.astype(w.dtype), y.astype(w.dtype)
    np.testing.assert_allclose(operator.matvec(x), x @ matrix.T, atol=1e-10)
    np.testing.assert_allclose(operator.rmatvec(y), y @ matrix.conj(), atol=1e-10)
    np.testing.assert_allclose(
        np.vdot(y[0], operator.matvec(x[0])), np.vdot(operator.rmatvec(y[0]), x[0]), atol=1e-9
    )
    np.testing.assert_allclose(
        operator.squared_frobenius(), (np.abs(matrix) ** 2).sum(), rtol=1e-10, atol=1e-20
    )
    np.testing.assert_allclose(operator.to_matrix(), matrix, atol=1e-12)
    found = operator.gradient(y[0], x[0])
    expected = (np.vdot(found, operator.data), np.vdot(y[0], operator.matvec(x[0])))
    np.testing.assert_allclose(*expected, atol=1e-9)


@given(convolutions())
def test_kernels_round_trip_through_their_canonical_form(case: Case) -> None:
    w = case.weight()
    np.testing.assert_array_equal(case.geometry.weight(case.geometry.kernel(w)), w)


def test_dense_round_trip_on_every_backend(eager: Backend, rng: np.random.Generator) -> None:
    geometry = Dense(out_axes=(3, 1), in_axes=(2,), batch_axes=(0,), splits=(4, 6))
    w = eager.array(rng.standard_normal((2, 5, 3, 2)))
    blocks = geometry.blocks(w)
    assert [tuple(b.shape) for b in blocks] == [(2, 4, 3), (2, 6, 3)]
    back = geometry.assemble(blocks, tuple(w.shape))
    np.testing.assert_array_equal(eager.numpy(back), eager.numpy(w))
    turns = Dense((1, 2), (3,), (0,), splits=(2, 1), repeats=5)
    found = turns.blocks(w)
    assert turns.matrix_shapes(tuple(w.shape)) == ((10, 2), (5, 2))
    for block, part in zip(found, (slice(2), slice(2, 3)), strict=True):
        wanted = eager.numpy(w)[:, :, part].reshape(2, -1, 2)
        np.testing.assert_array_equal(eager.numpy(block), wanted)
    np.testing.assert_array_equal(eager.numpy(turns.assemble(found, (2, 5, 3, 2))), eager.numpy(w))


@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize(
    ("stride", "transposed", "boundary"),
    [(1, False, "zeros"), (3, False, "zeros"), (2, True, "zeros"), (1, False, "circular")],
)
def test_a_covering_geometry_bounds_both_sizes(
    padding: Any, stride: int, transposed: bool, boundary: Any, rng: np.random.Generator
) -> None:
    layout = "IO*" if transposed else "OI*"
    padding = "same" if boundary == "circular" else padding
    options: dict[str, Any] = {
        "stride": stride,
        "transposed": transposed,
        "boundary": boundary,
        "padding": padding,
        "layout": layout,
    }
    kernels = [np.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 4), rng.normal(size=(2, 2, 4))]
    for first, second in ((4, 3), (3, 4), (3, 6), (5, 8), (8, 5)):
        pair = [Conv((n,), **options) for n in (first, second)]
        if padding == "valid" and not transposed:
            pair = [Conv((n + 3,), **options) for n in (first, second)]
        covering = pair[0].covering(pair[1].grid)
        assert covering == pair[1].covering(pair[0].grid)
        apart = padding == "same" and stride == 3 and bool((first - second) % 3)
        assert (covering.grid is None) is (boundary == "circular" or apart)
        for w in kernels:
            if covering.grid is None:
                upper = specops.spectral_norm_bounds(w, covering).upper
            else:
                upper = specops.spectral_norm(w, covering)
            for geometry in pair:
                norm = np.linalg.norm(oracle.conv_matrix(w, geometry), 2)
                assert norm <= upper * (1 + 1e-12)
