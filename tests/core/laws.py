"""A rule of every kind, the laws it obeys, and the weights it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from specops import (
    ClipAndCut,
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
)
from specops.geometry import Geometry
from tests.backends import Backend


class Law(NamedTuple):
    """A rule for a bound, and which laws hold for it."""

    make: Callable[[float], Any]
    degree: int = 1  # power of s by which the result grows where weight and bound grow by s
    idempotent: bool = False
    transposes: bool = True  # with convolutions; with matrices all do


LAWS = {
    "clip": Law(lambda c: ClipSpectralNorm(c, distance_tolerance=0.0), 1, True),
    "clip reshaped": Law(lambda c: ClipSpectralNorm(c, norm="reshaped"), 1, True, False),
    "clip and cut": Law(lambda c: ClipAndCut(c)),
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
    "blocks": ((2, 6, 4), Dense((1,), batch_axes=(0,), splits=(2, 1), repeats=2)),
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
    if isinstance(rule, ClipSpectralNorm) and isinstance(rule.view(geometry), Conv):
        rtol = max(rtol, 0.02)  # certified to ‖X − X*‖² ≤ 1e-4‖K‖²
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * scale)


def flat(backend: Backend, figures: Any) -> np.ndarray:
    """In the order of their names, as compilers return them."""
    values = [v for _, v in sorted(figures.items())]
    arrays = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
    return np.concatenate([np.ravel(backend.numpy(x)) for x in arrays])
