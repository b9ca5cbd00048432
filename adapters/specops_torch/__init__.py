"""PyTorch adapter: constraints that follow an optimizer's steps.

torch is imported on first use of a name, not with this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops_torch.attachment import Attachment, attach
    from specops_torch.geometry import geometry_of

__all__ = ["Attachment", "attach", "geometry_of"]


def __getattr__(name: str) -> Any:
    if name in ("attach", "Attachment"):
        from specops_torch import attachment

        return getattr(attachment, name)
    if name == "geometry_of":
        from specops_torch.geometry import geometry_of

        return geometry_of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
