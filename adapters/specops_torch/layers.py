"""Noticing that layers of a model were replaced, added, taken out or unfrozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from specops.training.cautions import caution
from specops.training.plan import Assignment
from specops_torch.constrained import Constrained
from specops_torch.location import OUTSIDE


class Layers:
    """The layers of a model in their order, and which of their parameters are trained.

    Modules are compared and not parameters, since `fully_shard` exchanges those in each step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._gone: dict[str, Any] = {}
        self.look()

    def look(self) -> None:
        """Remember the layers as they are."""
        self._listed = _listed(self._model)
        self._holders, self._trained = self._holding(), self._trains()

    def have_changed(self) -> bool:
        """Whether there are other layers or newly trained parameters since the latest `look`.

        A layer that was frozen meanwhile, as in turns with another, is not new.
        """
        listed = _listed(self._model)
        if self._listed == listed:
            return False
        self._listed = listed
        return self._holding() != self._holders or bool(self._trains() - self._trained)

    def _holding(self) -> list[nn.Module]:
        """The modules with parameters: models may make others in each forward pass."""
        return [module for module in self._model.modules() if module._parameters]

    def _trains(self) -> set[tuple[nn.Module, str]]:
        return {
            (module, name)
            for module in self._model.modules()
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        }

    def check(self, constrained: Iterable[Constrained]) -> None:
        """Note which weights under a rule have left with their layers.

        Raises
        ------
        AdapterError
            A layer is there, and its weight was reparametrised or removed.
        """
        self._gone, modules = {}, set(self._model.modules())
        for c in constrained:
            if c.location.module in modules:
                _ = c.location.parameter
            else:
                self._gone[c.name] = c.rule

    def warn_of_replaced(self, assignments: Iterable[Assignment]) -> None:
        """Warn of layers without a rule in the place of those that had one, and are gone."""
        for a in assignments:
            name, outside = a.weight.name, a.reason.startswith(OUTSIDE)
            if a.rule is None and outside and name in self._gone:
                caution(
                    f"the layer of {name} was replaced, and the new one is {OUTSIDE}: "
                    f"{self._gone[name]!r} does not act on it until optimizer.add_param_group "
                    f"brings it in"
                )


def _listed(model: nn.Module) -> list[Any]:
    """Modules with parameters, the names of these and which are trained, in one list.

    This runs at every step, so it calls nothing. Each module is listed once: one may hold another
    that holds it.
    """
    found: list[Any] = []
    waiting, seen = [model], set[nn.Module]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if module._parameters:
            found.append(module)
            for name, p in module._parameters.items():
                found += name, p is not None and p.requires_grad
        waiting += [child for child in module._modules.values() if child is not None]
    return found
