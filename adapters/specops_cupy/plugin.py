"""Hooks through which specops finds this adapter; imports cupy only to say whether it works."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from specops.errors import AdapterError
from specops.hookspecs import Adapter, AdapterStatus, hookimpl
from specops_cupy.device import find

_SUPPORTS = "weights, gradients, forward; checkpoints"


@hookimpl
def specops_adapter(model: Any) -> Adapter | None:
    """This adapter, if the model is a dict, possibly nested, that holds a CuPy array."""
    kind = getattr(sys.modules.get("cupy"), "ndarray", None)
    if kind is None:
        return None
    if isinstance(model, kind):
        raise AdapterError(
            'a bare CuPy array has no name for a plan to match: pass a dict, {"w": array}, and '
            'geometries={"w": ...}'
        )
    if not isinstance(model, Mapping) or not _holds(model, kind):
        return None
    from specops_cupy.adapter import CupyAdapter

    return CupyAdapter()


@hookimpl
def specops_adapter_status() -> AdapterStatus:
    """Whether CuPy is installed, loads and has a device."""
    cupy, detail = find()
    return AdapterStatus("cupy", cupy is not None, detail, _SUPPORTS)


def _holds(model: Mapping[Any, Any], kind: type) -> bool:
    return any(
        _holds(leaf, kind) if isinstance(leaf, Mapping) else isinstance(leaf, kind)
        for leaf in model.values()
    )
