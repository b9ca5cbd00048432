"""The kit's laws on arrays of a library with a compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops.testing import Capabilities
from specops.testing.laws import LawChecks
from tests.kit.tiny import Tiny

jax = pytest.importorskip("jax")


class TestCompiledArrays(Tiny, LawChecks):
    """JAX arrays, and one rule: the others run on them elsewhere."""

    capabilities = Capabilities(supports_jit=True)

    def choices(self) -> Any:
        return dict.fromkeys(("law", "projection"), lambda: ["normalize-if-above"])

    def array(self, values: np.ndarray) -> Any:
        return jax.numpy.asarray(values)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def jit(self, function: Any) -> Any:
        return jax.jit(function)
