"""An adapter for "tiny": all that a library of plain arrays takes, with rules of every stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import Conv, Dense, Plan
from specops.authors import (
    AdapterStatus,
    BaseAdapter,
    BaseAttachment,
    Geometry,
    Parameter,
    Weight,
    hookimpl,
)
from tests.kit import framework


class Kernel(Parameter):
    """A kernel or a bias of a layer."""

    def __init__(self, model: framework.Model, name: str) -> None:
        self.model, self.name = model, name
        self.layer = model.layers[int(name.partition(".")[0])]
        self.learns_size = isinstance(self.layer, framework.Conv)
        array = self.read()
        self.weight = Weight.of(name, array.shape, str(array.dtype), self.inferred())

    def inferred(self) -> Geometry:
        """The map of the layer, at the size known by now."""
        if isinstance(self.layer, framework.Dense):
            return Dense(out_axes=(1,))
        pads = (self.layer.padding,) * len(self.layer.window)
        return Conv(self.layer.grid, stride=self.layer.stride, padding=pads, layout="*IO")

    def geometry(self) -> Geometry:
        """The same, unless the user knows better."""
        return super().geometry() if self.declared else self.inferred()

    def frozen(self) -> str:
        """A rule waits for the model to train it again."""
        return "frozen" if self.name in self.model.frozen else ""

    def sizes(self) -> Any:
        """The grid of a convolution."""
        return self.layer.grid if self.learns_size else None

    def see(self, sizes: Any) -> None:
        """That of a checkpoint."""
        if sizes is not None:
            self.layer.grid = sizes

    def read(self) -> np.ndarray:
        """The model's own array."""
        return self.model.parameters[self.name]

    def write(self, value: np.ndarray) -> None:
        """In place."""
        self.read()[...] = value


class Attachment(BaseAttachment):
    """A plan at work on a tiny model."""

    stages = ("weights", "gradients", "forward")
    kind: type[Kernel] = Kernel

    def __init__(
        self, optimizer: Any, model: framework.Model, plan: Plan, geometries: Any = None
    ) -> None:
        super().__init__(plan, geometries)
        self.model, self.optimizer = model, optimizer
        self.assign()
        if optimizer is not None:
            model.use = self.use
            optimizer.before.append(self.before_step)
            optimizer.after.append(self.step)

    def parameters(self) -> list[Kernel]:
        """Every parameter of the model."""
        return [self.kind(self.model, name) for name in self.model.parameters]

    def use(self, name: str, w: np.ndarray) -> np.ndarray:
        """The weight of a forward pass."""
        return self.weights().get(name, w)

    def detach(self, *, fold: bool = False) -> None:
        """Off."""
        super().detach(fold=fold)
        self.model.use = lambda name, w: w
        if self.optimizer is not None:
            self.optimizer.before.remove(self.before_step)
            self.optimizer.after.remove(self.step)


class TinyAdapter(BaseAdapter):
    """What the plugin returns; flawed ones have another attachment."""

    name = "tiny"
    attachment = Attachment


class Plugin:
    """The two hooks."""

    @hookimpl
    def specops_adapter(self, model: Any) -> Any:
        return model.adapter() if isinstance(model, framework.Model) else None

    @hookimpl
    def specops_adapter_status(self) -> AdapterStatus:
        return AdapterStatus("tiny", True, "for the tests of the kit")
