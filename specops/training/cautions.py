"""Warnings about consequences of a plan that its user may not expect."""

from __future__ import annotations

from specops.errors import CautionWarning
from specops.warned import warn


def caution(message: str) -> None:
    """Warn by a `CautionWarning`, located where specops was called."""
    warn(message, CautionWarning)
