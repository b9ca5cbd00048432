"""Norms followed by power steps, and the rules that divide by them or penalise them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from specops.arrays.numpy import NumPy
from specops.geometry import Geometry
from specops.maps.every_size import on_a_torus
from specops.tracking import TrackedTorus, is_measured, track
from tests import oracle
from tests.backends import Backend
from tests.core.laws import outcome
from tests.core.test_gradients import jax_gradient, torch_func_gradient, torch_gradient
from tests.strategies import Case, convolutions, denses

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

Used = list[tuple[tuple[int, ...], Geometry]]

DENSE: Used = [
    ((5, 4), Dense()),
    ((2, 4, 5), Dense(out_axes=(2,), batch_axes=(0,))),
    ((6, 4), Dense(splits=(2, 4))),
]
DEPTHWISE = Conv((6,), groups=4, stride=2, padding=1)
CONVS: Used = [
    ((3, 2, 3, 3), Conv((4, 5))),
    ((4, 2, 3, 3), Conv((6, 4), stride=2, groups=2, boundary="circular")),
    ((3, 3, 2), Conv((9,), dilation=2, layout="*IO")),
    ((3, 2, 3), Conv((6,), dilation=2, boundary="circular")),
    ((3, 4, 4), Conv((4,), transposed=True, stride=2, padding=1, layout="IO*")),
    ((3, 2, 3), Conv((5,), transposed=True, boundary="circular", layout="IO*")),
    ((3, 2, 2, 4), Conv((4, 3), padding="valid", layout="*OI", transposed=True)),
    ((2, 3, 5), Conv((3,), boundary="circular")),
    ((4, 1, 3), DEPTHWISE),
    ((4, 2, 3), Conv((7,), stride=2, boundary="circular")),
]
NORMS = ("operator", "reshaped", "bidirectional")
every_norm = pytest.mark.parametrize("norm", NORMS)


def weight(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def true_norms(w: np.ndarray, geometry: Geometry, norm: str) -> np.ndarray:
    """By singular values in double precision, one for each block or matrix."""
    if isinstance(geometry, Conv) and norm == "operator":
        return oracle.spectrum(w, geometry)[:1]
    if isinstance(geometry, Conv):
        axes = geometry.channel_axes[: 2 if norm == "bidirectional" else 1]
        tops = [oracle.spectrum(w, Dense((axis,)))[0] for axis in axes]
        return np.array([np.mean(tops)])
    if geometry.splits is None:
        return np.ravel(oracle.spectrum(w, geometry)[..., 0])
    parts = np.split(w, np.cumsum(geometry.splits)[:-1])
    return np.array([np.linalg.norm(part, 2) for part in parts])


def flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in arrays])


def axis(follow: Any, state: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of the sum of followed norms, which are linear in the weight."""
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.array([flat(follow.norms(unit, state)).sum() for unit in units]).reshape(shape)


def differences(f: Any, w: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """The gradient of f by central differences."""
    units = h * np.eye(w.size).reshape(-1, *w.shape)
    return np.array([(f(w + unit) - f(w - unit)) / (2 * h) for unit in units]).reshape(w.shape)


@pytest.mark.parametrize(("shape", "geometry"), [*DENSE, *CONVS])
@every_norm
def test_reaches_the_norm_and_its_gradient(
    shape: tuple[int, ...], geometry: Geometry, norm: Any
) -> None:
    w = weight(shape)
    follow = track(geometry, norm)
    state = follow.start(w, "w")
    true = true_norms(w, geometry, norm)
    np.testing.assert_allclose(flat(follow.measured(state)), true, rtol=1e-3)
    state = follow.advance(w, state, 400)
    np.testing.assert_allclose(flat(follow.measured(state)), true, rtol=1e-9)
    np.testing.assert_allclose(flat(follow.norms(w, state)), true, rtol=1e-9)
    if isinstance(geometry, Conv) and norm == "operator":
        matrix = specops.linear_operator(w, geometry).to_matrix()
        assert np.linalg.norm(matrix, 2) == pytest.approx(true[0], rel=1e-12)
    slope = differences(lambda x: true_norms(x, geometry, norm).sum(), w)
    np.testing.assert_allclose(axis(follow, state, shape), slope, atol=1e-5)


@settings(max_examples=60)
@given(st.one_of(convolutions(), denses()))
def test_followed_from_below(case: Case) -> None:
    """On a weight that the vectors have not seen, and better with every step."""
    w, geometry = case.weight(), case.geometry
    for norm in NORMS if isinstance(geometry, Conv) else NORMS[:1]:
        follow = track(geometry, norm)
        state = follow.start(w[..., ::-1].copy(), "w")
        true = true_norms(w, geometry, norm)
        before = np.zeros_like(true)
        for _ in range(3):
            state = follow.advance(w, state)
            now = flat(follow.measured(state))
            assert (now <= true * (1 + 1e-12)).all()
            assert (now >= before * (1 - 1e-12)).all()
            np.testing.assert_allclose(flat(follow.norms(w, state)), now, rtol=1e-9)
            before = now


@settings(max_examples=25)
@given(convolutions())
def test_screens_never_exceed_what_projections_constrain(case: Case) -> None:
    w, conv = case.weight(), case.geometry
    follow = TrackedTorus(conv)
    state = follow.start(w[..., ::-1].copy(), "w")
    # On the torus, which small layers are else not constrained on.
    _, info = specops.project_spectral_ball(w, 1e4, conv, method="accelerated", return_info=True)
    assert info.norm_before >= oracle.spectrum(w, conv)[0] * (1 - 1e-9)
    before = 0.0
    for _ in range(2):
        seen, state = follow.estimate(w, state)
        assert before * (1 - 5e-3) <= seen <= info.norm_before * (1 + 1e-9)
        before = seen
    fresh, _ = follow.estimate(w, follow.start(w, "w"), 300)
    assert fresh == pytest.approx(info.norm_before, rel=1e-4)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_screens_of_every_size(stride: int, dilation: int) -> None:
    conv = Conv(None, stride=stride, dilation=dilation)
    follow, w = TrackedTorus(conv), weight((3, 2, 3))
    seen, _ = follow.estimate(w, follow.start(w, "w"), 300)
    _, info = specops.project_spectral_ball(w, 1e4, conv, return_info=True)
    assert seen == pytest.approx(info.norm_before, rel=1e-4)
    for size in (5, 8, 24):
        assert oracle.spectrum(w, Conv((size,), stride=stride, dilation=dilation))[0] <= seen


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 3), (3, 3)])
def test_a_small_torus_stands_for_every_size(
    stride: int, dilation: int, transposed: bool, boundary: Any
) -> None:
    conv = Conv(None, stride=stride, dilation=dilation, transposed=transposed, boundary=boundary)
    w = weight((3, 2, 3))
    upper = float(specops.spectral_norm_bounds(w, conv).upper)
    norm = oracle.spectrum(w, on_a_torus(conv, w.shape))[0]
    assert 0.97 * upper <= norm <= upper * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e30, 1e-30])
@pytest.mark.parametrize("norm", [*NORMS, "torus"])
def test_start_on_any_scale(norm: Any, scale: float) -> None:
    plain = weight((16, 12, 3, 3)).astype(np.float32)
    w, conv = plain * np.float32(scale), Conv((8, 8))
    if norm == "torus":
        screen = TrackedTorus(conv)
        seen = float(screen.estimate(w, screen.start(w, "w"), 20)[0])
        _, info = specops.project_spectral_ball(plain, 1e3, conv, return_info=True)
        assert seen / scale == pytest.approx(float(info.norm_before), rel=0.05)
        return
    follow = track(conv, norm)
    state = follow.start(w, "w")
    assert np.isfinite(flat(state.values())).all()
    true = true_norms(plain.astype(np.float64), conv, norm)
    np.testing.assert_allclose(flat(follow.measured(state)) / scale, true, rtol=2e-3)


@every_norm
def test_from_zero_to_a_norm(eager: Backend, norm: Any) -> None:
    used = [DENSE[1], CONVS[4]]
    for shape, geometry in used[:1] if eager.name == "jax" else used:
        follow, w = track(geometry, norm), eager.array(np.zeros(shape), "float32")
        state, same = (follow.start(w, "one") for _ in range(2))
        for key, value in state.items():
            np.testing.assert_array_equal(eager.numpy(value), eager.numpy(same[key]))
            if key[0] in "uv":
                lengths = np.linalg.norm(eager.numpy(value), axis=-1)
                np.testing.assert_allclose(lengths, 1.0, rtol=1e-6)
        assert (flat(eager.numpy(x) for x in follow.measured(state)) == 0.0).all()
        if eager.name == "numpy":
            # A step that was not finite leaves no trace.
            with np.errstate(invalid="ignore"):
                state = follow.advance(np.full(shape, np.nan), state)
        grown = weight(shape)
        state = follow.advance(eager.array(grown, "float32"), state, 40)
        got = flat(eager.numpy(x) for x in follow.measured(state))
        np.testing.assert_allclose(got, true_norms(grown, geometry, norm), rtol=1e-3)


@every_norm
def test_the_norm_of_zeros_is_that_of_no_other_weight(norm: Any) -> None:
    for shape, geometry in (DENSE[1], CONVS[4]):
        follow, zeros = track(geometry, norm), np.zeros(shape)
        state = follow.start(zeros, "w")
        assert is_measured(follow, zeros, state)
        assert not is_measured(follow, weight(shape), state)


def test_every_group_is_followed() -> None:
    follow, w = track(DEPTHWISE, "operator"), weight((4, 1, 3))
    state = follow.start(w, "w")
    assert np.abs(state["v"] - follow.start(w, "other")["v"]).max() > 0.1
    for group in range(4):
        w[group] *= 10.0 ** (group + 1)
        state = follow.advance(w, state, 50)
        assert state["sigma"] == pytest.approx(oracle.spectrum(w, DEPTHWISE)[0])
        leads = np.abs(axis(follow, state, w.shape)).max(axis=(1, 2)) > 0
        assert list(np.flatnonzero(leads)) == [group]


@every_norm
def test_states_of_another_weight_are_refused(norm: Any) -> None:
    for shape, geometry in [CONVS[0], DENSE[0]]:
        follow = track(geometry, norm)
        w, other = weight(shape), weight((shape[0] + 1, shape[1] + 1, *shape[2:]))
        penalty = SpectralNormPenalty(1.0, norm=norm)
        for bad in ({}, follow.start(other, "w")):
            for use in (follow.advance, follow.norms):
                with pytest.raises(errors.StateError, match="must hold"):
                    use(w, bad)
            with pytest.raises(errors.StateError, match="must hold"):
                penalty.penalty(w, geometry, bad)


def test_states_of_another_precision_fit(backend: Backend) -> None:
    """Models are cast after a state was made; compilers as well."""
    w = weight((5, 4))
    follow = track(Dense(), "operator")
    start = follow.start(w, "w")
    narrow = {key: backend.array(x, "float32") for key, x in start.items()}
    state = backend.call(follow.advance, backend.array(w), narrow)
    for key, value in state.items():
        assert value.dtype == backend.array(w).dtype
        if key[0] in "pq":
            continue  # on the look-out, so never at rest
        np.testing.assert_allclose(backend.numpy(value), start[key], rtol=0, atol=1e-5)


@every_norm
@pytest.mark.parametrize(("shape", "geometry"), [*DENSE, *CONVS])
def test_steps_on_the_host_are_the_general_ones(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], geometry: Geometry, norm: Any
) -> None:
    follow, w = track(geometry, norm), weight(shape)
    start = follow.start(weight(shape, 2), "w")
    in_few_calls = follow.advance(w, start, 2)
    monkeypatch.setattr(NumPy, "is_constant_on_host", lambda *_: False)
    plain = follow.advance(w, start, 2)
    assert in_few_calls.keys() == plain.keys()
    for key, x in plain.items():
        found = in_few_calls[key]
        if key[0] in "pq":
            x, found = np.abs(x), np.abs(found)  # whose signs are arbitrary
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-10)


def test_operators_need_an_input_size() -> None:
    with pytest.raises(errors.GeometryError, match=r"no input size.*name its input_shape"):
        track(Conv(None), "operator").start(weight((3, 2, 3)))


GEOMETRIES: Used = [
    *DENSE,
    ((4, 3, 3), Conv((6,))),
    ((3, 3, 4), Conv((6,), layout="*IO", boundary="circular")),
    ((3, 4, 3), Conv((4,), transposed=True, stride=2, padding=1, layout="IO*")),
]


def some(backend: Backend) -> Used:
    """All of them on NumPy and torch, some on every other backend."""
    few = {"jax": (0,), "array_api_strict-CPU_DEVICE": (0, 3)}
    few |= {"array_api_strict-device1": (1, 4), "array_api_strict-no_x64": (2, 5)}
    return [GEOMETRIES[i] for i in few.get(backend.name, range(len(GEOMETRIES)))]


@every_norm
def test_spectral_normalization(eager: Backend, norm: Any) -> None:
    for shape, geometry in some(eager):
        host = weight(shape)
        w = eager.array(host, "float32")
        norms = true_norms(host, geometry, norm)
        each = norms if isinstance(geometry, Conv) else np.repeat(norms, geometry.splits or 1)
        expected = host / each.reshape(-1, *[1] * (host.ndim - 1))
        rule = SpectralNormalization(norm=norm, iterations=20)
        got, state, figures = outcome(rule, w, geometry)
        np.testing.assert_allclose(eager.numpy(got), expected, rtol=0, atol=3e-5)
        np.testing.assert_allclose(np.ravel(eager.numpy(figures["norm"])), norms, rtol=1e-4)
        scales: list[tuple[Any, Any]] = [
            (1.75, None),
            (TrainableScale(1.75), None),
            (lambda step, *_: 0.75 + step, None),
            (TrainableScale(), eager.array(np.array(1.75), "float32")),
        ]
        for scale, value in scales:
            scaled = SpectralNormalization(norm=norm, scale=scale)
            got = scaled.apply(w, geometry, state, step=1, name="w", scale=value)
            np.testing.assert_allclose(eager.numpy(got), 1.75 * expected, rtol=0, atol=6e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: SpectralNormalization(norm="bidirectional", iterations=n),
        lambda n: StableRankNormalization(0.5, norm="reshaped", iterations=n),
        lambda n: SpectralNormPenalty(0.1, norm="operator", iterations=n),
    ],
)
def test_iterations_are_steps_of_one_firing(make: Any) -> None:
    shape, geometry = GEOMETRIES[3]
    w = weight(shape)
    once = thrice = make(1).init(weight(shape, 2), geometry, "w")
    for _ in range(3):
        once = make(1).update(w, geometry, once)[1]
    thrice = make(3).update(w, geometry, thrice)[1]
    assert once.keys() == thrice.keys()
    for key, value in once.items():
        np.testing.assert_allclose(thrice[key], value, rtol=0, atol=1e-12)


def algorithm_2(matrix: np.ndarray, ratio: float) -> np.ndarray:
    """Sanyal, Torr & Dokania 2020, with the power iteration converged."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = max(1.0, ratio * min(matrix.shape))
    divided, lead = matrix / s[0], np.outer(u[:, 0], vh[0])
    length = np.linalg.norm(divided - lead)
    if length <= np.sqrt(rank - 1.0):
        return np.asarray(divided)
    return np.asarray(lead + np.sqrt(rank - 1.0) * (divided - lead) / length)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45, 1.0])
def test_stable_rank_normalization_is_algorithm_2(eager: Backend, ratio: float) -> None:
    rule = StableRankNormalization(ratio, norm="reshaped", iterations=20)
    for shape, geometry in some(eager):
        host = weight(shape)
        got = eager.numpy(outcome(rule, eager.array(host, "float32"), geometry)[0])
        if isinstance(geometry, Conv):
            geometry = Dense((geometry.channel_axes[0],))
        for block, matrices in zip(geometry.blocks(got), geometry.blocks(host), strict=True):
            matrices = matrices.reshape(-1, *matrices.shape[-2:])
            for a, m in zip(block.reshape(matrices.shape), matrices, strict=True):
                np.testing.assert_allclose(a, algorithm_2(m, ratio), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "conv"),
    [
        ((3, 2, 3, 3), Conv((5, 5), boundary="circular")),
        ((2, 2, 5), Conv((3,), boundary="circular")),
        ((3, 2, 3, 3), Conv((4, 5))),
        ((3, 4, 4), Conv((4,), transposed=True, stride=2, padding=1, layout="IO*")),
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
        got = StableRankNormalization(ratio, norm="operator").apply(w, conv, state)
        after = oracle.spectrum(got, conv)
        # Along the gradient of the norm it is 1, and the Frobenius norm is limited, so that
        # the stable rank is at most that; another direction may lead by then.
        assert float(follow.norms(got, state)[0]) == pytest.approx(1.0, rel=1e-9)
        assert (after**2).sum() == pytest.approx(min(rank, limit), rel=1e-6)
        assert after[0] >= 1.0 - 1e-9
        assert (after**2).sum() / after[0] ** 2 <= limit * (1 + 1e-9)


@every_norm
def test_penalty(eager: Backend, norm: Any) -> None:
    rule = SpectralNormPenalty(0.3, norm=norm, iterations=20)
    for shape, geometry in some(eager):
        host = weight(shape)

        def value(x: np.ndarray, geometry: Geometry = geometry) -> float:
            return float(0.15 * (true_norms(x, geometry, norm) ** 2).sum())

        gradient, state, figures = outcome(rule, eager.array(host, "float32"), geometry)
        slope = differences(value, host)
        np.testing.assert_allclose(eager.numpy(gradient), slope, rtol=0, atol=2e-4)
        assert float(figures["penalty"]) == pytest.approx(value(host), rel=1e-4)
        norms = np.ravel(eager.numpy(figures["norm"]))
        np.testing.assert_allclose(norms, true_norms(host, geometry, norm), rtol=1e-4)
        # With the vectors as they are.
        for factor in (1.0, 1.5):
            moved = eager.array(factor * host, "float32")
            alone, same = rule.penalty(moved, geometry, state)
            wanted = factor**2 * float(figures["penalty"])
            assert float(alone) == pytest.approx(wanted, rel=1e-5)
            expected = factor * eager.numpy(gradient)
            np.testing.assert_allclose(eager.numpy(same), expected, rtol=0, atol=5e-5)


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
every_gradient = pytest.mark.parametrize(
    "gradient", [torch_gradient, torch_func_gradient, jax_gradient]
)


def of_kind(state: Any, like: Any) -> Any:
    """A state of NumPy, as one of torch where that is needed."""
    return {k: torch.tensor(x) for k, x in state.items()} if torch.is_tensor(like) else state


def scalar(name: str, state: Any, *, advance: bool = False) -> Any:
    """A function of (weight, probe, geometry) for the gradients."""

    def f(x: Any, probe: Any, geometry: Geometry) -> Any:
        rule, held = FORWARD[name][0], of_kind(state, x)
        if advance:
            held = rule.update(x, geometry, held)[1]
        return (rule.apply(x, geometry, held) * probe).sum()

    return f


def drawn(name: str) -> tuple[Any, np.ndarray, np.ndarray, Geometry]:
    """(a state that has not converged, weight, probe, geometry)."""
    rule, shape, geometry = FORWARD[name]
    w, probe, other = (weight(shape, seed) for seed in (1, 2, 3))
    return rule.init(w + 0.2 * other, geometry, "w"), w, probe, geometry


@every_forward
@every_gradient
def test_gradients_hold_the_vectors_constant(gradient: Any, name: str) -> None:
    state, w, probe, geometry = drawn(name)
    f = scalar(name, state)
    slope = differences(lambda x: f(x, probe, geometry), w)
    got = gradient(f, w, probe, geometry)
    np.testing.assert_allclose(got, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["stack", "operator"])
@every_gradient
def test_vectors_are_constants_where_they_advance_too(gradient: Any, name: str) -> None:
    state, w, probe, geometry = drawn(name)
    later = FORWARD[name][0].update(w, geometry, state)[1]
    got = gradient(scalar(name, state, advance=True), w, probe, geometry)
    expected = gradient(scalar(name, later), w, probe, geometry)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


@every_forward
def test_second_derivatives(name: str) -> None:
    state, w, _, geometry = drawn(name)
    given = torch.tensor(w, requires_grad=True)
    held = of_kind(state, given)
    rule = FORWARD[name][0]
    assert torch.autograd.gradgradcheck(lambda x: rule.apply(x, geometry, held), (given,))


@every_forward
def test_gradients_at_zero_are_finite(name: str) -> None:
    state, w, probe, geometry = drawn(name)
    for gradient in (torch_gradient, jax_gradient) if name == "rank 1" else (torch_gradient,):
        got = gradient(scalar(name, state), np.zeros_like(w), probe, geometry)
        assert np.isfinite(got).all()


def test_the_scale_has_a_gradient() -> None:
    rule = SpectralNormalization(norm="operator", scale=TrainableScale())
    state, w, _, geometry = drawn("operator")
    expected = (w**2).sum() / float(track(geometry, "operator").norms(w, state)[0])
    scale, used = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.tensor(w)
    result = rule.apply(used, geometry, of_kind(state, used), scale=scale)
    (result * used).sum().backward()
    assert float(scale.grad) == pytest.approx(expected)
    slope = jax.grad(lambda s: (rule.apply(w, geometry, state, scale=s) * w).sum())(0.7)
    assert float(slope) == pytest.approx(expected)
