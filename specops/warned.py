"""Warnings that point at the user's line, however deep in specops they arise."""

from __future__ import annotations

import inspect
import warnings


def warn(message: str, category: type[Warning]) -> None:
    """Warn, located where the user called specops, or torch, whose hooks call specops."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_passed(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_passed(module: str) -> bool:
    package = module.partition(".")[0]
    return package in ("specops", "torch") or package.startswith("specops_")
