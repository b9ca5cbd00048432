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
from specops.rules import Rule, clip
from tests import oracle
from tests.backends import Backend


class Law(NamedTuple):
    """A rule for a bound, and which laws hold for it."""

    make: Callable[[float], Any]
    degree: int = 1
    """Power of s by which the result grows where weight and bound grow by s."""
    idempotent: bool = False
    transposes: bool = True
    """Whether it commutes with the transposition of convolutions; with that of matrices all do."""


LAWS = {
    "clip": Law(lambda c: ClipSpectralNorm(c, distance_tolerance=0.0), idempotent=True),
    "normalize operator": Law(lambda c: NormalizeIfAbove(c, norm="operator"), idempotent=True),
    "normalize reshaped": Law(
        lambda c: NormalizeIfAbove(c, norm="reshaped"), idempotent=True, transposes=False
    ),
    "soft cap": Law(
        lambda c: SpectralSoftCap(c, norm="reshaped"), idempotent=True, transposes=False
    ),
    "hammer operator": Law(lambda c: SpectralHammer(c, norm="operator")),
    "hammer reshaped": Law(lambda c: SpectralHammer(c, norm="reshaped"), transposes=False),
    "project rank operator": Law(
        lambda c: ProjectStableRank(ratio=0.5, norm="operator"), idempotent=True
    ),
    "project rank reshaped": Law(
        lambda c: ProjectStableRank(target=1.4, norm="reshaped"), idempotent=True, transposes=False
    ),
    "normalization operator": Law(lambda c: SpectralNormalization(norm="operator", scale=1.5), 0),
    "normalization reshaped": Law(
        lambda c: SpectralNormalization(norm="reshaped"), 0, transposes=False
    ),
    "normalization bidirectional": Law(
        lambda c: SpectralNormalization(norm="bidirectional", scale=TrainableScale(0.7)), 0
    ),
    "rank operator": Law(lambda c: StableRankNormalization(0.4, norm="operator"), 0),
    "rank reshaped": Law(
        lambda c: StableRankNormalization(0.4, norm="reshaped"), 0, transposes=False
    ),
    "penalty operator": Law(lambda c: SpectralNormPenalty(0.3, norm="operator")),
    "penalty reshaped": Law(lambda c: SpectralNormPenalty(0.3, norm="reshaped"), transposes=False),
    "penalty bidirectional": Law(lambda c: SpectralNormPenalty(0.3, norm="bidirectional")),
    "monitor": Law(lambda c: Monitor(), idempotent=True),
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

FOLLOWED = ("hammer operator", "normalization operator", "rank operator", "penalty operator")

every_rule = pytest.mark.parametrize("name", LAWS)


def weight(shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    """Norms of 2 to 7, but for the first of a stack, which is inside any bound of 1."""
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
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * scale + 1e-300)


@every_rule
def test_protocol(name: str) -> None:
    rule = LAWS[name].make(1.0)
    assert isinstance(rule, Rule)
    assert rule.stage in ("weights", "gradients", "forward")
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule)
    assert hash(rule) == hash(copy.deepcopy(rule))
    assert type(rule).__name__ in repr(rule)


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
        if not backend.traced:
            # Neither the first nor a later state is written to.
            for given in (start, state):
                before = {key: backend.numpy(value).copy() for key, value in given.items()}
                fire(w, given)
                assert before.keys() == given.keys()
                for key, value in given.items():
                    np.testing.assert_array_equal(backend.numpy(value), before[key])
        expected, _, expected_figures = outcome(rule, host.astype(np.float64), geometry)
        assert_near(backend.numpy(result), expected, geometry, rule, 2e-5)
        assert figures.keys() == expected_figures.keys()
        if not isinstance(rule, ClipSpectralNorm):
            for key, value in figures.items():
                several = value if isinstance(value, tuple) else (value,)
                wanted = np.ravel(expected_figures[key])
                got = np.concatenate([np.ravel(backend.numpy(v)) for v in several])
                np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.idempotent])
def test_idempotent(backend: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(backend):
        if backend.traced and name == "soft cap":
            continue  # compiled elsewhere

        def fire(x: Any, geometry: Geometry = geometry) -> Any:
            return outcome(rule, x, geometry)[0]

        once = backend.call(fire, backend.array(host))
        again = backend.call(fire, once)
        np.testing.assert_allclose(backend.numpy(again), backend.numpy(once), rtol=0, atol=2e-6)
        if isinstance(rule, ClipSpectralNorm | ProjectStableRank) and not backend.traced:
            assert again is once


@every_rule
def test_batches_and_blocks_equal_a_loop(eager: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    host = weight((2, 5, 4)).astype(np.float32)
    w = eager.array(host)
    results = [eager.numpy(outcome(rule, w, GEOMETRIES["stack"][1])[0])]
    if eager.name != "jax":
        last = eager.array(np.moveaxis(host, 0, 2))
        results.append(
            np.moveaxis(eager.numpy(outcome(rule, last, Dense(batch_axes=(-1,)))[0]), 2, 0)
        )
        fused = outcome(rule, eager.array(host.reshape(10, 4)), Dense(splits=(5, 5)))[0]
        results.append(eager.numpy(fused).reshape(host.shape))
    for i in range(2):
        alone = eager.numpy(outcome(rule, eager.array(host[i]), Dense())[0])
        for together in results:
            np.testing.assert_allclose(together[i], alone, rtol=0, atol=5e-6)


TRANSPOSED: list[tuple[tuple[int, ...], Conv, Conv]] = [
    (shape, conv, conv.transpose())
    for shape, conv in [
        ((4, 3, 3, 3), Conv((4, 4), boundary="circular")),
        ((4, 2, 3), Conv((6,), stride=2, groups=2, boundary="circular")),
    ]
] + [
    ((4, 3, 3), Conv((7,), padding=1), Conv((7,), padding=1, transposed=True, layout="IO*")),
    (
        (4, 3, 4),
        Conv((8,), padding=1, stride=2),
        Conv((4,), padding=1, stride=2, transposed=True, layout="IO*"),
    ),
]


@every_rule
def test_transposition(eager: Backend, name: str) -> None:
    law = LAWS[name]
    rule = law.make(1.0)
    if eager.name == "jax":
        pytest.skip("compiles for every shape")
    host = weight((5, 4))
    plain = eager.numpy(outcome(rule, eager.array(host), Dense())[0])
    for array, geometry in [(host.T, Dense()), (host, Dense().transpose(2))]:
        turned = eager.numpy(outcome(rule, eager.array(array), geometry)[0])
        turned = turned if array is host else turned.T
        np.testing.assert_allclose(turned, plain, rtol=0, atol=5e-6)
    if not law.transposes or eager.name.startswith("array_api_strict"):
        return
    for shape, conv, transposed in TRANSPOSED:
        w = eager.array(weight(shape))
        there, back = (eager.numpy(outcome(rule, w, g)[0]) for g in (conv, transposed))
        # Iterations that stop at 1e-4 of the norm stop elsewhere.
        assert_near(back, there, conv, rule, 2e-3 if "operator" in name else 5e-6)


@every_rule
def test_orthogonal_changes_of_basis(eager: Backend, name: str, rng: np.random.Generator) -> None:
    rule = LAWS[name].make(1.0)
    host = weight((5, 4))
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    plain = eager.numpy(outcome(rule, eager.array(host, "float32"), Dense())[0])
    turned = eager.numpy(outcome(rule, eager.array(left @ host @ right, "float32"), Dense())[0])
    np.testing.assert_allclose(turned, left @ plain @ right, rtol=0, atol=5e-6)


@every_rule
@pytest.mark.parametrize("scale", [2.0**40, 1e20, 1e-20])
def test_scaling(eager: Backend, name: str, scale: float) -> None:
    law = LAWS[name]
    for key in (
        ("stack",) if eager.name not in ("numpy", "torch") else ("stack", "circular", "zeros")
    ):
        shape, geometry = GEOMETRIES[key]
        host = weight(shape).astype(np.float32)
        rule, scaled = law.make(1.0), law.make(scale)
        plain = eager.numpy(outcome(rule, eager.array(host), geometry)[0])
        w = eager.array(host * np.float32(scale))
        with np.errstate(over="ignore"):  # a penalty's value is a square
            got, state, figures = outcome(scaled, w, geometry)
        got = eager.numpy(got).astype(np.float64) / scale**law.degree
        assert_near(got, plain, geometry, rule, 2e-6 if math.log2(scale) % 1 == 0 else 2e-5)
        assert all(np.isfinite(eager.numpy(x)).all() for x in state.values())
        norm = figures.get("norm_before")
        if norm is not None:
            expected = outcome(rule, eager.array(host), geometry)[2]["norm_before"]
            np.testing.assert_allclose(eager.numpy(norm) / scale, eager.numpy(expected), rtol=1e-4)


@every_rule
def test_zero_stays_zero(eager: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(eager):
        result, state, figures = outcome(rule, eager.array(np.zeros_like(host)), geometry)
        np.testing.assert_array_equal(eager.numpy(result), 0.0)
        assert all(np.isfinite(eager.numpy(x)).all() for x in state.values())
        for value in figures.values():
            for x in value if isinstance(value, tuple) else (value,):
                assert np.isfinite(eager.numpy(x)).all()
        # What is no longer zero finds its way from there, and a zero in a stack hurts no other.
        later = eager.numpy(outcome(rule, eager.array(host), geometry, state)[0])
        assert np.isfinite(later).all()
        assert later.any()
        if isinstance(geometry, Dense) and geometry.batch_axes:
            mixed = host.copy()
            mixed[1] = 0.0
            got = eager.numpy(outcome(rule, eager.array(mixed), geometry)[0])
            alone = eager.numpy(outcome(rule, eager.array(host[0]), Dense())[0])
            np.testing.assert_array_equal(got[1], 0.0)
            np.testing.assert_allclose(got[0], alone, rtol=0, atol=5e-6)


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
            if isinstance(rule, ClipSpectralNorm | NormalizeIfAbove) and "reshaped" not in name:
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


@pytest.mark.parametrize("name", SCHEDULED)
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
    assert seen
    assert set(seen) == {(7, "layer", Dense())}
    other = eager.numpy(outcome(make(schedule), w, Dense(), step=8)[0])
    assert np.abs(other - fixed).max() > 1e-3


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", SCHEDULED)
def test_bad_values_of_a_schedule(name: str, value: float) -> None:
    rule = SCHEDULED[name][0](lambda *_: value)
    with pytest.raises(ValueError, match="must be"):
        outcome(rule, weight((5, 4)), Dense())


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize("name", SCHEDULED)
def test_bad_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|give exactly one"):
        SCHEDULED[name][0](value)


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("name", SCHEDULED)
def test_numbers_of_numpy(name: str, number: Any) -> None:
    make, value = SCHEDULED[name]
    w = weight((5, 4))
    got = outcome(make(number(value)), w, Dense())[0]
    np.testing.assert_allclose(got, outcome(make(value), w, Dense())[0], atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ClipSpectralNorm(1.0, distance_tolerance=-0.1),
        lambda: NormalizeIfAbove(1.0, norm="bidirectional"),
        lambda: SpectralSoftCap(1.0, norm="spectral"),
        lambda: SpectralHammer(1.0, norm="bidirectional"),
        lambda: ProjectStableRank(norm="operator"),
        lambda: ProjectStableRank(ratio=0.5, target=2.0, norm="operator"),
        lambda: ProjectStableRank(ratio=1.1, norm="operator"),
        lambda: ProjectStableRank(target=0.9, norm="operator"),
        lambda: ProjectStableRank(ratio=0.5, preserve=-1, norm="operator"),
        lambda: ProjectStableRank(ratio=0.5, norm="bidirectional"),
        lambda: SpectralNormalization(norm="frobenius"),
        lambda: SpectralNormalization(norm="reshaped", iterations=0),
        lambda: StableRankNormalization(1.1, norm="reshaped"),
        lambda: StableRankNormalization(0.5, norm="bidirectional"),
        lambda: StableRankNormalization(0.5, norm="reshaped", iterations=1.5),
        lambda: SpectralNormPenalty(0.1, norm=None),
        lambda: SpectralNormPenalty(0.1, norm="reshaped", iterations=0),
        lambda: TrainableScale(0.0),
        lambda: TrainableScale(math.nan),
    ],
)
def test_bad_arguments(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|give exactly one"):
        build()


@pytest.mark.parametrize(
    "make",
    [NormalizeIfAbove, SpectralSoftCap, SpectralHammer, SpectralNormPenalty],
)
def test_the_norm_has_no_default(make: Any) -> None:
    with pytest.raises(TypeError, match="norm"):
        make(1.0)


@every_rule
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_state_that_does_not_fit_is_not_used(name: str, size: float) -> None:
    """Of no firing yet, of another input size, shape or geometry; outside and inside."""
    rule = LAWS[name].make(1.0)
    kernel, matrix = size * weight((4, 3, 3, 3)), size * weight((5, 4))
    for w, before, now in [
        (kernel, Conv((6, 7)), Conv((3, 4))),
        (kernel, Conv((3, 4)), Conv((6, 7))),
        (kernel, Dense(), Conv((3, 4))),
        (kernel, Conv((3, 4)), Dense()),
        (matrix, None, Dense()),
        (matrix, Dense(batch_axes=(0,), out_axes=(1,)), Dense()),
    ]:
        other = w if before != Dense(batch_axes=(0,), out_axes=(1,)) else weight((2, 5, 4))
        state = {} if before is None else outcome(rule, other, before)[1]
        fresh = outcome(rule, w, now)[0]
        assert_near(outcome(rule, w, now, state)[0], fresh, now, rule, 1e-2)


@every_rule
@pytest.mark.parametrize("conv", [Conv((5,)), Conv((5,), boundary="circular")])
def test_nan_is_refused_or_told(name: str, conv: Conv) -> None:
    """By an error, or by the figures; never by a warning of an array library."""
    rule = LAWS[name].make(1.0)
    for shape, geometry in [((5, 4), Dense()), ((4, 3, 3), conv)]:
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


def test_one_nan_matrix_leaves_the_others_of_a_stack_capped() -> None:
    w = weight((2, 5, 4))[::-1].copy()
    w[1, 0, 0] = np.nan
    for rule in (
        ClipSpectralNorm(1.0),
        NormalizeIfAbove(1.0, norm="operator"),
        SpectralSoftCap(1.0, norm="operator"),
    ):
        with pytest.warns(errors.NonFiniteWarning):
            got = outcome(rule, w, GEOMETRIES["stack"][1])[0]
        assert np.linalg.norm(got[0], 2) <= 1.0 + 1e-9


def with_values(values: Any) -> tuple[np.ndarray, ...]:
    """(w, u, v) with w = u·diag(values)·vᵀ of shape (5, 4)."""
    u, _, vh = np.linalg.svd(weight((5, 4)), full_matrices=False)
    return (u * np.asarray(values)) @ vh, u, vh.T


def test_normalize_if_above(backend: Backend) -> None:
    for top in (3.0, 1.0, 0.4):
        w, _, _ = with_values([top, 0.3, 0.2, 0.0])
        given = backend.array(w, "float32")
        rule = NormalizeIfAbove(1.0, norm="operator")
        got, _, figures = backend.call(lambda x, r=rule: outcome(r, x, Dense()), given)
        np.testing.assert_allclose(backend.numpy(got), w * min(1.0, 1.0 / top), atol=2e-6)
        assert float(figures["norm_before"]) == pytest.approx(top, rel=1e-5)
        assert float(figures["norm_after"]) == pytest.approx(min(top, 1.0), rel=1e-5)
        assert backend.traced or top > 0.5 or got is given


def test_normalize_if_above_for_every_size() -> None:
    w = weight((4, 3, 3))
    got = outcome(NormalizeIfAbove(1.0, norm="operator"), w, Conv(None))[0]
    assert specops.spectral_norm(got, Conv((64,), boundary="circular")) <= 1.0
    assert specops.spectral_norm_bounds(got, Conv(None)).upper >= 0.99
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
    # Small values drown in the rounding of large ones before they are pressed.
    rounding = 1e-6 * min(top, 100.0)
    if top < 1e10:
        np.testing.assert_allclose(turned - np.diag(after), 0.0, atol=5 * rounding)
        assert (np.diff(after) <= 1e-6).all()
    assert np.linalg.norm(turned, 2) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(turned, 2) <= 1.0 + 1e-6
    if top < 2.0:
        # x ↦ x − 3α²x⁵ + …, with α ≤ 1/(3σ₁²)
        np.testing.assert_allclose(after[3:], values[3:], rtol=1e-4, atol=rounding)
        assert values[2] - 0.05 < after[2] <= values[2] + rounding
    assert float(figures["norm_after"]) == pytest.approx(1.0, abs=1e-5)
    # Once inside, nothing moves.
    inside = backend.call(soft_capped, backend.array(w / (1.01 * top), "float32"))[0]
    np.testing.assert_allclose(backend.numpy(inside), w / (1.01 * top), rtol=1e-6, atol=1e-7)


def test_soft_cap_refuses_an_operator() -> None:
    rule = SpectralSoftCap(1.0, norm="operator")
    assert "reshaped" in rule.obstacle(Conv((5,)))
    assert rule.obstacle(Dense()) == ""
    with pytest.raises(errors.UnsupportedGeometryError, match="reshaped"):
        outcome(rule, weight((4, 3, 3)), Conv((5,)))


def test_hammer_moves_one_value(backend: Backend) -> None:
    values = np.array([4.0, 2.5, 0.8, 0.1])
    w, u, v = with_values(values)
    rule = SpectralHammer(1.5, norm="operator")
    got, _, figures = backend.call(lambda x: outcome(rule, x, Dense()), backend.array(w, "float32"))
    turned = u.T @ backend.numpy(got).astype(np.float64) @ v
    np.testing.assert_allclose(turned, np.diag([1.5, *values[1:]]), atol=5e-6)
    assert float(figures["norm_before"]) == pytest.approx(4.0, rel=1e-5)
    assert float(figures["norm_after"]) == pytest.approx(1.5, rel=1e-5)
    calm = backend.array(w / 4.0, "float32")
    after = backend.call(lambda x: outcome(rule, x, Dense())[0], calm)
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
        state = rule.update(w, geometry, state)[1]
    got = rule.update(w, geometry, state)[0]
    u, s, vh = np.linalg.svd(oracle.conv_matrix(w, geometry))
    assert u[:, 0] @ oracle.conv_matrix(got, geometry) @ vh[0] == pytest.approx(1.0, abs=1e-6)
    # Of all kernels for which that holds it is the nearest: it moved along the gradient.
    gradient = (w - got) / np.linalg.norm(w - got)
    h = 1e-5
    ahead, behind = (oracle.spectrum(w + t * h * gradient, geometry)[0] for t in (1.0, -1.0))
    slope = (ahead - behind) / (2 * h)
    assert np.linalg.norm(w - got) == pytest.approx((s[0] - 1.0) / slope, rel=1e-6)


class Screening:
    """A clip at 1, its state, and how often it was certified."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, geometry: Geometry, **options: Any):
        self.rule = ClipSpectralNorm(1.0, **options)
        self.geometry, self.state, self.certified = geometry, {}, 0
        real = clip.project_spectral_ball

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.certified += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(clip, "project_spectral_ball", counted)

    def fire(self, w: Any, *, enforce: bool = False) -> tuple[Any, Any]:
        act = self.rule.enforce if enforce else self.rule.update
        new, self.state, figures = act(w, self.geometry, self.state, name="w")
        return new, figures


SCREENED = ("dense", "stack", "blocks", "circular", "zeros")


@pytest.mark.parametrize("key", SCREENED)
def test_inside_is_certified_once_and_then_estimated(
    monkeypatch: pytest.MonkeyPatch, eager: Backend, key: str
) -> None:
    if eager.name == "jax" and key != "stack":
        pytest.skip("compiles for seconds")
    shape, geometry = GEOMETRIES[key]
    screening = Screening(monkeypatch, geometry)
    host = weight(shape).astype(np.float32)
    norm = np.max([np.max(x) for x in oracle_values(host, geometry)])
    w = eager.array(host * np.float32(0.8 / norm))
    new, certified = screening.fire(w)
    assert new is w
    assert screening.certified == 1
    for _ in range(3):
        new, estimated = screening.fire(w)
        assert new is w
        for name, value in certified.items():
            assert estimated[name].shape == value.shape
            eager.same_kind(estimated[name], value)
            np.testing.assert_allclose(eager.numpy(estimated[name]), eager.numpy(value), rtol=2e-3)
    assert screening.certified == 1
    # It grows, and the power steps see it.
    outside = eager.array(host * np.float32(1.2 / norm))
    new, figures = screening.fire(outside)
    assert screening.certified == 2
    assert max(np.max(x) for x in oracle_values(eager.numpy(new), geometry)) <= 1.0 + 1e-6
    assert float(np.max(eager.numpy(figures["norm_before"]))) > 1.1
    # Found outside, it is certified until it is inside again.
    screening.fire(new)
    assert screening.certified == 3
    # Near the bound an estimate does not do.
    near = eager.array(host * np.float32(0.97 / norm))
    for _ in range(3):
        assert screening.fire(near)[0] is near
    assert screening.certified == 6


def oracle_values(w: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    w = w.astype(np.float64)
    if isinstance(geometry, Conv) and geometry.boundary == "zeros":
        # What the projection constrains: the torus that contains the layer.
        sizes = geometry.sizes(w.shape)
        kernel = geometry.kernel(w)[0]
        around = Conv(sizes.enclosing_torus(), stride=geometry.stride, boundary="circular")
        return [oracle.spectrum(kernel, around)]
    if isinstance(geometry, Dense) and geometry.splits:
        ends = np.cumsum(geometry.splits)[:-1]
        return [np.linalg.svd(x, compute_uv=False) for x in np.split(w, ends)]
    return [oracle.spectrum(w, geometry)]


def test_a_fooled_estimate_lasts_to_the_hundredth_firing(
    monkeypatch: pytest.MonkeyPatch, eager: Backend
) -> None:
    screening = Screening(monkeypatch, Dense())
    screening.fire(eager.array(np.diag([0.6, 0.2, 0.1, 0.0])))
    # Power steps from the first axis never leave it.
    grown = eager.array(np.diag([0.5, 3.0, 0.1, 0.0]))
    for firing in range(2, 100):
        new, figures = screening.fire(grown)
        assert new is grown, firing
    assert screening.certified == 1
    assert float(figures["norm_after"]) == pytest.approx(0.5)
    new, figures = screening.fire(grown)
    assert screening.certified == 2
    np.testing.assert_allclose(eager.numpy(new), np.diag([0.5, 1.0, 0.1, 0.0]), atol=1e-6)
    assert float(figures["norm_before"]) == pytest.approx(3.0)


def test_the_count_starts_again_after_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    calm, seen = np.diag([0.6, 0.2, 0.1, 0.0]), []
    for firing in range(1, 301):
        before = screening.certified
        screening.fire(calm)
        if screening.certified > before:
            seen.append(firing)
    assert seen[0] == 1
    assert len(seen) >= 3
    assert max(np.diff(seen)) <= 100


def test_enforce_certifies_at_once(monkeypatch: pytest.MonkeyPatch, eager: Backend) -> None:
    screening = Screening(monkeypatch, Dense())
    screening.fire(eager.array(np.diag([0.6, 0.2, 0.1, 0.0])))
    grown = eager.array(np.diag([0.5, 3.0, 0.1, 0.0]))
    assert screening.fire(grown)[0] is grown
    new, _ = screening.fire(grown, enforce=True)
    np.testing.assert_allclose(eager.numpy(new), np.diag([0.5, 1.0, 0.1, 0.0]), atol=1e-6)
    assert screening.certified == 2


def test_without_screening_every_firing_certifies(
    monkeypatch: pytest.MonkeyPatch, eager: Backend
) -> None:
    screening = Screening(monkeypatch, Dense(), screen=False)
    for count in range(1, 4):
        screening.fire(eager.array(np.diag([0.6, 0.2, 0.1, 0.0])))
        assert screening.certified == count
    new, _ = screening.fire(eager.array(np.diag([0.5, 3.0, 0.1, 0.0])))
    np.testing.assert_allclose(eager.numpy(new), np.diag([0.5, 1.0, 0.1, 0.0]), atol=1e-6)


def test_a_bound_that_sinks_below_the_estimate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    screening.rule = ClipSpectralNorm(lambda step, *_: 1.0 / step)
    w, state = np.diag([0.6, 0.2, 0.1, 0.0]), {}
    for step in (1, 2):
        w, state, _ = screening.rule.update(w, Dense(), state, step=step)
    assert np.linalg.norm(w, 2) <= 0.5 + 1e-12


@pytest.mark.parametrize("name", ["clip", *FOLLOWED])
def test_jit_takes_a_state_of_an_eager_firing(name: str) -> None:
    jax = pytest.importorskip("jax")
    rule = LAWS[name].make(6.0)  # inside, so that the clip has vectors
    w = jax.numpy.asarray(weight((5, 4)))
    state = outcome(rule, w, Dense())[1]
    eager, state_after, figures = outcome(rule, 1.1 * w, Dense(), state)
    traced = jax.jit(lambda x, s: outcome(rule, x, Dense(), s))(1.1 * w, state)
    np.testing.assert_allclose(traced[0], eager, rtol=0, atol=1e-6)
    for key, value in figures.items():
        np.testing.assert_allclose(traced[2][key], value, rtol=1e-6)
    if rule.stage != "weights":
        assert traced[1].keys() == state_after.keys()
        for key, value in state_after.items():
            np.testing.assert_allclose(traced[1][key], value, rtol=0, atol=1e-8)
