"""What the torch plugin hands to specops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specops.geometry import Geometry
from specops.training.plan import Plan
from specops.training.report import Report
from specops_torch.attachment import Attachment


class TorchAdapter:
    """Attach to, or project, a `torch.nn.Module`."""

    name = "torch"

    def attach(
        self,
        optimizer: Any,
        model: Any,
        plan: Plan,
        *,
        geometries: Mapping[str, Geometry] | None,
        **options: Any,
    ) -> Attachment:
        """See `specops_torch.attach`."""
        return Attachment(optimizer, model, plan, geometries, **options)

    def project(
        self, model: Any, plan: Plan, *, geometries: Mapping[str, Geometry] | None, **options: Any
    ) -> Report:
        """Fire every rule of the plan once; weights of forward rules become those in use."""
        attachment = Attachment(None, model, plan.once(), geometries, **options)
        folded = False
        try:
            attachment.step()
            report = attachment.report()
            attachment.detach(fold=True)
            folded = True
            return report
        finally:
            if not folded:
                attachment.detach()
