"""The laws of every rule, the caps by their singular values, and the screening of the clip."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np
import pytest

import specops
from specops import (
    ClipSpectralNorm,
    Conv,
    Dense,
    Monitor,
    NormalizeIfAbove,
    ProjectStableRank,
    SpectralHammer,
    SpectralNormalization,
    SpectralNormPenalty,
    SpectralSoftCap,
    StableRankNormalization,
    TrainableScale,
    errors,
)
from specops.geometry import Geometry
from specops.rules import Rule
from tests import oracle
from tests.backends import Backend


class Law(NamedTuple):
    """A rule for a bound, and which laws hold for it."""

    make: Callable[[float], Any]
    degree: int = 1  # power of s by which the result grows where weight and bound grow by s
    idempotent: bool = False
    transposes: bool = True  # with convolutions; with matrices all do


LAWS = {
    "clip": Law(lambda c: ClipSpectralNorm(c, distance_tolerance=0.0), 1, True),
    "normalize operator": Law(lambda c: NormalizeIfAbove(c, norm="operator"), 1, True),
    "normalize reshaped": Law(lambda c: NormalizeIfAbove(c, norm="reshaped"), 1, True, False),
    "soft cap": Law(lambda c: SpectralSoftCap(c, norm="reshaped"), 1, True, False),
    "hammer operator": Law(lambda c: SpectralHammer(c, norm="operator")),
    "hammer reshaped": Law(lambda c: SpectralHammer(c, norm="reshaped"), 1, False, False),
    "project operator": Law(lambda c: ProjectStableRank(ratio=0.5, norm="operator"), 1, True),
    "project reshaped": Law(
        lambda c: ProjectStableRank(target=1.4, norm="reshaped"), 1, True, False
    ),
    "divide operator": Law(lambda c: SpectralNormalization(norm="operator", scale=1.5), 0),
    "divide reshaped": Law(lambda c: SpectralNormalization(norm="reshaped"), 0, False, False),
    "divide bidirectional": Law(lambda c: SpectralNormalization(norm="bidirectional"), 0),
    "rank operator": Law(lambda c: StableRankNormalization(0.4, norm="operator"), 0),
    "rank reshaped": Law(lambda c: StableRankNormalization(0.4, norm="reshaped"), 0, False, False),
    "penalty operator": Law(lambda c: SpectralNormPenalty(0.3, norm="operator")),
    "penalty reshaped": Law(lambda c: SpectralNormPenalty(0.3, norm="reshaped"), 1, False, False),
    "penalty bidirectional": Law(lambda c: SpectralNormPenalty(0.3, norm="bidirectional")),
    "monitor": Law(lambda c: Monitor(), 1, True),
}
GEOMETRIES: dict[str, tuple[tuple[int, ...], Geometry]] = {
    "dense": ((5, 4), Dense()),
    "stack": ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    "blocks": ((7, 4), Dense(splits=(5, 2))),
    "circular": ((4, 2, 3, 3), Conv((6, 4), stride=2, groups=2, boundary="circular")),
    "zeros": ((3, 3, 4), Conv((7,), layout="*IO")),
    "transposed": ((3, 4, 3), Conv((4,), transposed=True, stride=2, padding=1, layout="IO*")),
}
# A second for each rule and geometry where a compiler is at work.
FEW = {
    "array_api_strict-CPU_DEVICE": ("dense", "transposed"),
    "array_api_strict-device1": ("stack", "circular"),
    "array_api_strict-no_x64": ("blocks", "zeros"),
    "jax": ("stack",),
    "jax-jit": ("transposed",),
}
every_rule = pytest.mark.parametrize("name", LAWS)


def skip_unless_needed(backend: Backend, *extra: str) -> None:
    """Laws of values hold where they hold on NumPy and all backends agree with it."""
    if backend.name not in ("numpy", "torch", "array_api_strict-no_x64", *extra):
        pytest.skip("alike with NumPy, and slow")


def weight(shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    """Norms of 2 to 7, but for the first of a stack, which is inside a bound of 1."""
    w = np.random.default_rng(seed).standard_normal(shape)
    return w * np.array([0.1, 1.0])[:, None, None] if shape == (2, 5, 4) else w


def cases(backend: Backend) -> Iterator[tuple[Geometry, np.ndarray]]:
    """All of them on NumPy and torch, some on every other backend."""
    for name in FEW.get(backend.name, GEOMETRIES):
        shape, geometry = GEOMETRIES[name]
        yield geometry, weight(shape).astype(np.float32)


def outcome(
    rule: Any, w: Any, geometry: Geometry, state: Any = None, *, step: int = 1, name: str = "w"
) -> tuple[Any, Any, Any]:
    """(the new weight, the gradient, or the weight in use; state; figures) of one firing."""
    state = rule.init(w, geometry, name) if state is None else state
    result, state, figures = rule.update(w, geometry, state, step=step, name=name)
    if rule.stage == "forward":
        assert result is w
        result = rule.apply(w, geometry, state, step=step, name=name)
    return result, state, figures


def assert_near(got: Any, expected: Any, geometry: Geometry, rule: Any, rtol: float) -> None:
    if isinstance(rule, ClipSpectralNorm) and isinstance(geometry, Conv):
        rtol = max(rtol, 0.02)  # certified to ‖X − X*‖² ≤ 1e-4‖K‖²
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * scale)


def flat(backend: Backend, figures: Any) -> np.ndarray:
    """In the order of their names, as compilers return them."""
    values = [v for _, v in sorted(figures.items())]
    arrays = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
    return np.concatenate([np.ravel(backend.numpy(x)) for x in arrays])


@every_rule
def test_protocol(name: str) -> None:
    rule = LAWS[name].make(1.0)
    assert isinstance(rule, Rule)
    assert rule.stage in ("weights", "gradients", "forward")
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule)
    assert hash(rule) == hash(copy.deepcopy(rule))


@every_rule
def test_pure_of_one_kind_and_alike_on_all_backends(backend: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(backend):
        if backend.traced and (name == "soft cap" or "reshaped" in name):
            continue  # compiled elsewhere
        w = backend.array(host)
        # Compilers get the state of NumPy: that of their own takes them seconds.
        start = rule.init(host if backend.traced else w, geometry, "w")
        start = {key: backend.convert(x) for key, x in start.items()} if backend.traced else start

        def fire(x: Any, state: Any, geometry: Geometry = geometry) -> Any:
            return outcome(rule, x, geometry, state)

        result, state, figures = backend.call(fire, w, start)
        backend.same_kind(result, w)
        assert result.shape == w.shape
        for held in (start, state):
            assert type(held) is dict
            for key, value in held.items():
                assert isinstance(key, str)
                assert compat.array_namespace(value, w) is compat.array_namespace(w)
                assert backend.traced or compat.device(value) == compat.device(w)
        np.testing.assert_array_equal(backend.numpy(w), host)
        for held in () if backend.traced else (start, state):
            before = {key: backend.numpy(value).copy() for key, value in held.items()}
            fire(w, held)
            assert before.keys() == held.keys()
            for key, value in held.items():
                np.testing.assert_array_equal(backend.numpy(value), before[key])
        expected, _, wanted = outcome(rule, host.astype(np.float64), geometry)
        assert_near(backend.numpy(result), expected, geometry, rule, 2e-5)
        assert figures.keys() == wanted.keys()
        if not isinstance(rule, ClipSpectralNorm):
            np.testing.assert_allclose(
                flat(backend, figures), flat(backend, wanted), rtol=2e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.idempotent])
def test_idempotent(backend: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(backend):
        if backend.traced and (name == "soft cap" or "reshaped" in name):
            continue

        def fire(x: Any, geometry: Geometry = geometry) -> Any:
            return outcome(rule, x, geometry)[0]

        once = backend.call(fire, backend.array(host))
        again = backend.call(fire, once)
        np.testing.assert_allclose(backend.numpy(again), backend.numpy(once), rtol=0, atol=2e-6)
        if isinstance(rule, ClipSpectralNorm | ProjectStableRank) and not backend.traced:
            assert again is once


_STRIDED = Conv((8,), padding=1, stride=2)
_CIRCULAR = Conv((4, 4), boundary="circular")
_GROUPED = Conv((6,), stride=2, groups=2, boundary="circular")
TRANSPOSED: list[tuple[tuple[int, ...], Conv, Conv]] = [
    ((4, 3, 4), _STRIDED, Conv((4,), padding=1, stride=2, transposed=True, layout="IO*")),
    ((4, 3, 3, 3), _CIRCULAR, _CIRCULAR.transpose()),
    ((4, 2, 3), _GROUPED, _GROUPED.transpose()),
]


@every_rule
def test_stacks_transposes_and_changes_of_basis(
    eager: Backend, name: str, rng: np.random.Generator
) -> None:
    skip_unless_needed(eager)
    law = LAWS[name]
    rule = law.make(1.0)

    def result(w: np.ndarray, geometry: Geometry) -> np.ndarray:
        dtype = "complex64" if np.iscomplexobj(w) else "float32"
        return eager.numpy(outcome(rule, eager.array(w, dtype), geometry)[0])

    host = weight((2, 5, 4))
    one_by_one = np.stack([result(w, Dense()) for w in host])
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    phases = np.exp(1j * np.arange(5))[:, None] * np.exp(2j * np.arange(4))
    last = Dense(batch_axes=(-1,))
    for got, expected in [
        (result(host, GEOMETRIES["stack"][1]), one_by_one),
        (result(np.moveaxis(host, 0, 2), last), np.moveaxis(one_by_one, 0, 2)),
        (result(host.reshape(10, 4), Dense(splits=(5, 5))), one_by_one.reshape(10, 4)),
        (result(host[1].T, Dense()), one_by_one[1].T),
        (result(host[1], Dense().transpose(2)), one_by_one[1]),
        (result(left @ host[1] @ right, Dense()), left @ one_by_one[1] @ right),
        (result(phases * host[1], Dense()), phases * one_by_one[1]),
    ]:
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)
    if not law.transposes or eager.name.startswith("array_api_strict"):
        return
    for shape, conv, transposed in TRANSPOSED:
        there, back = (result(weight(shape), g) for g in (conv, transposed))
        # Iterations that stop at 1e-4 of the norm stop elsewhere.
        assert_near(back, there, conv, rule, 2e-3 if "operator" in name else 5e-6)


@every_rule
@pytest.mark.parametrize("scale", [2.0**40, 1e20, 1e-20])
def test_scaling(eager: Backend, name: str, scale: float) -> None:
    skip_unless_needed(eager, "jax")
    law = LAWS[name]
    keys = ("stack", "circular", "zeros") if eager.name in ("numpy", "torch") else ("stack",)
    for shape, geometry in [GEOMETRIES[key] for key in keys]:
        host = weight(shape).astype(np.float32)
        rule, scaled = law.make(1.0), law.make(scale)
        plain, _, before = outcome(rule, eager.array(host), geometry)
        with np.errstate(over="ignore"):  # a penalty's value is a square
            got, state, after = outcome(scaled, eager.array(host * np.float32(scale)), geometry)
        got = eager.numpy(got).astype(np.float64) / scale**law.degree
        tolerance = 2e-6 if math.log2(scale) % 1 == 0 else 2e-5
        assert_near(got, eager.numpy(plain), geometry, rule, tolerance)
        assert all(np.isfinite(eager.numpy(x)).all() for x in state.values())
        for key in before.keys() & {"norm", "norm_before", "norm_after"}:
            seen = eager.numpy(after[key]) / scale
            np.testing.assert_allclose(seen, eager.numpy(before[key]), rtol=1e-3)


@every_rule
def test_zero_stays_zero(eager: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(eager):
        result, state, figures = outcome(rule, eager.array(np.zeros_like(host)), geometry)
        np.testing.assert_array_equal(eager.numpy(result), 0.0)
        assert all(np.isfinite(eager.numpy(x)).all() for x in state.values())
        assert np.isfinite(flat(eager, figures)).all()
        # What is no longer zero finds its way from there, and a zero in a stack hurts no other.
        later = eager.numpy(outcome(rule, eager.array(host), geometry, state)[0])
        assert np.isfinite(later).all()
        assert later.any()
        if isinstance(geometry, Dense) and geometry.batch_axes:
            mixed = eager.array(host * np.array([1, 0], host.dtype)[:, None, None])
            got = eager.numpy(outcome(rule, mixed, geometry)[0])
            np.testing.assert_array_equal(got[1], 0.0)
            alone = eager.numpy(outcome(rule, eager.array(host), geometry)[0])
            np.testing.assert_allclose(got[0], alone[0], rtol=0, atol=5e-6)


def halves(backend: Backend, w: np.ndarray) -> Iterator[Any]:
    """The weight in every half precision dtype that the library has."""
    if backend.name == "numpy":
        yield w.astype(np.float16)
    elif backend.name.startswith("torch"):
        torch = pytest.importorskip("torch")
        yield from (backend.array(w).to(d) for d in (torch.float16, torch.bfloat16))
    elif backend.name == "jax":
        numpy = pytest.importorskip("jax.numpy")
        yield from (backend.array(w).astype(d) for d in (numpy.float16, numpy.bfloat16))


@every_rule
def test_half_precision_storage(eager: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for key in ("stack",) if eager.name == "jax" else ("stack", "circular", "zeros"):
        shape, geometry = GEOMETRIES[key]
        for w in halves(eager, weight(shape)):
            result, state, _ = outcome(rule, w, geometry)
            eager.same_kind(result, w)
            assert all("16" not in str(x.dtype) for x in state.values())
            stored = np.asarray(eager.numpy(result)).astype(np.float64)
            exact = np.asarray(eager.numpy(w)).astype(np.float64)
            expected = outcome(rule, exact, geometry)[0]
            assert_near(stored, expected, geometry, rule, 0.04)
            if name in ("clip", "normalize operator"):
                assert oracle.spectrum(stored, geometry).max() <= 1.0 + 1e-9


SCHEDULED: dict[str, tuple[Callable[[Any], Any], float]] = {
    "clip": (ClipSpectralNorm, 0.8),
    "normalize": (lambda c: NormalizeIfAbove(c, norm="operator"), 0.8),
    "soft cap": (lambda c: SpectralSoftCap(c, norm="operator"), 0.8),
    "hammer": (lambda c: SpectralHammer(c, norm="operator"), 0.8),
    "ratio": (lambda r: ProjectStableRank(ratio=r, norm="operator"), 0.3),
    "target": (lambda r: ProjectStableRank(target=r, norm="operator"), 1.3),
    "scale": (lambda s: SpectralNormalization(norm="operator", scale=s), 1.7),
    "forward ratio": (lambda r: StableRankNormalization(r, norm="operator"), 0.3),
    "strength": (lambda s: SpectralNormPenalty(s, norm="operator"), 0.2),
}
every_number = pytest.mark.parametrize("name", SCHEDULED)


@every_number
def test_schedules(eager: Backend, name: str) -> None:
    make, number = SCHEDULED[name]
    seen = []

    def schedule(step: int, name: str, geometry: Geometry) -> float:
        seen.append((step, name, geometry))
        return number if step == 7 else number * 0.9

    w = eager.array(weight((5, 4)).astype(np.float32))
    fixed = eager.numpy(outcome(make(number), w, Dense())[0])
    got = eager.numpy(outcome(make(schedule), w, Dense(), step=7, name="layer")[0])
    np.testing.assert_allclose(got, fixed, rtol=0, atol=1e-6)
    assert set(seen) == {(7, "layer", Dense())}
    other = eager.numpy(outcome(make(schedule), w, Dense(), step=8)[0])
    assert np.abs(other - fixed).max() > 1e-3


@every_number
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_values_of_a_schedule_are_checked_when_used(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        outcome(SCHEDULED[name][0](lambda *_: value), weight((5, 4)), Dense())


@every_number
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, True])
def test_bad_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|give exactly one"):
        SCHEDULED[name][0](value)


@every_number
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_numbers_of_numpy(name: str, number: Any) -> None:
    make, value = SCHEDULED[name]
    w = weight((5, 4))
    got = outcome(make(number(value)), w, Dense())[0]
    np.testing.assert_allclose(got, outcome(make(value), w, Dense())[0], atol=1e-6)


BAD: list[tuple[Any, dict[str, Any]]] = [
    (ClipSpectralNorm, {"max_norm": 1.0, "distance_tolerance": -0.1}),
    (NormalizeIfAbove, {"max_norm": 1.0, "norm": "bidirectional"}),
    (SpectralHammer, {"max_norm": 1.0, "norm": "bidirectional"}),
    (ProjectStableRank, {"norm": "operator"}),
    (ProjectStableRank, {"norm": "operator", "ratio": 0.5, "target": 2.0}),
    (ProjectStableRank, {"norm": "operator", "ratio": 0.5, "preserve": -1}),
    (ProjectStableRank, {"norm": "bidirectional", "ratio": 0.5}),
    (SpectralNormalization, {"norm": "frobenius"}),
    (SpectralNormalization, {"norm": "reshaped", "iterations": 0}),
    (StableRankNormalization, {"norm": "bidirectional", "ratio": 0.5}),
    (SpectralNormPenalty, {"norm": "reshaped", "strength": 0.1, "iterations": 1.5}),
    (TrainableScale, {"initial": 0.0}),
]


@pytest.mark.parametrize(("make", "options"), BAD)
def test_bad_arguments(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|give exactly one"):
        make(**options)


@every_rule
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_state_that_does_not_fit_is_not_used(name: str, size: float) -> None:
    """Of no firing yet, of another input size, shape or geometry; outside and inside."""
    rule = LAWS[name].make(1.0)
    kernel, matrix = size * weight((4, 3, 3, 3)), size * weight((5, 4))
    uses: list[tuple[np.ndarray, Any, Geometry]] = [
        (kernel, (kernel, Conv((6, 7))), Conv((3, 4))),
        (kernel, (kernel, Conv((3, 4))), Conv((6, 7))),
        (kernel, (kernel, Dense()), Conv((3, 4))),
        (kernel, (kernel, Conv((3, 4))), Dense()),
        (matrix, (size * weight((6, 4)), Dense()), Dense()),
        (matrix, None, Dense()),
    ]
    for w, before, now in uses:
        state = {} if before is None else outcome(rule, *before)[1]
        fresh = outcome(rule, w, now)[0]
        assert_near(outcome(rule, w, now, state)[0], fresh, now, rule, 1e-2)


@every_rule
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_nan_is_refused_or_told(name: str, boundary: Any) -> None:
    """By an error, or by the figures; never by a warning of an array library."""
    rule = LAWS[name].make(1.0)
    conv = Conv((5,), boundary=boundary)
    used: list[tuple[tuple[int, ...], Geometry]] = [((5, 4), Dense()), ((4, 3, 3), conv)]
    for shape, geometry in used:
        w = weight(shape)
        good = rule.init(w, geometry, "w")
        w[0, 0] = np.nan
        for state in (None, good):
            try:
                _, _, figures = outcome(rule, w, geometry, state)
            except errors.NonFiniteError:
                continue
            assert state is good
            assert not all(np.isfinite(x).all() for x in figures.values())


@pytest.mark.parametrize("name", ["clip", "normalize operator", "soft cap"])
def test_one_nan_matrix_leaves_the_others_of_a_stack_capped(name: str) -> None:
    w = weight((2, 5, 4))[::-1].copy()
    w[1, 0, 0] = np.nan
    with pytest.warns(errors.NonFiniteWarning):
        got = outcome(LAWS[name].make(1.0), w, GEOMETRIES["stack"][1])[0]
    assert np.linalg.norm(got[0], 2) <= 1.0 + 1e-9


def with_values(values: Any) -> tuple[np.ndarray, ...]:
    """(w, u, v) with w = u·diag(values)·vᵀ of shape (5, 4)."""
    u, _, vh = np.linalg.svd(weight((5, 4)), full_matrices=False)
    return (u * np.asarray(values)) @ vh, u, vh.T


def test_normalize_if_above(backend: Backend) -> None:
    def fire(x: Any) -> Any:
        return outcome(NormalizeIfAbove(1.0, norm="operator"), x, Dense())

    for top in (3.0, 1.0, 0.4):
        w, _, _ = with_values([top, 0.3, 0.2, 0.0])
        given = backend.array(w, "float32")
        got, _, figures = backend.call(fire, given)
        np.testing.assert_allclose(backend.numpy(got), w * min(1.0, 1.0 / top), atol=2e-6)
        np.testing.assert_allclose(flat(backend, figures), [min(top, 1.0), top], rtol=1e-5)
        assert backend.traced or top > 0.5 or got is given


def test_normalize_if_above_for_every_size() -> None:
    w = weight((4, 3, 3))
    got = outcome(NormalizeIfAbove(1.0, norm="operator"), w, Conv(None))[0]
    assert 0.95 <= oracle.spectrum(got, Conv((64,), boundary="circular"))[0] <= 1.0
    np.testing.assert_allclose(got / w, (got / w).flat[0])


def soft_capped(x: Any) -> Any:
    """Of one name, so that it is compiled once."""
    return outcome(SpectralSoftCap(1.0, norm="reshaped"), x, Dense())


@pytest.mark.parametrize("top", [1.1, 1.6, 8.0, 50.0, 1e15])
def test_soft_cap(backend: Backend, top: float) -> None:
    values = np.array([top, 0.9 * top, 0.5, 0.01])
    w, u, v = with_values(values)
    got, _, figures = backend.call(soft_capped, backend.array(w, "float32"))
    turned = u.T @ backend.numpy(got).astype(np.float64) @ v
    after = np.diag(turned)
    assert np.linalg.norm(turned, 2) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(turned, 2) <= 1.0 + 1e-6
    np.testing.assert_allclose(flat(backend, figures), [1.0, top], rtol=1e-5)
    # Small values drown in the rounding of large ones before those are pressed.
    rounding = 1e-6 * top
    if top < 100.0:
        np.testing.assert_allclose(turned - np.diag(after), 0.0, atol=5 * rounding)
        assert (np.diff(after) <= rounding).all()
    if top < 2.0:
        # x ↦ x − 3α²x⁵ + …, with α ≤ 1/(3σ₁²)
        np.testing.assert_allclose(after[3], values[3], rtol=1e-4, atol=rounding)
        assert values[2] - 0.05 < after[2] <= values[2] + rounding
    # Once inside, nothing moves.
    inside = backend.array(w / (1.01 * top), "float32")
    np.testing.assert_array_equal(
        backend.numpy(backend.call(soft_capped, inside)[0]), backend.numpy(inside)
    )


def test_soft_cap_refuses_an_operator() -> None:
    rule = SpectralSoftCap(1.0, norm="operator")
    assert "reshaped" in rule.obstacle(Conv((5,)))
    assert rule.obstacle(Dense()) == ""
    with pytest.raises(errors.UnsupportedGeometryError, match="reshaped"):
        outcome(rule, weight((4, 3, 3)), Conv((5,)))


def test_hammer_moves_one_value(backend: Backend) -> None:
    def fire(x: Any) -> Any:
        return outcome(SpectralHammer(1.5, norm="operator"), x, Dense())

    values = [4.0, 2.5, 0.8, 0.1]
    w, u, v = with_values(values)
    got, _, figures = backend.call(fire, backend.array(w, "float32"))
    turned = u.T @ backend.numpy(got).astype(np.float64) @ v
    np.testing.assert_allclose(turned, np.diag([1.5, *values[1:]]), atol=5e-6)
    np.testing.assert_allclose(flat(backend, figures), [1.5, 4.0], rtol=1e-5)
    calm = backend.array(w / 4.0, "float32")
    after = backend.call(fire, calm)[0]
    np.testing.assert_array_equal(backend.numpy(after), backend.numpy(calm))
    assert backend.traced or after is calm


@pytest.mark.parametrize("key", ["circular", "zeros", "transposed"])
def test_hammer_on_an_operator(key: str) -> None:
    shape, geometry = GEOMETRIES[key]
    assert isinstance(geometry, Conv)
    w = weight(shape)
    rule = SpectralHammer(1.0, norm="operator")
    state = rule.init(w, geometry, "w")
    for _ in range(100):
        got, state, _ = rule.update(w, geometry, state)
    u, s, vh = np.linalg.svd(oracle.conv_matrix(w, geometry))
    assert u[:, 0] @ oracle.conv_matrix(got, geometry) @ vh[0] == pytest.approx(1.0, abs=1e-6)
    # Of all kernels for which that holds it is the nearest: it moved along the gradient.
    along = (w - got) / np.linalg.norm(w - got)
    ahead, behind = (oracle.spectrum(w + h * along, geometry)[0] for h in (1e-5, -1e-5))
    steepest = (s[0] - 1.0) / np.linalg.norm(w - got)
    assert (ahead - behind) / 2e-5 == pytest.approx(steepest, rel=1e-6)


class Screening:
    """A clip, its state, and how often it was certified."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, geometry: Geometry, **options: Any):
        self.rule = ClipSpectralNorm(**{"max_norm": 1.0, **options})
        self.geometry, self.certified = geometry, 0
        self.state: dict[str, Any] = {}

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.certified += 1
            return specops.project_spectral_ball(*args, **kwargs)

        monkeypatch.setattr("specops.rules.clip.project_spectral_ball", counted)

    def fire(self, w: Any, *, enforce: bool = False) -> tuple[Any, Any]:
        act = self.rule.enforce if enforce else self.rule.update
        new, self.state, figures = act(w, self.geometry, self.state, name="w")
        return new, figures


CALM, GROWN = np.diag([0.6, 0.2, 0.1, 0.0]), np.diag([0.5, 3.0, 0.1, 0.0])
"""Power steps from the first axis alone never leave it."""


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
@pytest.mark.parametrize("key", ["dense", "stack", "blocks", "circular", "zeros"])
def test_inside_is_certified_once_and_then_estimated(
    monkeypatch: pytest.MonkeyPatch, eager: Backend, key: str, scale: float
) -> None:
    if scale != 1.0 or (eager.name == "jax" and key != "stack"):
        skip_unless_needed(eager)
    shape, geometry = GEOMETRIES[key]
    host = weight(shape)
    norm = np.max(outcome(ClipSpectralNorm(1e3), host, geometry)[2]["norm_before"])
    screening = Screening(monkeypatch, geometry, max_norm=scale)

    def of_norm(size: float) -> Any:
        return eager.array(host * (size * scale / norm), "float32")

    w = of_norm(0.8)
    new, certified = screening.fire(w)
    assert new is w
    for _ in range(3):
        new, estimated = screening.fire(w)
        assert new is w
        for name, value in certified.items():
            assert estimated[name].shape == value.shape
            eager.same_kind(estimated[name], value)
            ratio = eager.numpy(estimated[name]) / eager.numpy(value)
            np.testing.assert_allclose(ratio, 1.0, rtol=5e-3)
    assert screening.certified == 1
    # It grows, and the power steps see it.
    new, figures = screening.fire(of_norm(1.2))
    assert screening.certified == 2
    assert np.max(eager.numpy(figures["norm_before"])) / scale == pytest.approx(1.2, rel=1e-3)
    assert np.max(eager.numpy(figures["norm_after"])) <= scale * (1 + 1e-6)
    # Found outside, it is certified until it is inside again, and always near the bound.
    near = of_norm(0.97)
    for count in (3, 4, 5):
        assert screening.fire(near)[0] is near
        assert screening.certified == count


def test_a_fooled_estimate_lasts_to_the_hundredth_firing(
    monkeypatch: pytest.MonkeyPatch, eager: Backend
) -> None:
    skip_unless_needed(eager)
    screening = Screening(monkeypatch, Dense())
    screening.fire(eager.array(CALM))
    grown, low = eager.array(GROWN), eager.array(np.asarray(0.5))
    blind = lambda weight, geometry, state, to_left: (low, state)  # noqa: E731
    monkeypatch.setattr("specops.rules.clip._estimate", blind)
    for firing in range(2, 100):
        new, figures = screening.fire(grown)
        assert new is grown, firing
    assert screening.certified == 1
    assert float(figures["norm_after"]) == pytest.approx(0.5)
    new, figures = screening.fire(grown)
    np.testing.assert_allclose(eager.numpy(new), np.minimum(GROWN, 1.0), atol=1e-6)
    assert float(figures["norm_before"]) == pytest.approx(3.0)


def test_the_count_starts_again_after_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    counts = []
    for _ in range(300):
        screening.fire(CALM)
        counts.append(screening.certified)
    assert [counts[0], counts[98], counts[99]] == [1, 1, 2]
    assert (np.diff(np.flatnonzero(np.diff(counts))) <= 100).all()


def test_a_leading_direction_that_turns_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    for angle in np.linspace(0.0, np.pi / 2, 10):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        screening.fire(turn @ np.diag([0.8, 0.5]) @ turn.T)
    assert screening.certified == 1
    # The vectors of the beginning would see 0.5.
    new, _ = screening.fire(turn @ np.diag([1.2, 0.5]) @ turn.T)
    assert np.linalg.norm(new, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("screen", [True, False])
def test_enforce_and_screen_false_certify_at_once(
    monkeypatch: pytest.MonkeyPatch, eager: Backend, screen: bool
) -> None:
    screening = Screening(monkeypatch, Dense(), screen=screen)
    calm, grown = eager.array(CALM), eager.array(GROWN)
    for _ in range(3):
        assert screening.fire(calm, enforce=screen)[0] is calm
    assert screening.certified == 3
    new = screening.fire(grown, enforce=screen)[0]
    np.testing.assert_allclose(eager.numpy(new), np.minimum(GROWN, 1.0), atol=1e-6)


def test_a_bound_that_sinks_below_the_estimate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    assert screening.fire(CALM)[0] is CALM
    screening.rule = ClipSpectralNorm(0.5)
    assert np.linalg.norm(screening.fire(CALM)[0], 2) <= 0.5 + 1e-12


@pytest.mark.parametrize("name", ["clip", "rank operator", "penalty operator"])
def test_jit_takes_a_state_of_an_eager_firing(name: str) -> None:
    jax = pytest.importorskip("jax")
    rule = LAWS[name].make(6.0)  # inside, so that the clip has vectors
    w = jax.numpy.asarray(weight((5, 4)))
    state = outcome(rule, w, Dense())[1]
    eager, later, figures = outcome(rule, 1.1 * w, Dense(), state)
    traced = jax.jit(lambda x, s: outcome(rule, x, Dense(), s))(1.1 * w, state)
    np.testing.assert_allclose(traced[0], eager, rtol=0, atol=1e-6)
    for key, value in figures.items():
        np.testing.assert_allclose(traced[2][key], value, rtol=1e-6)
    if rule.stage != "weights":
        assert traced[1].keys() == later.keys()
        for key, value in later.items():
            np.testing.assert_allclose(traced[1][key], value, rtol=0, atol=1e-8)
