"""Parameters of torch as they are: figures that are plain numbers keep no derivative, silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, linear_operator, measures

torch = pytest.importorskip("torch")

VALUES = np.random.default_rng(0).standard_normal((4, 4))
KERNEL = np.random.default_rng(1).standard_normal((2, 2, 3))
CONV = Conv((5,))

FIGURES: dict[str, Callable[[Any, Any], Any]] = {
    "balance_norms": lambda w, _: specops.balance_norms([w, 2.0 * w]).factors,
    "lipschitz_upper_bound": lambda w, k: measures.lipschitz_upper_bound([(w, None), (k, CONV)]),
    "local_lipschitz": lambda w, _: measures.local_lipschitz(linear_operator(w)),
    "spectrum_ends": lambda w, _: measures.spectrum_ends(linear_operator(w + w.T)),
    "spectral_density": lambda w, _: measures.spectral_density(linear_operator(w + w.T)).density,
    "parameter_variance": lambda w, _: measures.parameter_variance(w, norm="reshaped"),
    "log_spec_fro": lambda w, k: measures.log_spec_fro([w, k], 1.0, [None, CONV]),
    "log_spec_l1": lambda w, k: measures.log_spec_l1([w, k], 1.0, [None, CONV]),
    "gradient_norms": lambda w, _: list(measures.gradient_norms({"w": w}).values()),
    "gradient_norm_bounds": lambda w, _: measures.gradient_norm_bounds([w[0, 0] ** 2], 1.0).total,
}


@pytest.mark.parametrize("name", FIGURES)
def test_are_measured_as_their_values(name: str) -> None:
    given = [torch.nn.Parameter(torch.asarray(x)) for x in (VALUES, KERNEL)]
    found, expected = (flat(FIGURES[name](*weights)) for weights in (given, (VALUES, KERNEL)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def flat(found: Any) -> np.ndarray:
    """Its numbers, one after another."""
    several = isinstance(found, tuple | list)
    return np.concatenate([flat(x) for x in found]) if several and found else np.ravel(found)


def test_a_target_that_no_kernel_has_is_refused() -> None:
    kernel = torch.nn.Parameter(torch.asarray(KERNEL))
    with pytest.raises(ValueError, match="least stable rank"):
        specops.project_stable_rank(kernel, CONV, target=1.0)
