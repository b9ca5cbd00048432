"""PyTorch adapter: rules that follow an optimizer's steps.

torch is imported on first use of a name, not with this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops_torch.attachment import Attachment, attach
    from specops_torch.balance import balance_norms
    from specops_torch.baselines import adversarial_loss, jacobian_penalty
    from specops_torch.geometry import geometry_of

__all__ = [
    "Attachment",
    "adversarial_loss",
    "attach",
    "balance_norms",
    "geometry_of",
    "jacobian_penalty",
]

_HOMES = {
    "attachment": ("Attachment", "attach"),
    "balance": ("balance_norms",),
    "baselines": ("adversarial_loss", "jacobian_penalty"),
    "geometry": ("geometry_of",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"specops_torch.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
