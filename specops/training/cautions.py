"""What a user should know of a plan, said as a warning."""

from __future__ import annotations

from specops.errors import CautionWarning
from specops.warned import warn


def caution(message: str) -> None:
    """Warn by a `CautionWarning`, located where specops was called."""
    warn(message, CautionWarning)
