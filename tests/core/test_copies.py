"""No more copies of a large weight than an operation needs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

import specops
from specops import Dense

WEIGHT = np.random.default_rng(1).standard_normal((512, 512))


def peak_in_weights(function: Callable[[], Any]) -> float:
    tracemalloc.start()
    kept = function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return peak / WEIGHT.nbytes


def test_a_weight_in_use_is_not_copied_once_more() -> None:
    rule = specops.SpectralNormalization(norm="reshaped")
    state = rule.init(WEIGHT, Dense(), "w")
    # The weight near 1 and the quotient.
    assert peak_in_weights(lambda: rule.apply(WEIGHT, Dense(), state)) < 2.5


def test_a_penaltys_term_is_the_dyad_alone() -> None:
    rule = specops.SpectralNormPenalty(0.01, norm="reshaped")
    state = rule.init(WEIGHT, Dense(), "w")
    assert peak_in_weights(lambda: rule.penalty(WEIGHT, Dense(), state)) < 1.5
