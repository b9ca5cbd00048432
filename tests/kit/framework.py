"""A neural network library in NumPy, as small as the conformance kit can use: "tiny"."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

Arrays = dict[str, np.ndarray]


class Dense:
    """y = x K + b with a kernel [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.shapes = {"kernel": (inputs, outputs), "bias": (outputs,)}

    def forward(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        self.x = x.reshape(len(x), -1)
        self.shape = x.shape
        return self.x @ kernel + bias

    def backward(self, dy: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, Arrays]:
        grads = {"kernel": self.x.T @ dy, "bias": dy.sum(0)}
        return (dy @ kernel.T).reshape(self.shape), grads


class Conv:
    """Channels last, a kernel [*window, in, out], zero padding on both sides."""

    def __init__(
        self, inputs: int, outputs: int, window: tuple[int, ...], stride: int = 1, padding: int = 0
    ) -> None:
        self.window, self.stride, self.padding = window, stride, padding
        self.shapes = {"kernel": (*window, inputs, outputs), "bias": (outputs,)}
        self.grid: tuple[int, ...] | None = None

    def forward(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        self.grid = x.shape[1:-1]
        pads = [(0, 0), *[(self.padding, self.padding)] * len(self.window), (0, 0)]
        self.padded = np.pad(x, pads)
        spatial = range(1, 1 + len(self.window))
        self.sizes = [
            (self.padded.shape[t] - self.window[t - 1]) // self.stride + 1 for t in spatial
        ]
        y = sum(self.padded[self._seen(tap)] @ kernel[tap] for tap in self._taps())
        return y + bias

    def backward(self, dy: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, Arrays]:
        grads = {"kernel": np.zeros_like(kernel), "bias": dy.sum(tuple(range(dy.ndim - 1)))}
        dx, flat = np.zeros_like(self.padded), dy.reshape(-1, dy.shape[-1])
        for tap in self._taps():
            seen = self.padded[self._seen(tap)]
            grads["kernel"][tap] = seen.reshape(-1, seen.shape[-1]).T @ flat
            dx[self._seen(tap)] += dy @ kernel[tap].T
        inside = (slice(self.padding, self.padding + n) for n in self.grid or ())
        return dx[(slice(None), *inside)], grads

    def _taps(self) -> Any:
        return itertools.product(*map(range, self.window))

    def _seen(self, tap: tuple[int, ...]) -> tuple[slice, ...]:
        steps = (
            slice(a, a + (m - 1) * self.stride + 1, self.stride)
            for a, m in zip(tap, self.sizes, strict=True)
        )
        return (slice(None), *steps)


class Tanh:
    """Without parameters."""

    shapes: ClassVar[dict[str, tuple[int, ...]]] = {}

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.y = np.tanh(x)
        return self.y

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, Arrays]:
        return dy * (1 - self.y**2), {}


class Model:
    """Layers in a row; parameters are called "<index>.<kind>"."""

    def __init__(self, *layers: Any, adapter: Any) -> None:
        rng = np.random.default_rng(0)
        self.layers, self.adapter = layers, adapter
        self.frozen: set[str] = set()
        self.parameters: Arrays = {
            f"{i}.{kind}": rng.standard_normal(shape).astype(np.float32)
            for i, layer in enumerate(layers)
            for kind, shape in layer.shapes.items()
        }
        self.use: Callable[[str, np.ndarray], np.ndarray] = lambda name, w: w
        """What a layer sees of a parameter."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.used = {}
        for i, layer in enumerate(self.layers):
            if hasattr(layer, "grid"):
                layer.grid = x.shape[1:-1]
            own = {k: self.use(f"{i}.{k}", self.parameters[f"{i}.{k}"]) for k in layer.shapes}
            self.used |= {f"{i}.{k}": w for k, w in own.items()}
            x = layer.forward(x, **own)
        return x

    def gradients(self, dy: np.ndarray) -> Arrays:
        """Of the raw parameters, after a forward pass; a norm divided by counts as constant."""
        result: Arrays = {}
        for i, layer in reversed(list(enumerate(self.layers))):
            kernel = [self.used[f"{i}.kernel"]] if layer.shapes else []
            dy, grads = layer.backward(dy, *kernel)
            for kind, g in grads.items():
                name = f"{i}.{kind}"
                raw, used = self.parameters[name], self.used[name]
                if used is not raw:
                    g = g * np.float32(np.vdot(used, raw) / np.vdot(raw, raw))
                result[name] = g
        return result


class SGD:
    """With momentum, and hooks around the step."""

    def __init__(self, model: Model, rate: float, momentum: float) -> None:
        self.model, self.rate, self.momentum = model, np.float32(rate), np.float32(momentum)
        self.velocity = {name: np.zeros_like(p) for name, p in model.parameters.items()}
        self.before: list[Callable[[Arrays], None]] = []
        self.after: list[Callable[[], None]] = []

    def step(self, gradients: Arrays) -> None:
        for hook in self.before:
            hook(gradients)
        for name, p in self.model.parameters.items():
            if name in self.model.frozen:
                continue
            self.velocity[name] = self.momentum * self.velocity[name] + gradients[name]
            p -= self.rate * self.velocity[name]
        for hook in self.after:
            hook()
