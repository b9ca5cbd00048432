"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, find, settings
from hypothesis.strategies import booleans

from tests import compiling

if "PYTEST_XDIST_WORKER" in os.environ:
    # For a BLAS that is loaded later, such as the one that JAX borrows from SciPy, and children.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and child processes compile each program once between them, the small ones of single
    # operations included: most of what JAX costs here is thousands of those.
    _COMPILED = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("XLA_FLAGS", compiling.XLA_FLAGS)

from tests.backends import BACKENDS, EVERY_CASE, MISSING, SAMPLED, Backend

if "torch" in sys.modules:
    # What it says once in a process would fail whichever test comes first.
    sys.modules["torch"].set_warn_always(True)
# Tracing makes objects by the million, few of them in cycles: by default a tenth of the time.
gc.set_threshold(50_000, 20, 50)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of each that wait for the other's cost minutes.
    _ONE_THREAD = threadpoolctl.threadpool_limits(1, user_api="blas")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each half the longest first, so that no worker is left alone with them at the end."""
    for item in items:
        if _is_on_slow_library(item) or item.path.parent.name in _SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
    if not EVERY_CASE:
        _sample(items)
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    # Two workers begin with a half each.
    i, j = len(slow) // 2, len(rest) // 2
    items[:] = slow[:i] + rest[:j] + slow[i:] + rest[j:]


def _sample(items: list[pytest.Item]) -> None:
    """Leave the slow libraries a few cases of each test, from its first to its last."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        for name in SAMPLED.keys() & _names(item):
            cases.setdefault((item.nodeid.partition("[")[0], name), []).append(item)
    for (_, name), same in cases.items():
        count = min(SAMPLED[name], len(same))
        kept = {round(i * (len(same) - 1) / max(count - 1, 1)) for i in range(count)}
        for i, item in enumerate(same):
            if i not in kept:
                reason = "a sample of the cases; SPECOPS_CASES=300 runs all"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Neighbours share compiled programs and cached references: they stay in one worker."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


_SLOW_FOLDERS = {"jax_adapter"}
_SLOW_LIBRARIES = ("jax", "array_api_strict")
"""JAX compiles every operation for each shape, and the strict library checks each."""


def _names(item: pytest.Item) -> set[str]:
    """Of the backends and functions that a case is given."""
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {x.name if isinstance(x, Backend) else getattr(x, "__name__", "") for x in given}


def _is_on_slow_library(item: pytest.Item) -> bool:
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    named = {x for x in given if isinstance(x, str)} | _names(item)
    return any(name.startswith(_SLOW_LIBRARIES) for name in named)


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


@pytest.fixture(autouse=True, scope="module")
def kept() -> None:
    """What modules leave, JAX's caches above all, is not looked at by every collection after."""
    # Hypothesis asks once who refers to its random numbers, and would find nobody that is frozen.
    find(booleans(), bool)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The weights a framework draws are the same in every test, whatever ran before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test."""
    return np.random.default_rng(20190220)
