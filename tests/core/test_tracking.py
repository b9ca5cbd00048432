"""Norms followed by power steps, and the rules that divide by them or penalise them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import specops
from specops import (
    Conv,
    Dense,
    SpectralNormalization,
    SpectralNormPenalty,
    StableRankNormalization,
    TrainableScale,
    errors,
)
from specops.geometry import Geometry
from specops.tracking import TrackedTorus, track
from tests import oracle
from tests.backends import Backend
from tests.core.test_rule_laws import outcome
from tests.strategies import Case, convolutions, denses

CONVS: list[tuple[tuple[int, ...], Conv]] = [
    ((3, 2, 3, 3), Conv((4, 5))),
    ((4, 2, 3, 3), Conv((6, 4), stride=2, groups=2, boundary="circular")),
    ((3, 3, 2), Conv((9,), dilation=2, layout="*IO")),
    ((3, 2, 3), Conv((6,), dilation=2, boundary="circular")),
    ((3, 4, 4), Conv((4,), transposed=True, stride=2, padding=1, layout="IO*")),
    ((3, 2, 3), Conv((5,), transposed=True, boundary="circular", layout="IO*")),
    ((3, 2, 2, 4), Conv((4, 3), padding="valid", layout="*OI", transposed=True)),
    ((2, 3, 5), Conv((3,), boundary="circular")),
    ((4, 1, 3), Conv((6,), groups=4, stride=2, padding=1)),
    ((4, 2, 3), Conv((7,), stride=2, boundary="circular")),
]
DENSE: list[tuple[tuple[int, ...], Dense]] = [
    ((5, 4), Dense()),
    ((2, 4, 5), Dense(out_axes=(2,), batch_axes=(0,))),
    ((6, 4), Dense(splits=(2, 4))),
]
every_conv = pytest.mark.parametrize(
    ("shape", "conv"), CONVS, ids=[c.describe() + c.layout for _, c in CONVS]
)
NORMS = ("operator", "reshaped", "bidirectional")


def weight(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def true_norms(w: np.ndarray, geometry: Geometry, norm: str) -> np.ndarray:
    """By singular values in double precision, one for each block or matrix."""
    if isinstance(geometry, Dense):
        if geometry.splits is None:
            return np.ravel(oracle.spectrum(w, geometry)[..., 0])
        matrix = oracle.dense_matrix(w, Dense())
        parts = np.split(matrix, np.cumsum(geometry.splits)[:-1])
        return np.array([np.linalg.norm(part, 2) for part in parts])
    if norm == "operator":
        return np.array([oracle.spectrum(w, geometry)[0]])
    axes = geometry.channel_axes[: 2 if norm == "bidirectional" else 1]
    views = [oracle.dense_matrix(w, Dense((axis,))) for axis in axes]
    return np.array([np.mean([np.linalg.norm(view, 2) for view in views])])


def measured(follow: Any, state: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in follow.measured(state)])


def axis(follow: Any, state: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of a followed norm, which is linear in the weight."""
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.array([follow.norms(unit, state)[0] for unit in units]).reshape(shape)


def differences(f: Any, w: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """The gradient of f by central differences."""
    units = h * np.eye(w.size).reshape(-1, *w.shape)
    return np.array([(f(w + unit) - f(w - unit)) / (2 * h) for unit in units]).reshape(w.shape)


@every_conv
@pytest.mark.parametrize("norm", NORMS)
def test_reaches_the_norm_and_its_gradient(shape: tuple[int, ...], conv: Conv, norm: Any) -> None:
    w = weight(shape)
    follow = track(conv, norm)
    state = follow.start(w, "w")
    true = true_norms(w, conv, norm)
    np.testing.assert_allclose(measured(follow, state), true, rtol=1e-3)
    state = follow.advance(w, state, 400)
    np.testing.assert_allclose(measured(follow, state), true, rtol=1e-9)
    np.testing.assert_allclose(follow.norms(w, state)[0], true[0], rtol=1e-9)
    if norm == "operator":
        matrix = specops.linear_operator(w, conv).to_matrix()
        assert np.linalg.norm(matrix, 2) == pytest.approx(true[0], rel=1e-12)
        np.testing.assert_allclose(state["axis"], axis(follow, state, shape), atol=1e-12)
    slope = differences(lambda x: true_norms(x, conv, norm)[0], w)
    np.testing.assert_allclose(axis(follow, state, shape), slope, atol=1e-5)


@pytest.mark.parametrize(("shape", "geometry"), DENSE)
@pytest.mark.parametrize("norm", NORMS)
def test_matrices_are_followed_alike_for_every_norm(
    shape: tuple[int, ...], geometry: Dense, norm: Any
) -> None:
    w = weight(shape)
    follow = track(geometry, norm)
    state = follow.advance(w, follow.start(w, "w"), 300)
    true = true_norms(w, geometry, norm)
    np.testing.assert_allclose(measured(follow, state), true, rtol=1e-9)
    slope = differences(lambda x: true_norms(x, geometry, norm).sum(), w)
    units = np.eye(w.size).reshape(-1, *shape)
    along = [sum(np.sum(n) for n in follow.norms(unit, state)) for unit in units]
    np.testing.assert_allclose(np.reshape(along, shape), slope, atol=1e-5)


def assert_lower_bounds(case: Case, norm: Any) -> None:
    """On a weight that the vectors have not seen, and better with every step."""
    w, geometry = case.weight(), case.geometry
    follow = track(geometry, norm)
    state = follow.start(w[..., ::-1].copy(), "w")
    true = true_norms(w, geometry, norm)
    before = np.zeros_like(true)
    for _ in range(3):
        state = follow.advance(w, state)
        now = measured(follow, state)
        assert (now <= true * (1 + 1e-12)).all()
        assert (now >= before * (1 - 1e-12)).all()
        np.testing.assert_allclose(
            np.concatenate([np.ravel(n) for n in follow.norms(w, state)]), now, rtol=1e-9
        )
        before = now


@settings(max_examples=25)
@given(convolutions())
def test_convolutions_are_followed_from_below(case: Case) -> None:
    for norm in NORMS:
        assert_lower_bounds(case, norm)


@given(denses())
def test_matrices_are_followed_from_below(case: Case) -> None:
    assert_lower_bounds(case, "operator")


@settings(max_examples=25)
@given(convolutions())
def test_screens_never_exceed_what_projections_constrain(case: Case) -> None:
    w, conv = case.weight(), case.geometry
    follow = TrackedTorus(conv)
    state = follow.start(w[..., ::-1].copy(), "w")
    _, info = specops.project_spectral_ball(w, 1e4, conv, return_info=True)
    layer = oracle.spectrum(w, conv)[0]
    assert info.norm_before >= layer * (1 - 1e-9)
    before = 0.0
    for _ in range(2):
        seen, state = follow.estimate(w, state)
        assert before * (1 - 1e-12) <= seen <= info.norm_before * (1 + 1e-9)
        before = seen
    fresh, _ = follow.estimate(w, follow.start(w, "w"), 300)
    assert fresh == pytest.approx(info.norm_before, rel=1e-4)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_screens_of_every_size(stride: int, dilation: int) -> None:
    conv = Conv(None, stride=stride, dilation=dilation)
    follow, w = TrackedTorus(conv), weight((3, 2, 3))
    seen, _ = follow.estimate(w, follow.start(w, "w"), 300)
    _, info = specops.project_spectral_ball(w, 1e4, conv, return_info=True)
    assert seen == pytest.approx(info.norm_before, rel=1e-4)
    for size in (5, 8, 24):
        assert oracle.spectrum(w, Conv((size,), stride=stride, dilation=dilation))[0] <= seen


@pytest.mark.parametrize("norm", NORMS)
def test_alike_on_all_backends(backend: Backend, norm: Any) -> None:
    given: list[tuple[tuple[int, ...], Geometry]] = [*CONVS[:5], *DENSE]
    if "jax" in backend.name:
        given = [CONVS[4] if norm == "operator" or backend.traced else DENSE[1]]
    for shape, geometry in given:
        host = weight(shape).astype(np.float32)
        follow = track(geometry, norm)
        w = backend.array(host)
        wide = host.astype(np.float64)
        # Compilers get the start of NumPy: that of their own takes them seconds.
        start = follow.start(wide if backend.traced else w, "w")
        if backend.traced:
            start = {k: backend.array(x, "float32") for k, x in start.items()}
        state = backend.call(lambda x, s, f=follow: f.advance(x, s, 2), w, start)
        expected = follow.advance(wide, follow.start(wide, "w"), 2)
        assert state.keys() == expected.keys()
        for key, value in state.items():
            backend.same_kind(value, w)
            assert value.shape == expected[key].shape
        for got, want in [
            *zip(follow.norms(w, state), follow.norms(wide, expected), strict=True),
            *zip(follow.measured(state), follow.measured(expected), strict=True),
        ]:
            np.testing.assert_allclose(backend.numpy(got), want, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e30, 1e-30])
@pytest.mark.parametrize("norm", [*NORMS, "torus"])
def test_start_on_any_scale(norm: Any, scale: float) -> None:
    plain = weight((16, 12, 3, 3)).astype(np.float32)
    w = plain * np.float32(scale)
    conv = Conv((8, 8))
    true = specops.spectral_norm(plain, conv)
    if norm == "torus":
        follow = TrackedTorus(conv)
        seen = follow.estimate(w, follow.start(w, "w"), 20)[0]
        assert float(seen) / scale == pytest.approx(float(true), rel=0.1)
        return
    follow = track(conv, norm)
    state = follow.start(w, "w")
    assert all(np.isfinite(x).all() for x in state.values())
    wanted = true_norms(plain.astype(np.float64), conv, norm)
    np.testing.assert_allclose(measured(follow, state) / scale, wanted, rtol=2e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_from_zero_to_a_norm(eager: Backend, norm: Any) -> None:
    for shape, geometry in DENSE[1:2] if eager.name == "jax" else [CONVS[4], DENSE[1]]:
        follow, w = track(geometry, norm), eager.array(np.zeros(shape))
        one, same = (follow.start(w, name) for name in ("one", "one"))
        for key, value in one.items():
            np.testing.assert_array_equal(eager.numpy(value), eager.numpy(same[key]))
            if key[0] in "uv":
                lengths = np.linalg.norm(eager.numpy(value), axis=-1)
                np.testing.assert_allclose(lengths, 1.0, rtol=1e-6)
        assert all((eager.numpy(x) == 0.0).all() for x in follow.measured(one))
        # They lead to the norm once there is one, also after a step that was not finite.
        grown = weight(shape)
        state = one
        if eager.name == "numpy":
            with np.errstate(invalid="ignore"):
                state = follow.advance(np.full(shape, np.nan), one)
        state = follow.advance(eager.array(grown), state, 60)
        got = np.concatenate([np.ravel(eager.numpy(x)) for x in follow.measured(state)])
        np.testing.assert_allclose(got, true_norms(grown, geometry, norm), rtol=1e-3)


def test_vectors_of_groups_that_do_not_lead_depend_on_the_name() -> None:
    shape, conv = CONVS[8]
    w = weight(shape)
    w[1:] = 0.0
    one, same, other = (track(conv, "operator").start(w, n)["v"] for n in ("one", "one", "two"))
    np.testing.assert_array_equal(one, same)
    np.testing.assert_allclose(one[0], other[0])
    assert np.abs(one[1:] - other[1:]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(one, axis=-1), 1.0)


def test_every_group_is_followed() -> None:
    shape, conv = CONVS[8]
    follow = track(conv, "operator")
    w = weight(shape)
    state = follow.start(w, "w")
    for group in range(4):
        w[group] *= 10.0 ** (group + 1)
        state = follow.advance(w, state, 50)
        assert state["sigma"] == pytest.approx(oracle.spectrum(w, conv)[0])
        leads = np.abs(state["axis"]).reshape(4, -1).max(axis=1) > 0
        assert list(np.flatnonzero(leads)) == [group]


@pytest.mark.parametrize("norm", NORMS)
def test_states_of_another_weight_are_refused(norm: Any) -> None:
    for shape, geometry in [CONVS[0], DENSE[0]]:
        follow = track(geometry, norm)
        w, other = weight(shape), weight((shape[0] + 1, shape[1] + 1, *shape[2:]))
        state = follow.start(other, "w")
        for use in (follow.advance, follow.norms):
            for bad in ({}, state):
                with pytest.raises(errors.StateError, match="must hold"):
                    use(w, bad)


def test_operators_need_an_input_size() -> None:
    w = weight((3, 2, 3))
    with pytest.raises(errors.GeometryError, match="no input size"):
        track(Conv(None), "operator").start(w)
    for norm in ("reshaped", "bidirectional"):
        follow = track(Conv(None), norm)
        np.testing.assert_allclose(
            measured(follow, follow.start(w)), true_norms(w, Conv(None), norm)
        )


GEOMETRIES: list[tuple[tuple[int, ...], Geometry]] = [
    *DENSE,
    ((4, 3, 3), Conv((6,))),
    ((3, 3, 4), Conv((6,), layout="*IO", boundary="circular")),
    ((3, 4, 3), Conv((4,), transposed=True, stride=2, padding=1, layout="IO*")),
]


def some(backend: Backend) -> list[tuple[tuple[int, ...], Geometry]]:
    return [GEOMETRIES[0], GEOMETRIES[1]] if "jax" in backend.name else GEOMETRIES


def divided(w: np.ndarray, geometry: Geometry, norm: str) -> np.ndarray:
    """W/σ, block by block, by singular values."""
    norms = true_norms(w, geometry, norm)
    if isinstance(geometry, Dense) and geometry.splits is not None:
        return w / np.repeat(norms, geometry.splits)[:, None]
    if isinstance(geometry, Dense) and geometry.batch_axes:
        return w / norms[:, None, None]
    return w / norms[0]


@pytest.mark.parametrize("norm", NORMS)
def test_spectral_normalization(eager: Backend, norm: Any) -> None:
    for shape, geometry in some(eager):
        host = weight(shape)
        w = eager.array(host)
        expected = divided(host, geometry, norm)
        rule = SpectralNormalization(norm=norm, iterations=50)
        got, state, figures = outcome(rule, w, geometry)
        np.testing.assert_allclose(eager.numpy(got), expected, rtol=0, atol=3e-5)
        np.testing.assert_allclose(
            np.ravel(eager.numpy(figures["norm"])), true_norms(host, geometry, norm), rtol=1e-4
        )
        for scale in (1.75, TrainableScale(1.75), lambda step, *_: 1.0 + 0.75 * step):
            scaled = SpectralNormalization(norm=norm, scale=scale)
            got = scaled.apply(w, geometry, state, step=1, name="w")
            np.testing.assert_allclose(eager.numpy(got), 1.75 * expected, rtol=0, atol=5e-5)
        own = eager.array(np.array(0.25), "float32" if not eager.doubles else "float64")
        got = SpectralNormalization(norm=norm).apply(w, geometry, state, scale=own)
        np.testing.assert_allclose(eager.numpy(got), 0.25 * expected, rtol=0, atol=3e-5)


def algorithm_2(matrix: np.ndarray, ratio: float) -> np.ndarray:
    """Sanyal, Torr & Dokania 2020, with the power iteration converged."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = max(1.0, ratio * min(matrix.shape))
    divided = matrix / s[0]
    lead = np.outer(u[:, 0], vh[0])
    rest = divided - lead
    length = np.linalg.norm(rest)
    if length <= np.sqrt(rank - 1.0):
        return divided
    limited: np.ndarray = lead + np.sqrt(rank - 1.0) * rest / length
    return limited


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45, 1.0])
def test_stable_rank_normalization_is_algorithm_2(eager: Backend, ratio: float) -> None:
    rule = StableRankNormalization(ratio, norm="reshaped", iterations=20)
    for shape, geometry in some(eager):
        host = weight(shape)
        got = eager.numpy(outcome(rule, eager.array(host), geometry)[0])
        if isinstance(geometry, Conv):
            geometry = Dense((geometry.channel_axes[0],))
        blocks = geometry.blocks(got)
        given = geometry.blocks(host)
        for block, matrices in zip(blocks, given, strict=True):
            matrices = matrices.reshape(-1, *matrices.shape[-2:])
            for a, m in zip(block.reshape(matrices.shape), matrices, strict=True):
                np.testing.assert_allclose(a, algorithm_2(m, ratio), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "conv"),
    [
        ((3, 2, 3, 3), Conv((5, 5), boundary="circular")),
        ((3, 4, 3), Conv((7,), boundary="circular", transposed=True, layout="IO*")),
        ((2, 2, 5), Conv((3,), boundary="circular")),
        ((3, 2, 3, 3), Conv((4, 5))),
        ((3, 2, 4), Conv((7,), stride=2, padding=1)),
        ((4, 2, 3, 3), Conv((4, 4), stride=2, groups=2, boundary="circular")),
    ],
)
def test_stable_rank_of_an_operator(shape: tuple[int, ...], conv: Conv) -> None:
    w = weight(shape)
    follow = track(conv, "operator")
    state = follow.advance(w, follow.start(w, "w"), 800)
    before = oracle.spectrum(w, conv)
    rank = (before**2).sum() / before[0] ** 2
    # The least ‖A(X)‖_F² of kernels with ⟨X, E⟩ = 1, by the explicit operator.
    units = np.eye(w.size).reshape(-1, *shape)
    images = np.stack([oracle.conv_matrix(unit, conv).ravel() for unit in units])
    e = axis(follow, state, shape).ravel()
    least = 1.0 / (e @ np.linalg.pinv(images @ images.T, rcond=1e-10) @ e)
    for ratio in (0.02, 0.1, 0.2, 1.0):
        limit = max(1.0, ratio * len(before), least)
        rule = StableRankNormalization(ratio, norm="operator")
        got = rule.apply(w, conv, state)
        after = oracle.spectrum(got, conv)
        # Along the gradient of the norm it is 1 always, and the Frobenius norm is limited, ...
        assert float(follow.norms(got, state)[0]) == pytest.approx(1.0, rel=1e-9)
        assert (after**2).sum() == pytest.approx(min(rank, limit), rel=1e-6)
        assert after[0] >= 1.0 - 1e-9
        assert (after**2).sum() / after[0] ** 2 <= limit * (1 + 1e-9)
        # ... and where all taps count alike that direction goes on to lead.
        if conv.boundary == "circular" and set(np.ravel(conv.stride)) == {1}:
            assert after[0] == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_penalty(eager: Backend, norm: Any) -> None:
    strength = 0.3
    rule = SpectralNormPenalty(strength, norm=norm, iterations=40)
    for shape, geometry in some(eager):
        host = weight(shape)
        w = eager.array(host)

        def value(x: np.ndarray, geometry: Geometry = geometry) -> float:
            return float(0.5 * strength * (true_norms(x, geometry, norm) ** 2).sum())

        gradient, state, figures = outcome(rule, w, geometry)
        np.testing.assert_allclose(
            eager.numpy(gradient), differences(value, host), rtol=0, atol=2e-4
        )
        assert float(figures["penalty"]) == pytest.approx(value(host), rel=1e-4)
        np.testing.assert_allclose(
            np.ravel(eager.numpy(figures["norm"])), true_norms(host, geometry, norm), rtol=1e-4
        )
        # With the vectors as they are.
        alone, same = rule.penalty(w, geometry, state)
        assert float(alone) == pytest.approx(float(figures["penalty"]), rel=1e-5)
        np.testing.assert_allclose(eager.numpy(same), eager.numpy(gradient), rtol=0, atol=2e-5)
        moved = eager.array(1.5 * host)
        alone, same = rule.penalty(moved, geometry, state)
        assert float(alone) == pytest.approx(2.25 * float(figures["penalty"]), rel=1e-5)
        np.testing.assert_allclose(
            eager.numpy(same), 1.5 * eager.numpy(gradient), rtol=0, atol=5e-5
        )


def test_penalty_takes_schedules_and_any_state() -> None:
    rule = SpectralNormPenalty(lambda step, *_: 0.1 * step, norm="operator")
    w = weight((5, 4))
    state = rule.init(w, Dense(), "w")
    value, gradient = rule.penalty(w, Dense(), state, step=4, name="w")
    fixed = SpectralNormPenalty(0.4, norm="operator").penalty(w, Dense(), state)
    assert float(value) == pytest.approx(float(fixed[0]))
    np.testing.assert_allclose(gradient, fixed[1])
    with pytest.raises(errors.StateError):
        rule.penalty(w, Dense(), {})


torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

FORWARD: dict[str, tuple[Any, tuple[int, ...], Geometry]] = {
    "stack": (SpectralNormalization(norm="operator", scale=1.3), *GEOMETRIES[1]),
    "blocks": (StableRankNormalization(0.5, norm="operator"), *GEOMETRIES[2]),
    "operator": (SpectralNormalization(norm="operator"), *GEOMETRIES[3]),
    "bidirectional": (SpectralNormalization(norm="bidirectional"), *GEOMETRIES[4]),
    "reshaped rank": (StableRankNormalization(0.4, norm="reshaped"), *GEOMETRIES[3]),
    "operator rank": (StableRankNormalization(0.2, norm="operator"), *GEOMETRIES[5]),
    "rank 1": (StableRankNormalization(0.1, norm="operator"), *GEOMETRIES[0]),
}
every_forward = pytest.mark.parametrize("name", FORWARD)


def of_kind(state: Any, convert: Any) -> Any:
    return {key: convert(value) for key, value in state.items()}


def torch_gradient(f: Any, w: np.ndarray, state: Any) -> np.ndarray:
    x = torch.tensor(w, requires_grad=True)
    f(x, of_kind(state, torch.tensor)).backward()
    return x.grad.numpy()


def torch_func_gradient(f: Any, w: np.ndarray, state: Any) -> np.ndarray:
    constants = of_kind(state, torch.tensor)
    return torch.func.grad(lambda x: f(x, constants))(torch.tensor(w)).numpy()


def jax_gradient(f: Any, w: np.ndarray, state: Any) -> np.ndarray:
    return np.asarray(jax.jit(jax.grad(f))(w, of_kind(state, jax.numpy.asarray)))


def jax_eager_gradient(f: Any, w: np.ndarray, state: Any) -> np.ndarray:
    return np.asarray(jax.grad(f)(jax.numpy.asarray(w), of_kind(state, jax.numpy.asarray)))


GRADIENTS = [torch_gradient, torch_func_gradient, jax_gradient]


def probed(name: str, advance: bool = False) -> tuple[Any, np.ndarray, Any]:
    """(w, state ↦ a scalar of the weight in use, the weight, a state that has not converged)."""
    rule, shape, geometry = FORWARD[name]
    w, probe = weight(shape), weight(shape, 2)
    state = rule.init(w + 0.2 * weight(shape, 3), geometry, "w")

    def scalar(x: Any, state: Any) -> Any:
        if advance:
            state = rule.update(x, geometry, state)[1]
        used = rule.apply(x, geometry, state)
        probes = torch.tensor(probe) if torch.is_tensor(x) else probe
        return (used * probes).sum()

    return scalar, w, state


@every_forward
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_hold_the_vectors_constant(gradient: Any, name: str) -> None:
    f, w, state = probed(name)
    got = gradient(f, w, state)
    np.testing.assert_allclose(got, differences(lambda x: f(x, state), w), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["stack", "operator", "bidirectional"])
@pytest.mark.parametrize("gradient", [torch_gradient, torch_func_gradient, jax_gradient])
def test_vectors_are_constants_where_they_advance_too(gradient: Any, name: str) -> None:
    f, w, state = probed(name, advance=True)
    rule, _, geometry = FORWARD[name]
    constant, _, _ = probed(name)
    later = rule.update(w, geometry, state)[1]
    np.testing.assert_allclose(
        gradient(f, w, state), gradient(constant, w, later), rtol=1e-6, atol=1e-9
    )


@every_forward
def test_second_derivatives(name: str) -> None:
    rule, shape, geometry = FORWARD[name]
    w = torch.tensor(weight(shape), requires_grad=True)
    state = of_kind(rule.init(weight(shape), geometry, "w"), torch.tensor)
    assert torch.autograd.gradgradcheck(lambda x: rule.apply(x, geometry, state), (w,))


@every_forward
@pytest.mark.parametrize("gradient", [torch_gradient, jax_eager_gradient])
def test_gradients_at_zero_are_finite(gradient: Any, name: str) -> None:
    f, w, state = probed(name)
    if gradient is jax_eager_gradient and name not in ("stack", "rank 1"):
        pytest.skip("compiles for seconds")
    assert np.isfinite(gradient(f, np.zeros_like(w), state)).all()


def test_the_scale_has_a_gradient() -> None:
    _, shape, geometry = FORWARD["operator"]
    rule = SpectralNormalization(norm="operator", scale=TrainableScale())
    w, state = weight(shape), rule.init(weight(shape), geometry, "w")
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    given = torch.tensor(w)
    used = rule.apply(given, geometry, of_kind(state, torch.tensor), scale=scale)
    (used * given).sum().backward()
    norm = float(track(geometry, "operator").norms(w, state)[0])
    assert float(scale.grad) == pytest.approx((w**2).sum() / norm)
    slope = jax.grad(lambda s: (rule.apply(w, geometry, state, scale=s) * w).sum())(0.7)
    assert float(slope) == pytest.approx((w**2).sum() / norm)
