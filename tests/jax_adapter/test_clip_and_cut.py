"""One round of clipping and cutting, and the reshaped kernel, in compiled steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import ClipAndCut, ClipSpectralNorm, Conv, clip_singular_values, errors
from tests.jax_adapter.test_training import CAP, GEOMETRIES, jax, parameters, run

import optax  # isort: skip

import specops_jax


def stepped(rule: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """(figures, the kernel after a step without and with the rule)."""
    plain, _ = run(optax.sgd(0.05), 1)
    transform = optax.chain(optax.sgd(0.05), specops_jax.constrain(rule, GEOMETRIES))
    ruled, state = run(transform, 1)
    figures = specops_jax.find_state(state).figures["conv"]
    return figures, *(np.asarray(p["conv"], np.float64) for p in (plain, ruled))


def test_one_round_in_a_compiled_step() -> None:
    figures, plain, ruled = stepped(ClipAndCut(CAP))
    torus = Conv((6, 5), boundary="circular", layout="*IO")
    expected = clip_singular_values(plain, 0.0, CAP, torus)
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(ruled, expected, rtol=0, atol=5e-6)
    assert float(figures["norm_after"]) > CAP
    host = specops_jax.enforce(
        {"conv": jax.numpy.asarray(plain)}, ClipAndCut(CAP), {"conv": GEOMETRIES["conv"]}
    )
    np.testing.assert_allclose(host["conv"], expected, rtol=0, atol=5e-6)


def test_the_reshaped_kernel_in_a_compiled_step() -> None:
    rule = ClipSpectralNorm(CAP, norm="reshaped")
    figures, plain, ruled = stepped(rule)
    u, s, v = np.linalg.svd(np.moveaxis(plain, -1, 0).reshape(2, -1), full_matrices=False)
    clipped = ((u * np.minimum(s, CAP)) @ v).reshape(2, 3, 3, 2)
    np.testing.assert_allclose(ruled, np.moveaxis(clipped, 0, -1), rtol=0, atol=5e-6)
    assert float(figures["norm_before"]) == pytest.approx(s[0], rel=1e-5)
    row = specops_jax.report({"conv": jax.numpy.asarray(ruled)}, rule, {"conv": GEOMETRIES["conv"]})
    assert row["conv"].rule_norm == pytest.approx(CAP, rel=1e-5)


def test_one_round_needs_a_size() -> None:
    sizeless = {"conv": Conv(None, layout="*IO")}
    kernel = {"conv": parameters()["conv"]}
    with pytest.raises(errors.SpecopsError, match=r"conv.*input_shape"):
        specops_jax.enforce(kernel, ClipAndCut(CAP), sizeless)
