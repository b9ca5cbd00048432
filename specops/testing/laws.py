"""Checks of the rules' laws on the adapter's own arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from specops.geometry import Conv, Dense, Geometry
from specops.rules import (
    ClipAndCut,
    ClipSpectralNorm,
    NormalizeIfAbove,
    ProjectStableRank,
    SpectralNormalization,
    SpectralNormPenalty,
    StableRankNormalization,
)
from specops.testing.base import SuiteBase

_NAME = "w"
_RTOL = 5e-5
_CERTIFIED = 0.02
"""Tolerance for clipped convolutions, which are only certified to ‖X − X*‖² ≤ 1e-4·‖K‖²."""


class _Law(NamedTuple):
    """A rule as a function of its bound, and the laws that hold for it."""

    make: Callable[[float], Any]
    degree: int
    """If weight and bound are multiplied by s, the result is by s to this power."""
    idempotent: bool = False


RULES: Mapping[str, _Law] = {
    "clip": _Law(lambda c: ClipSpectralNorm(c, distance_tolerance=0.0), 1, True),
    "clip-reshaped": _Law(lambda c: ClipSpectralNorm(c, norm="reshaped"), 1, True),
    "clip-and-cut": _Law(ClipAndCut, 1),
    "normalize-if-above": _Law(lambda c: NormalizeIfAbove(c, norm="operator"), 1, True),
    "project-stable-rank": _Law(lambda c: ProjectStableRank(ratio=0.4, norm="operator"), 1, True),
    "penalty": _Law(lambda c: SpectralNormPenalty(0.3, norm="bidirectional"), 1),
    "spectral-normalization": _Law(lambda c: SpectralNormalization(norm="operator", scale=1.5), 0),
    "stable-rank-normalization": _Law(lambda c: StableRankNormalization(0.4, norm="reshaped"), 0),
}
_DENSE = ((6, 4), Dense())
_GEOMETRIES: Mapping[str, tuple[tuple[int, ...], Geometry]] = {
    "dense": _DENSE,
    "stack": ((3, 6, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    "conv": ((4, 2, 3), Conv((6,), stride=2, groups=2, boundary="circular")),
}


class LawChecks(SuiteBase):
    """Rules as pure functions of the framework's arrays, in single precision."""

    def choices(self) -> dict[str, Callable[[], Sequence[str]]]:
        """Each rule of a stage that the adapter claims."""
        return super().choices() | {"law": self._laws, "projection": self._projections}

    def _laws(self) -> list[str]:
        stages = self.capabilities.stages
        return [name for name, law in RULES.items() if law.make(1.0).stage in stages]

    def _projections(self) -> list[str]:
        return [name for name in self._laws() if RULES[name].idempotent]

    def _geometries(self) -> dict[str, tuple[tuple[int, ...], Geometry]]:
        convolutions = self.capabilities.convolutions
        return {k: v for k, v in _GEOMETRIES.items() if k != "conv" or convolutions}

    def test_rule_agrees_with_numpy(self, law: str) -> None:
        """Same values and dtype as on NumPy, and arguments are not changed."""
        rule = RULES[law].make(1.0)
        for label, (shape, geometry) in self._geometries().items():
            host = _weight(shape)
            w = self.array(host)
            got = _outcome(rule, w, geometry)
            assert type(got) is type(w), (
                f"{rule!r} on a {type(w).__name__} gave a {type(got).__name__}"
            )
            values = self.numpy(got)
            assert values.dtype == host.dtype, (
                f"{rule!r} on {host.dtype} gave {values.dtype}. Likely cause: array() or "
                f"numpy() changes the dtype"
            )
            assert np.array_equal(self.numpy(w), host), f"{rule!r} changed its argument"
            expected = np.asarray(_outcome(rule, host, geometry))
            _assert_near(
                values, expected, _rtol(rule, geometry), f"{rule!r} on a {label}, against NumPy"
            )

    def test_rule_twice_is_once(self, projection: str) -> None:
        """A projection applied twice gives the same as applied once."""
        rule = RULES[projection].make(1.0)
        for label, (shape, geometry) in self._geometries().items():
            once = _outcome(rule, self.array(_weight(shape)), geometry)
            again = self.numpy(_outcome(rule, once, geometry))
            _assert_near(again, self.numpy(once), _RTOL, f"{rule!r} twice on a {label}")

    def test_rule_on_a_stack_is_a_loop(self, law: str) -> None:
        """Each matrix of a stack is treated as if it were alone."""
        rule = RULES[law].make(1.0)
        shape, geometry = _GEOMETRIES["stack"]
        host = _weight(shape)
        together = self.numpy(_outcome(rule, self.array(host), geometry))
        alone = [self.numpy(_outcome(rule, self.array(m), Dense())) for m in host]
        _assert_near(
            together,
            np.stack(alone),
            _rtol(rule, geometry),
            f"{rule!r} on a stack, against one by one",
        )

    def test_rule_scales_with_powers_of_two(self, law: str) -> None:
        """rule(2^k·W, bound 2^k·c) = 2^(k·degree)·rule(W, c), far from 1 in either direction."""
        for k in (-60, 40):
            factor, degree = np.float32(2.0**k), RULES[law].degree
            for label, (shape, geometry) in self._geometries().items():
                host = _weight(shape)
                plain = self.numpy(_outcome(RULES[law].make(1.0), self.array(host), geometry))
                rule = RULES[law].make(float(factor))
                scaled = self.numpy(_outcome(rule, self.array(host * factor), geometry))
                expected = plain.astype(np.float64) * 2.0 ** (k * degree)
                _assert_near(
                    scaled,
                    expected,
                    _rtol(rule, geometry),
                    f"{rule!r} on a {label} scaled by 2^{k}",
                )

    def test_rule_under_jit(self, law: str) -> None:
        """Compiled code gives the same result."""
        if not self.capabilities.supports_jit:
            pytest.skip("the adapter does not claim supports_jit")
        rule = RULES[law].make(1.0)
        for label, (shape, geometry) in self._geometries().items():
            w = self.array(_weight(shape))
            state = rule.init(w, geometry, _NAME)

            def fire(w: Any, state: Any, geometry: Geometry = geometry) -> Any:
                return _outcome(rule, w, geometry, state)

            compiled = self.numpy(self.jit(fire)(w, state))
            eager = self.numpy(fire(w, state))
            _assert_near(compiled, eager, _rtol(rule, geometry), f"{rule!r} on a {label} under jit")


def _weight(shape: tuple[int, ...]) -> np.ndarray:
    """A random weight, with norms of 2 to 5."""
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def _outcome(rule: Any, w: Any, geometry: Geometry, state: Any = None) -> Any:
    """The new weight, what is added to the gradient, or the weight in use."""
    state = rule.init(w, geometry, _NAME) if state is None else state
    result, state, _ = rule.update(w, geometry, state, step=1, name=_NAME)
    if rule.stage == "forward":
        result = rule.apply(w, geometry, state, step=1, name=_NAME)
    return result


def _rtol(rule: Any, geometry: Geometry) -> float:
    """By how much two computations of the same result may differ."""
    clipped = isinstance(rule, ClipSpectralNorm) and isinstance(rule.view(geometry), Conv)
    return _CERTIFIED if clipped else _RTOL


def _assert_near(got: np.ndarray, expected: np.ndarray, rtol: float, what: str) -> None:
    scale = float(np.max(np.abs(expected)))
    error = float(np.max(np.abs(np.asarray(got, np.float64) - expected)))
    assert error <= rtol * scale, (
        f"{what}: entries differ by up to {error / scale:.3g} of the largest; allowed is "
        f"{rtol:.3g}. Likely cause: reduced precision of products (TF32, bfloat16), or a "
        f"linear algebra routine of the framework that differs from NumPy's"
    )
