"""What the plugin hands to specops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from specops.authors import AdapterError, Plan, Report
from specops_keras.callback import Spectral


class KerasAdapter:
    """Attach to, or project, a Keras model or layer."""

    name = "keras"

    def attach(
        self, optimizer: Any, model: Any, plan: Plan, *, geometries: Any = None, **options: Any
    ) -> Spectral:
        """A callback that is bound to the model: hand it to `fit`, or call its `step`."""
        if optimizer is not None and not isinstance(optimizer, keras.optimizers.Optimizer):
            raise AdapterError(
                f"{type(optimizer).__name__} is no Keras optimizer: pass the model's, or None and "
                f"call attachment.step() after each step"
            )
        spectral = Spectral(plan, geometries=geometries, **options)
        spectral.bind(model, optimizer)
        return spectral

    def project(
        self,
        model: Any,
        plan: Plan,
        *,
        geometries: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Report:
        """Fire every rule of the plan once."""
        attachment = self.attach(None, model, plan.once(), geometries=geometries, **options)
        try:
            attachment.step()
            return attachment.report()
        finally:
            attachment.detach()
