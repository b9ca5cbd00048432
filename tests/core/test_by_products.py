"""Firings of weights that are known by products with vectors alone."""

from __future__ import annotations

from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

from specops import (
    ClipSpectralNorm,
    Conv,
    Dense,
    NormalizeIfAbove,
    SpectralNormalization,
    SpectralNormPenalty,
    StableRankNormalization,
)

torch = pytest.importorskip("torch")

SHAPES = [
    ((5, 4), Dense()),
    ((2, 4, 5), Dense(out_axes=(2,), batch_axes=(0,))),
    ((6, 4), Dense(splits=(2, 4))),
]
RULES = [
    ClipSpectralNorm(20.0),
    SpectralNormalization(norm="operator", iterations=2),
    SpectralNormPenalty(0.1, norm="reshaped"),
]


def run(steps: Any, w: Any, geometry: Dense) -> Any:
    """The result of a computation whose wishes are granted."""
    xp, blocks, answer = compat.array_namespace(w), geometry.blocks(w), None
    while True:
        try:
            wanted = steps.send(answer)
        except StopIteration as stopped:
            return stopped.value
        assert wanted.geometry == geometry
        answer = tuple(
            xp.matmul(rows, xp.matrix_transpose(a))
            if wanted.to_left
            else xp.conj(xp.matmul(xp.conj(rows), a))
            if xp.isdtype(a.dtype, "complex floating")
            else xp.matmul(rows, a)
            for a, rows in zip(blocks, wanted.rows, strict=True)
        )


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_as_with_the_weight(
    rng: np.random.Generator, convert: Any, rule: Any, complex_: bool
) -> None:
    """Both sides of a matrix are met, of real and complex ones; signs of vectors are arbitrary."""
    for shape, geometry in SHAPES:
        values = rng.standard_normal(shape)
        w = convert(values + 1j * rng.standard_normal(shape) if complex_ else values)
        _, state, _ = rule.update(w, geometry, rule.init(w, geometry, "w"), step=1, name="w")
        for step in (2, 3):
            _, expected, figures = rule.update(w, geometry, state, step=step, name="w")
            found = run(rule.by_products(geometry, state, step=step, name="w"), w, geometry)
            for ours, theirs in zip(found, (expected, figures), strict=True):
                assert ours.keys() == theirs.keys()
                for key, value in ours.items():
                    ours_, theirs_ = (np.abs(np.asarray(x)) for x in (value, theirs[key]))
                    np.testing.assert_allclose(ours_, theirs_, atol=1e-5, err_msg=key)
            state = expected


def test_what_takes_the_weight_itself(rng: np.random.Generator) -> None:
    """Above the bound, where a certificate is due, and where nobody follows vectors."""
    w, geometry = rng.standard_normal((5, 4)), Dense()
    clip = ClipSpectralNorm(20.0)
    assert clip.by_products(geometry, {}) is None
    _, state, _ = clip.update(w, geometry, {})
    steps = clip.by_products(geometry, state)
    assert run(steps, 10.0 * w, geometry) is None
    for _ in range(98):
        state, _ = run(clip.by_products(geometry, state), w, geometry)
    assert run(clip.by_products(geometry, state), w, geometry) is None

    assert NormalizeIfAbove(1.0, norm="operator").by_products(geometry, {}) is None
    stable = StableRankNormalization(0.9, norm="reshaped")
    assert stable.by_products(geometry, stable.init(w, geometry, "w")) is None
    kernel, conv = rng.standard_normal((3, 2, 3)), Conv((6,), padding=1)
    normalization = SpectralNormalization(norm="operator")
    assert normalization.by_products(conv, normalization.init(kernel, conv, "w")) is None


def test_another_update_has_no_products(rng: np.random.Generator) -> None:
    """Unless it says so: what the class before it does is not what it does."""

    class Doubled(SpectralNormPenalty):
        def update(self, *given: Any, **options: Any) -> Any:
            term, *rest = super().update(*given, **options)
            return 2.0 * term, *rest

    class Renamed(SpectralNormPenalty):
        pass

    w, geometry = rng.standard_normal((5, 4)), Dense()
    for kind, known in ((Doubled, False), (Renamed, True)):
        rule = kind(0.1, norm="reshaped")
        found = rule.by_products(geometry, rule.init(w, geometry, "w"))
        assert (found is not None) == known
