"""A convolution and a dense layer on arrays, with gradients by hand, and its training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import specops
from specops.geometry import Conv, Dense, Geometry

MAPS: dict[str, Geometry] = {"conv.k": Conv((5, 6), padding=1), "dense.w": Dense()}


def initial(asarray: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Weights of norms above 1."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return asarray(rng.standard_normal(shape).astype(np.float32))

    return {
        "conv": {"k": normal(4, 2, 3, 3), "b": normal(4)},
        "dense": {"w": normal(3, 120), "b": normal(3)},
    }


def convolve(
    xp: Any, x: Any, k: Any, *, stride: int = 1, dilation: int = 1, groups: int = 1, padding: int
) -> Any:
    """Cross-correlation of (samples, channels, height, width), written from its definition."""
    samples, channels, height, width = x.shape
    padded = xp.zeros((samples, channels, height + 2 * padding, width + 2 * padding), dtype=x.dtype)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows, columns = (
        (n + 2 * padding - dilation * (size - 1) - 1) // stride + 1
        for n, size in zip((height, width), k.shape[2:], strict=True)
    )
    outputs, per_group = k.shape[0] // groups, channels // groups
    parts = []
    for g in range(groups):
        part = xp.zeros((samples, outputs, rows, columns), dtype=x.dtype)
        for i, j in np.ndindex(*k.shape[2:]):
            top, left = dilation * i, dilation * j
            seen = padded[
                :,
                g * per_group : (g + 1) * per_group,
                top : top + stride * (rows - 1) + 1 : stride,
                left : left + stride * (columns - 1) + 1 : stride,
            ]
            tap = k[g * outputs : (g + 1) * outputs, :, i, j]
            part = part + xp.moveaxis(xp.tensordot(tap, seen, axes=((1,), (1,))), 0, 1)
        parts.append(part)
    return xp.concatenate(parts, axis=1)


class ArrayTraining:
    """Gradient descent on one batch."""

    rate = 0.02

    def __init__(self, xp: Any, attach: Any, model: Any, rule_or_plan: Any, **options: Any) -> None:
        rng = np.random.default_rng(1)
        self.xp, self.model = xp, model
        self.x = xp.asarray(rng.standard_normal((8, 2, 5, 6)).astype(np.float32))
        self.y = xp.asarray(10.0 * rng.standard_normal((8, 3)).astype(np.float32))
        self.maps = MAPS | (options.pop("geometries", None) or {})
        self.attachment = attach(None, model, rule_or_plan, geometries=self.maps, **options)

    def step(self) -> None:
        gradients = self._gradients()
        attached = self.attachment.is_attached
        if attached:
            self.attachment.before_step(gradients)
        for layer, arrays in self.model.items():
            for key, array in arrays.items():
                array -= self.rate * gradients[layer][key]
        if attached:
            self.attachment.step()

    def weights(self) -> dict[str, np.ndarray]:
        return {
            f"{layer}.{key}": np.array(_host(array))
            for layer, arrays in self.model.items()
            for key, array in arrays.items()
        }

    def outputs(self) -> np.ndarray:
        return _host(self._forward(self._used())[-1])

    def report(self) -> specops.Report:
        return self.attachment.report()

    def history(self) -> list[dict[str, Any]]:
        return self.attachment.history

    def save(self) -> Any:
        return copy.deepcopy((self.model, self.attachment.state_dict()))

    def restore(self, saved: Any) -> None:
        model, state = saved
        for layer, arrays in model.items():
            for key, array in arrays.items():
                self.model[layer][key][...] = array
        self.attachment.load_state_dict(state)

    def set_weight(self, name: str, values: np.ndarray) -> None:
        layer, key = name.split(".")
        self.model[layer][key][...] = self.xp.asarray(values)

    def enforce(self) -> None:
        self.attachment.enforce()

    def detach(self) -> None:
        self.attachment.detach()

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        names = {row.name for row in self.attachment.report(measure=False).constrained}
        return {name: geometry for name, geometry in self.maps.items() if name in names}

    def _used(self) -> Any:
        return self.attachment.normalized() if self.attachment.is_attached else self.model

    def _forward(self, used: Any) -> tuple[Any, Any]:
        conv, dense = used["conv"], used["dense"]
        hidden = convolve(self.xp, self.x, conv["k"], padding=1) + conv["b"][:, None, None]
        hidden = self.xp.tanh(hidden)
        return hidden, hidden.reshape(len(hidden), -1) @ dense["w"].T + dense["b"]

    def _gradients(self) -> dict[str, dict[str, Any]]:
        """Of the mean squared error, with respect to the arrays in use."""
        used = self._used()
        hidden, out = self._forward(used)
        above = (2.0 / out.size) * (out - self.y)
        below = (above @ used["dense"]["w"]).reshape(hidden.shape) * (1.0 - hidden**2)
        height, width = self.x.shape[2:]
        padded = self.xp.pad(self.x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        kernel = self.xp.empty_like(used["conv"]["k"])
        for i, j in np.ndindex(3, 3):
            seen = padded[:, :, i : i + height, j : j + width]
            kernel[:, :, i, j] = self.xp.tensordot(below, seen, axes=((0, 2, 3), (0, 2, 3)))
        return {
            "conv": {"k": kernel, "b": below.sum(axis=(0, 2, 3))},
            "dense": {"w": above.T @ hidden.reshape(len(hidden), -1), "b": above.sum(axis=0)},
        }


def _host(x: Any) -> np.ndarray:
    return x.get() if hasattr(x, "get") else np.asarray(x)
