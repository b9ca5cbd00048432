"""Bounds that are arrays: of the weight's library, of another one, and those that are no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv
from tests.backends import Backend

VALUES = np.random.default_rng(0).standard_normal((4, 3, 3))
CONV = Conv((5,))

PROJECTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "ball": lambda w, x: specops.project_spectral_ball(w[..., 0], x),
    "layer's ball": lambda w, x: specops.project_spectral_ball(w, x, CONV),
    "Schatten": lambda w, x: specops.project_schatten_ball(w[..., 0], x, p=1),
    "target": lambda w, x: specops.project_stable_rank(w[..., 0], target=x),
    "ratio": lambda w, x: specops.project_stable_rank(w[..., 0], ratio=x),
}


def other_libraries() -> list[Any]:
    strict, torch = (pytest.importorskip(name) for name in ("array_api_strict", "torch"))
    jax = pytest.importorskip("jax")
    return [lib.asarray(1.0) for lib in (np, strict, torch, jax.numpy)] + [np.array(1)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PROJECTIONS)
def test_of_any_library(eager: Backend, name: str) -> None:
    project, w = PROJECTIONS[name], eager.array(VALUES)
    expected = eager.numpy(project(w, 1.0))
    for bound in other_libraries():
        found = project(w, bound)
        eager.same_kind(found, w)
        np.testing.assert_array_equal(eager.numpy(found), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "bound",
    [np.True_, np.array(True), np.complex128(1), np.array(1 + 0j), 10**400, np.longdouble("1e400")],
    ids=str,
)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_what_is_no_real_number(name: str, bound: Any) -> None:
    with pytest.raises(ValueError, match=r"must be .*, got "):
        PROJECTIONS[name](VALUES, bound)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bound", [np.complex128(1), 10**400], ids=str)
def test_intervals_between_no_real_numbers(bound: Any) -> None:
    with pytest.raises(ValueError, match="lower must be a number, got "):
        specops.clip_singular_values(VALUES[..., 0], bound, 2.0)
