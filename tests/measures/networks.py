"""One small ReLU network, in NumPy float64, torch and JAX."""

from __future__ import annotations

from typing import Any

import numpy as np

RNG = np.random.default_rng(7)
WEIGHTS = [RNG.normal(size=shape) / 2 for shape in ((8, 5), (6, 8), (3, 6))]
BIASES = [RNG.normal(size=len(w)) / 4 for w in WEIGHTS]
X, LABELS = RNG.normal(size=(9, 5)), RNG.integers(0, 3, 9)


def forward(x: np.ndarray) -> list[np.ndarray]:
    """The layers before their ReLU, the last of which are logits."""
    layers = []
    for w, b in zip(WEIGHTS, BIASES, strict=True):
        x = (np.maximum(layers[-1], 0) if layers else x) @ w.T + b
        layers.append(x)
    return layers


def jacobian(x: np.ndarray, start: int = 0) -> np.ndarray:
    """Of the logits of one sample by what enters layer `start` (after its ReLU)."""
    layers = forward(x[None])
    j = np.eye(len(WEIGHTS[start][0]))
    for i in range(start, len(WEIGHTS)):
        j = WEIGHTS[i] @ j
        if i + 1 < len(WEIGHTS):
            j = (layers[i][0] > 0)[:, None] * j
    return j


def logits(x: Any, weights: Any, biases: Any, relu: Any) -> Any:
    """The network on arrays of any library."""
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = (relu(x) if i else x) @ w.T + b
    return x


def cross_entropy(values: np.ndarray, label: int) -> np.ndarray:
    """Of rows of logits, all of one class."""
    top = values.max(axis=1, keepdims=True)
    sums = np.log(np.exp(values - top).sum(axis=1)) + top[:, 0]
    return sums - values[:, label]
