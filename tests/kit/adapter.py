"""An adapter for "tiny": the plugin, attachments, geometries."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from specops import Conv, Dense
from specops.errors import NonFiniteError
from specops.geometry import Geometry
from specops.hookspecs import AdapterStatus, hookimpl
from specops.spectra import spectral_norm, spectral_norm_bounds
from specops.training.history import History
from specops.training.plan import Assignment, Plan, Weight, override_geometries
from specops.training.report import Report, plan_rows
from tests.kit import framework


class Attachment:
    """A plan at work on a tiny model."""

    def __init__(
        self, optimizer: Any, model: framework.Model, plan: Plan, geometries: Any = None
    ) -> None:
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.steps, self.states = 0, dict[str, Any]()
        self._history = History(1000)
        self._declared = dict(geometries or {})
        self.assignments = plan.assign(self._weights())
        self.rules = {a.weight.name: a for a in self.assignments if a.rule is not None}
        if optimizer is not None:
            model.use = self.use
            optimizer.before.append(self.before)
            optimizer.after.append(self.after)

    def _weights(self) -> list[Weight]:
        result = []
        for name, p in self.model.parameters.items():
            layer = self.model.layers[int(name.partition(".")[0])]
            known = {"geometry": self.geometry_of(layer)} if p.ndim > 1 else {"skipped": "a bias"}
            result.append(Weight(name, p.shape, str(p.dtype), **known))
        return override_geometries(result, self._declared)

    def geometry_of(self, layer: Any) -> Geometry:
        """The map of a layer's kernel."""
        if isinstance(layer, framework.Dense):
            return Dense(out_axes=(1,))
        pads, stride = (layer.padding,) * len(layer.window), layer.stride
        return Conv(layer.grid, stride=stride, padding=pads, layout="*IO")

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        """By name, at the sizes known by now."""
        found = {w.name: w.geometry for w in self._weights()}
        return {name: found[name] for name in self.rules}

    def use(self, name: str, w: np.ndarray) -> np.ndarray:
        """The weight of a forward pass."""
        assignment = self.rules.get(name)
        if assignment is None or assignment.rule.stage != "forward":
            return w
        geometry = self.geometries[name]
        if name not in self.states:
            self.states[name] = assignment.rule.init(w, geometry, name)
        step = self.steps + 1
        return assignment.rule.apply(w, geometry, self.states[name], step=step, name=name)

    def fires(self, assignment: Assignment, step: int) -> bool:
        """Whether a rule acts at a step."""
        return self.plan.fires(step, assignment.every)

    def before(self, gradients: dict[str, np.ndarray]) -> None:
        """The hook before a step."""
        for name, (term, state) in self.computed("gradients", self.steps + 1).items():
            gradients[name] = gradients[name] + term
            self.states[name] = state

    def after(self) -> None:
        """The hook after a step."""
        self.steps += 1
        self.write(self.computed("weights", self.steps) | self.computed("forward", self.steps))

    def computed(self, stage: str, step: int) -> dict[str, tuple[np.ndarray, Any]]:
        """(array, state) of every rule of the stage that is due."""
        result = {}
        for name, a in self.rules.items():
            if a.rule.stage != stage or not self.fires(a, step):
                continue
            w, geometry = self.model.parameters[name], self.geometries[name]
            if not np.isfinite(w).all():
                self.on_nonfinite(name, step)
                continue
            state = self.states.get(name) or a.rule.init(w, geometry, name)
            array, state, figures = a.rule.update(w, geometry, state, step=step, name=name)
            self._history.add({"step": step, "name": name, **figures})
            result[name] = array, state
        return result

    def on_nonfinite(self, name: str, step: int) -> None:
        """A weight that cannot be measured."""
        raise NonFiniteError(f"{name} holds NaN or infinity at step {step}")

    def write(self, computed: dict[str, tuple[np.ndarray, Any]]) -> None:
        """After all are computed."""
        for name, (array, state) in computed.items():
            self.model.parameters[name][...] = array
            self.states[name] = state

    @property
    def history(self) -> list[dict[str, Any]]:
        """Records."""
        return self._history.records()

    def report(self) -> Report:
        """Every parameter."""
        rows = []
        for row in plan_rows(self.assignments):
            if row.rule:
                w = self.use(row.name, self.model.parameters[row.name])
                geometry = self.geometries[row.name]
                if not np.isfinite(w).all():
                    figures = {"norm": float("nan"), "norm_is": "not finite"}
                elif isinstance(geometry, Dense) or geometry.grid is not None:
                    figures = {"norm": float(spectral_norm(w, geometry)), "norm_is": "exact"}
                else:
                    upper = float(spectral_norm_bounds(w, geometry).upper)
                    figures = {"norm": upper, "norm_is": "upper bound"}
                row = replace(row, **figures)
            rows.append(row)
        return Report(tuple(rows))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return copy.deepcopy({"steps": self.steps, "states": self.states})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.steps, self.states = saved["steps"], copy.deepcopy(saved["states"])

    def detach(self) -> None:
        """Off."""
        self.model.use = lambda name, w: w
        self.optimizer.before.remove(self.before)
        self.optimizer.after.remove(self.after)


class TinyAdapter:
    """What the plugin returns; flawed ones have another attachment."""

    name = "tiny"
    attachment: type[Attachment] = Attachment

    def attach(self, optimizer: Any, model: Any, plan: Plan, *, geometries: Any) -> Attachment:
        return self.attachment(optimizer, model, plan, geometries)

    def project(self, model: Any, plan: Plan, *, geometries: Any) -> Report:
        attachment = self.attachment(None, model, plan, geometries)
        attachment.write(attachment.computed("weights", 1))
        return attachment.report()


class Plugin:
    """The two hooks."""

    @hookimpl
    def specops_adapter(self, model: Any) -> Any:
        return model.adapter() if isinstance(model, framework.Model) else None

    @hookimpl
    def specops_adapter_status(self) -> AdapterStatus:
        return AdapterStatus("tiny", True, "for the tests of the kit")
