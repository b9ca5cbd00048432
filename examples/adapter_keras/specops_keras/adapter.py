"""What the plugin hands to specops."""

from __future__ import annotations

from typing import Any

import keras

from specops.authors import AdapterError, BaseAdapter, Plan
from specops_keras.callback import Spectral


class KerasAdapter(BaseAdapter):
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
