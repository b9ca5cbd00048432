"""What the CuPy plugin hands to specops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specops.geometry import Geometry
from specops.training.plan import Plan
from specops.training.report import Report
from specops_cupy.attachment import Attachment


class CupyAdapter:
    """Attach to, or project, a dict of arrays."""

    name = "cupy"

    def attach(
        self,
        optimizer: Any,
        model: Any,
        plan: Plan,
        *,
        geometries: Mapping[str, Geometry] | None,
        **options: Any,
    ) -> Attachment:
        """See `specops_cupy.attach`."""
        return Attachment(optimizer, model, plan, geometries, **options)

    def project(
        self, model: Any, plan: Plan, *, geometries: Mapping[str, Geometry] | None, **options: Any
    ) -> Report:
        """Fire every rule of the plan once; arrays of forward rules become those in use."""
        attachment = Attachment(None, model, plan.once(), geometries, **options)
        attachment.step()
        report = attachment.report()
        attachment.detach(fold=True)
        return report
