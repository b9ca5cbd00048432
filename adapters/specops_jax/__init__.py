"""specops in JAX training loops: optax transformations and pure functions on pytrees.

Names load on first use, so that looking for adapters imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "SpecopsState": "state",
    "add_penalty": "transforms",
    "adversarial_loss": "baselines",
    "check": "reports",
    "constrain": "transforms",
    "enforce": "functions",
    "find_state": "state",
    "geometries_of": "modules",
    "hessian_operator": "derivatives",
    "init": "functions",
    "init_scales": "functions",
    "input_gradient_norms": "derivatives",
    "jacobian_operator": "derivatives",
    "jacobian_penalty": "baselines",
    "margin_jacobians": "derivatives",
    "normalize_params": "functions",
    "penalty": "functions",
    "project_params": "functions",
    "records": "state",
    "report": "reports",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
