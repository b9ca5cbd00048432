"""The warning about a weight on which another attachment acts already."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakSet

from specops.errors import CautionWarning
from specops.training.attachment import BaseAttachment
from specops.training.cautions import caution

_BEGUN: WeakSet[BaseAttachment[Any]] = WeakSet()
"""The attachments that were made in this process, while somebody holds them."""


def warn_of_others(attachment: Any) -> None:
    """Warn if a rule of another attachment, of the same stage, acts on a weight already."""
    if not isinstance(attachment, BaseAttachment):
        return
    others = _others(attachment)
    if others:
        # Attachments that nobody uses any more may still be alive in reference cycles.
        gc.collect()
        others = _others(attachment)
    _BEGUN.add(attachment)
    if others:
        name, rule = others[0]
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        try:
            caution(
                f"{name}{more} is under {rule!r} already, by another attachment, and both will "
                f"act: detach() that one first, or give each weight one rule in one plan"
            )
        except CautionWarning:  # raised if the user turned warnings into errors
            attachment.detach()
            raise


def _others(attachment: Any) -> list[tuple[str, Any]]:
    held = {key: c.rule for other in _BEGUN for c in other.under_rules() for key in _keys(c)}
    mine = attachment.under_rules()
    return [(c.name, held[key]) for c in mine for key in _keys(c) if key in held]


def _keys(c: Any) -> list[tuple[int, str]]:
    """(memory, stage) of a weight; none if the adapter does not identify memory."""
    identity = c.parameter.identity()
    return [] if identity is None else [(identity, c.stage)]
