"""`BaseAdapter`: what a plugin returns to specops if its attachment is a `BaseAttachment`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from specops.geometry import Geometry
from specops.training.attachment import BaseAttachment
from specops.training.plan import Plan
from specops.training.report import Report


class BaseAdapter:
    """Attach to, or project, a model.

    Attributes
    ----------
    name : str
        The name under which ``specops adapters`` lists it.
    attachment : subclass of BaseAttachment
        Called as ``attachment(optimizer, model, plan, geometries, **options)``.
    """

    name: str
    attachment: ClassVar[Callable[..., BaseAttachment[Any]]]

    def attach(
        self,
        optimizer: Any,
        model: Any,
        plan: Plan,
        *,
        geometries: Mapping[str, Geometry] | None,
        **options: Any,
    ) -> BaseAttachment[Any]:
        """Make the plan act after every step of the optimizer."""
        return self.attachment(optimizer, model, plan, geometries, **options)

    def project(
        self, model: Any, plan: Plan, *, geometries: Mapping[str, Geometry] | None, **options: Any
    ) -> Report:
        """Fire every rule of the plan once; weights of forward rules become those in use."""
        attachment = self.attach(None, model, plan.once(), geometries=geometries, **options)
        try:
            attachment.step()
            report = attachment.report()
            attachment.detach(fold=True)
        except BaseException:
            attachment.detach()
            raise
        attachment.caution("project()")
        return report
