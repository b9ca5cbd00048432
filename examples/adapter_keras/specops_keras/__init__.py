"""Keras adapter: rules that follow `fit`, as a callback.

keras is imported on first use of a name, not with this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops_keras.callback import Spectral

__all__ = ["Spectral"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("specops_keras.callback"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
