"""Fixtures shared by all tests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests.backends import BACKENDS, MISSING, Backend

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile("default")

_PARAMETERS = [pytest.param(b, id=b.name) for b in BACKENDS] + [
    pytest.param(None, id=name, marks=pytest.mark.skip(reason=reason))
    for name, reason in MISSING.items()
]


@pytest.fixture(params=_PARAMETERS, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every array library in turn."""
    return request.param


@pytest.fixture(
    params=[p for p in _PARAMETERS if p.values[0] is None or not p.values[0].traced],
    scope="session",
)
def eager(request: pytest.FixtureRequest) -> Backend:
    """Every array library in turn, compilers left out."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test."""
    return np.random.default_rng(20190220)
