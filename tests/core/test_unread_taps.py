"""Taps that only ever read padding: nothing measures them and no projection changes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import specops
from specops import Conv, errors
from specops.tracking import TrackedOperator, TrackedTorus
from tests import oracle, structured
from tests.backends import BACKENDS, Backend, leave_to_others
from tests.core.stable_ranks import least_along
from tests.strategies import Case

LAYERS: list[tuple[tuple[int, ...], Conv]] = [
    ((4, 3, 3, 3), Conv((1, 1), padding=1)),
    ((3, 4, 3, 3), Conv((2, 2), stride=2, padding=1)),
    ((2, 2, 5), Conv((2,))),
    ((2, 3, 5, 3), Conv((2, 4), dilation=(2, 1))),
    ((4, 1, 3, 3), Conv((2, 1), groups=2, padding=2, dilation=2)),
    # Every other tap is read, and the first and last are not.
    ((2, 2, 6), Conv((1,), stride=2, padding=((3, 4),))),
    ((3, 5, 2, 2), Conv((1, 3), layout="*IO", padding=3, dilation=(3, 1))),
    ((2, 3, 5), Conv((2,), transposed=True, stride=2, padding=3, layout="IO*")),
    ((5, 3, 2), Conv((1,), transposed=True, padding=2, layout="*OI")),
]
"""Each with taps that are never read."""
SILENT: list[tuple[tuple[int, ...], Conv]] = [
    ((2, 2, 2), Conv((1,), dilation=2, padding=1)),
    ((2, 2, 2, 3), Conv((1, 3), dilation=(2, 1), padding=1)),
    ((2, 2, 2), Conv((2,), stride=4, dilation=4, padding=2)),
]
"""No tap reads anything."""


def spatial(w: np.ndarray, geometry: Conv) -> np.ndarray:
    """Booleans that broadcast against the weight: what is read."""
    first = geometry.layout[0] != "*"
    read = oracle.read_taps(geometry, w.shape[2:] if first else w.shape[:-2])
    return read if first else read[..., None, None]


def pair(w: np.ndarray, geometry: Conv, loud: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """(the weight with zeros where nothing is read, with large entries there)."""
    noise = np.random.default_rng(1).standard_normal(w.shape) * loud
    read = spatial(w, geometry)
    return np.where(read, w, 0.0), np.where(read, w, noise).astype(w.dtype)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def bits(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


@st.composite
def kernels_beyond_their_grids(draw: Any) -> Case:
    """Zero-padded convolutions whose kernels reach past small grids on all sides."""
    ndim = draw(st.sampled_from([1, 1, 2, 2, 3]))
    transposed = draw(st.booleans())
    sizes, taps, strides, dilations, pads = [], [], [], [], []
    for _ in range(ndim):
        n, k = draw(st.integers(1, 3)), draw(st.integers(1, 3 if ndim == 3 else 5))
        s, d = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        span = d * (k - 1) + 1
        sizes.append(n)
        taps.append(k)
        strides.append(s)
        dilations.append(d)
        most = max(0, (n - 1) * s + span - 1) if transposed else 2 * span
        low = draw(st.integers(0, min(span, most)))
        if transposed:
            pads.append((low, draw(st.integers(0, most - low))))
        else:
            pads.append((low, draw(st.integers(max(0, span - n - low), 2 * span))))
    groups = draw(st.sampled_from([1, 1, 2]))
    layout = draw(st.sampled_from(["OI*", "IO*", "*IO", "*OI"]))
    geometry = Conv(
        tuple(sizes),
        stride=tuple(strides),
        dilation=tuple(dilations),
        groups=groups,
        transposed=transposed,
        padding=tuple(pads),
        layout=layout,
    )
    full, part = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3))
    shape = (full, part, *taps) if layout[0] != "*" else (*taps, part, full)
    return Case(geometry, shape, False, draw(st.integers(0, 2**16)))


def with_unread_taps(case: Case) -> None:
    assume(not spatial(case.weight(), case.geometry).all())


@pytest.mark.slow
@given(kernels_beyond_their_grids(), st.sampled_from(list(structured.KINDS)))
@settings(max_examples=60)
def test_every_number_is_that_of_the_explicit_matrix(case: Case, kind: str) -> None:
    geometry = case.geometry
    _, w = pair(structured.weight(case, kind, 1.0, False), geometry)
    matrix = oracle.conv_matrix(w, geometry)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(sigma[0], abs=1e-12)
    np.testing.assert_allclose(specops.singular_values(w, geometry), sigma, atol=1e-12)
    rank = (sigma**2).sum() / (sigma[0] ** 2 or 1.0)
    assert float(specops.stable_rank(w, geometry)) == pytest.approx(rank)
    for rtol in (None, 1e-3):
        bounds = specops.spectral_norm_bounds(w, geometry, rtol=rtol)
        assert float(bounds.lower) <= sigma[0] <= float(bounds.upper)
    follow = TrackedOperator(geometry)
    state = follow.advance(w, follow.start(w, "w"), 20)
    (tracked,) = follow.measured(state)
    assert float(tracked) == pytest.approx(sigma[0], rel=1e-2, abs=1e-12)
    assert not np.where(spatial(w, geometry), 0.0, state["axis"]).any()


@pytest.mark.slow
@given(kernels_beyond_their_grids())
@settings(max_examples=60)
def test_what_is_never_read_has_no_effect(case: Case) -> None:
    with_unread_taps(case)
    geometry = case.geometry
    quiet, loud = pair(case.weight(), geometry, 1e200)
    torus, operator = TrackedTorus(geometry), TrackedOperator(geometry)
    for measure in (
        specops.spectral_norm,
        specops.stable_rank,
        lambda w, g: specops.spectral_norm_bounds(w, g).lower,
        lambda w, g: specops.spectral_norm_bounds(w, g).upper,
        lambda w, g: torus.estimate(w, torus.start(w, "w"))[0],
        lambda w, g: operator.start(w, "w")["sigma"],
    ):
        assert float(measure(loud, geometry)) == float(measure(quiet, geometry))
    top = float(specops.spectral_norm_bounds(quiet, geometry).upper)
    assume(top > 0)
    read = spatial(loud, geometry)
    for share in (1.0, 0.7, 1e-5):
        kept, told = (
            specops.project_spectral_ball(w, share * top, geometry, return_info=True)
            for w in (quiet, loud)
        )
        np.testing.assert_array_equal(told[0], np.where(read, kept[0], loud))
        assert float(told[1].gap) == float(kept[1].gap)
        assert float(told[1].norm_after) == float(kept[1].norm_after) <= share * top
        assert np.linalg.norm(oracle.conv_matrix(told[0], geometry), 2) <= share * top
    assert specops.project_spectral_ball(loud, top * (1 + 1e-9), geometry) is loud


@given(kernels_beyond_their_grids())
@settings(max_examples=200)
def test_the_torus_contains_the_layer(case: Case) -> None:
    """What is read outside the grid falls outside it on the torus as well."""
    sizes = case.geometry.sizes(case.shape)
    torus = sizes.enclosing_torus()
    axes = zip(
        sizes.fine, sizes.coarse, sizes.lower, sizes.stride, sizes.dilation, sizes.read, torus,
        strict=True,
    )  # fmt: skip
    for n, m, lower, s, d, read, points in axes:
        assert points % s == 0
        assert points // s >= m
        for at in (s * p + d * a - lower for p in range(m) for a in read):
            assert at % points == at if 0 <= at < n else at % points >= n


@pytest.mark.slow
@given(kernels_beyond_their_grids())
@settings(max_examples=40)
def test_the_rest_is_projected_as_the_kernel_of_the_taps_that_are_read(case: Case) -> None:
    """Of those, the box of taps from the first to the last, with as much less padding."""
    assume(not case.geometry.transposed and case.geometry.layout == "OI*")
    with_unread_taps(case)
    geometry, w = case.geometry, case.weight()
    taps = w.shape[2:]
    read = oracle.read_taps(geometry, taps)
    assume(read.any())
    box, pads = [], []
    for t, k in enumerate(taps):
        used = np.flatnonzero(read.any(axis=tuple(a for a in range(len(taps)) if a != t)))
        assume(len(used) == used[-1] - used[0] + 1)
        low, high = oracle.pads(geometry, taps)[t]
        d = geometry.dilation[t]
        low, high = low - d * used[0], high - d * (k - 1 - used[-1])
        assume(low >= 0 and high >= 0)
        box.append(slice(used[0], used[-1] + 1))
        pads.append((int(low), int(high)))
    smaller = Conv(
        geometry.input_shape,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
        padding=tuple(pads),
    )
    core = (..., *box)
    cut = np.ascontiguousarray(w[core])
    assert smaller.sizes(cut.shape).coarse == geometry.sizes(w.shape).coarse
    whole, part = (specops.spectral_norm_bounds(*x) for x in ((w, geometry), (cut, smaller)))
    assert float(whole.upper) == pytest.approx(float(part.upper), rel=1e-12)
    bound = 0.6 * float(part.upper)
    projected = specops.project_spectral_ball(w, bound, geometry)
    expected = w.copy()
    expected[core] = specops.project_spectral_ball(cut, bound, smaller)
    np.testing.assert_allclose(projected, expected, atol=1e-9 * np.abs(w).max())


@given(kernels_beyond_their_grids())
@settings(max_examples=40)
def test_stable_rank_projection_leaves_them(case: Case) -> None:
    with_unread_taps(case)
    geometry = case.geometry
    quiet, loud = pair(case.weight(), geometry)
    full = float(specops.stable_rank(quiet, geometry))
    assume(full > 1 + 1e-6)
    for share in (0.9, 0.4):
        target = 1 + share * (full - 1)
        if target < least_along(quiet, geometry):
            continue
        kept = specops.project_stable_rank(quiet, geometry, target=target)
        told, info = specops.project_stable_rank(loud, geometry, target=target, return_info=True)
        np.testing.assert_array_equal(told, np.where(spatial(loud, geometry), kept, loud))
        sigma = oracle.spectrum(told, geometry)
        assert (sigma**2).sum() / sigma[0] ** 2 <= target * (1 + 1e-9)
        assert float(info.distance) == pytest.approx(np.linalg.norm(told - loud), abs=1e-9)


@pytest.mark.parametrize(("shape", "geometry"), [LAYERS[i] for i in (1, 5, 6, 7)])
def test_on_every_backend(backend: Backend, shape: tuple[int, ...], geometry: Conv) -> None:
    leave_to_others(backend, geometry != LAYERS[1][1])
    dtype = "float64" if backend.doubles else "float32"
    w = pair(normal(shape).astype(dtype), geometry, 1e15)[1]
    given_, read = backend.array(w, dtype), spatial(w, geometry)
    assert not read.all()
    true = np.linalg.norm(oracle.conv_matrix(w.astype(float), geometry), 2)
    eps = float(np.finfo(dtype).eps)

    def measure(x: Any) -> Any:
        bounds = specops.spectral_norm_bounds(x, geometry)
        return specops.spectral_norm(x, geometry), bounds.lower, bounds.upper

    norm, lower, upper = map(float, backend.call(measure, given_))
    assert norm == pytest.approx(true, rel=64 * eps)
    assert lower <= true <= upper <= 2 * true

    target = 1.0 + 0.9 * (float(specops.stable_rank(given_, geometry)) - 1.0)
    for project in (
        lambda x: specops.project_spectral_ball(x, 0.5 * true, geometry),
        lambda x: specops.project_stable_rank(x, geometry, target=target),
    ):
        found = backend.numpy(backend.call(project, given_))
        away = ~np.broadcast_to(read, shape)
        assert bits(found[away]) == bits(w[away])
        assert (found[~away] != w[~away]).any()
    inside = backend.call(
        lambda x: specops.project_spectral_ball(x, 1.01 * upper, geometry), given_
    )
    assert bits(backend.numpy(inside)) == bits(w)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bit_for_bit_in_every_precision(dtype: str) -> None:
    """Negative zeros, subnormal numbers and the largest that there are."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    info, geometry = torch.finfo(kind), Conv((1, 1), padding=1)
    w = torch.asarray(normal((4, 4, 3, 3))).to(kind)
    for i, value in enumerate((-0.0, info.smallest_normal / 4, info.max, -info.tiny)):
        w[i, :, 0, :] = value
    for found in (
        specops.project_spectral_ball(w, 0.1, geometry),
        specops.project_spectral_ball(w, 0.1, geometry, method="accelerated"),
        specops.project_stable_rank(w, geometry, target=1.1),
        specops.project_stable_rank(w, geometry, ratio=0.3),
    ):
        same = (found.view(torch.uint8) == w.view(torch.uint8)).reshape(4, 4, 9, -1).all(-1)
        assert same[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].all()
        assert not same[:, :, 4].all()


@pytest.mark.parametrize(("shape", "geometry"), SILENT)
def test_a_layer_that_reads_nothing_is_zero(
    backend: Backend, shape: tuple[int, ...], geometry: Conv
) -> None:
    leave_to_others(backend, geometry != SILENT[0][1])
    w = normal(shape).astype("float32")
    assert not oracle.conv_matrix(w, geometry).any()

    def measure(x: Any) -> Any:
        bounds = specops.spectral_norm_bounds(x, geometry)
        numbers = specops.spectral_norm(x, geometry), specops.stable_rank(x, geometry)
        return *numbers, bounds.lower, bounds.upper

    given_ = backend.array(w, "float32")
    assert [float(x) for x in backend.call(measure, given_)] == [0.0] * 4
    for project in (
        lambda x: specops.project_spectral_ball(x, 0.1, geometry),
        lambda x: specops.project_stable_rank(x, geometry, target=1.5),
    ):
        assert bits(backend.numpy(backend.call(project, given_))) == bits(w)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "geometry"), [LAYERS[i] for i in (1, 7)])
def test_derivatives_are_zero_there(shape: tuple[int, ...], geometry: Conv) -> None:
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    w = pair(normal(shape), geometry)[1]
    read = spatial(w, geometry)
    bound = 0.5 * float(specops.spectral_norm(w, geometry))
    direction = normal(shape, 3)

    def functions(dot: Any) -> list[Any]:
        return [
            lambda x: specops.spectral_norm(x, geometry),
            lambda x: specops.stable_rank(x, geometry),
            lambda x: specops.spectral_norm_bounds(x, geometry).upper,
            lambda x: dot(specops.project_spectral_ball(x, bound, geometry)),
        ]

    of_torch = functions(lambda x: (x * torch.asarray(direction)).sum())
    of_jax = functions(lambda x: (x * direction).sum())
    for i, (f, g) in enumerate(zip(of_torch, of_jax, strict=True)):
        x = torch.tensor(w, requires_grad=True)
        f(x).backward()
        slopes = [x.grad.numpy(), np.asarray(jax.jit(jax.grad(g))(w))]
        if i == 0:  # all by one mechanism, whose operations are compiled one by one
            slopes.append(np.asarray(jax.grad(g)(w)))
        for slope in slopes:
            assert np.isfinite(slope).all()
            assert np.any(np.where(read, slope, 0.0))
            rest = np.where(read, 0.0, slope)
            # What a projection leaves as it is passes on what it is given.
            given_on = direction if i == 3 else np.zeros(shape)
            np.testing.assert_array_equal(rest, np.where(read, 0.0, given_on))


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("shape", "geometry"), [LAYERS[i] for i in (4, 5)])
def test_rules(name: str, shape: tuple[int, ...], geometry: Conv) -> None:
    (backend,) = (b for b in BACKENDS if b.name == name)
    leave_to_others(backend, geometry != LAYERS[5][1])
    quiet, loud = (backend.array(x) for x in pair(normal(shape), geometry))
    host = backend.numpy(loud)
    read, away = spatial(host, geometry), ~np.broadcast_to(spatial(host, geometry), shape)
    true = np.linalg.norm(oracle.conv_matrix(host, geometry), 2)

    clip = specops.ClipSpectralNorm(0.5 * true)
    for state in ({}, clip.watch(loud, geometry, "w")):
        clipped = backend.numpy(clip.update(loud, geometry, state)[0])
        assert bits(clipped[away]) == bits(host[away])
        assert np.linalg.norm(oracle.conv_matrix(clipped, geometry), 2) <= 0.5 * true
    upper = float(specops.spectral_norm_bounds(loud, geometry).upper)
    assert specops.ClipSpectralNorm(1.01 * upper).update(loud, geometry, {})[0] is loud

    penalty = specops.SpectralNormPenalty(0.5, norm="operator", iterations=30)
    term = backend.numpy(penalty.update(loud, geometry, penalty.init(loud, geometry, "w"))[0])
    assert not term[away].any()
    assert term[~away].any()

    normalise = specops.SpectralNormalization(norm="operator")
    used = normalise.apply(loud, geometry, normalise.init(loud, geometry, "w"))
    matrix = oracle.conv_matrix(backend.numpy(used), geometry)
    assert np.linalg.norm(matrix, 2) == pytest.approx(1.0, rel=1e-3)

    scaled = specops.NormalizeIfAbove(0.5 * true, norm="operator").update(loud, geometry, {})[0]
    np.testing.assert_allclose(backend.numpy(scaled), 0.5 * host, rtol=1e-5)

    limit, limited = specops.StableRankNormalization(0.3, norm="operator"), []
    for w in (quiet, loud):
        state = limit.init(w, geometry, "w")
        limited.append(backend.numpy(limit.apply(w, geometry, state)))
    np.testing.assert_array_equal(*(np.where(read, x, 0.0) for x in limited))


def test_entries_that_are_no_numbers_are_refused_even_there() -> None:
    """A framework's layer multiplies them by its padding, which gives NaN."""
    w = normal((2, 2, 3, 3))
    w[0, 0, 0, 0] = np.nan
    with pytest.raises(errors.NonFiniteError):
        specops.spectral_norm(w, Conv((1, 1), padding=1))


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_taps_of_a_torus_and_of_every_size_are_all_read(boundary: Any) -> None:
    for n in (None, (1, 1)) if boundary == "circular" else (None, (2, 2)):
        sizes = Conv(n, boundary=boundary).sizes((2, 2, 3, 3))
        assert sizes.reads_all
        assert sizes.read == ((0, 1, 2), (0, 1, 2))
