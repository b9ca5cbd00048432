"""Warnings that point at the user's line, however deep in specops they are found."""

from __future__ import annotations

import sys
import warnings

_PACKAGES = ("specops", "specops_torch", "specops_jax", "specops_cupy")


def warn(message: str, category: type[Warning]) -> None:
    """Warn, located where these packages were called."""
    frame, level = sys._getframe(), 1
    while _is_ours(frame.f_globals.get("__name__", "")) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES
