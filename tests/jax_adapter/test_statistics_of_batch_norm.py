"""The README's way to estimate running statistics anew after a projection, in linen and in nnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402

import specops  # noqa: E402
import specops_jax  # noqa: E402

README = Path(__file__).parents[2] / "adapters/specops_jax/README.md"


def images() -> Any:
    return jax.random.normal(jax.random.key(1), (5, 16, 6, 6, 2), jnp.float32)


def by_hand(w: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means over batches of the mean and the variance behind a pointwise layer."""
    y = np.asarray(images(), np.float64) @ np.asarray(w, np.float64) + np.asarray(bias, np.float64)
    return y.mean((1, 2, 3)).mean(0), y.var((1, 2, 3)).mean(0)


def in_readme(name: str) -> Any:
    """A function that the README prints."""
    text = README.read_text(encoding="utf-8")
    source = text[text.index(f"def {name}(") :].split("\n\n\n")[0]
    found: dict[str, Any] = {"jax": jax, "jnp": jnp}
    exec(source, found)
    return found[name]


def test_of_linen_by_the_function_of_the_readme() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            y = linen.Dense(4)(x)
            return linen.BatchNorm(use_running_average=not train, momentum=0.8)(y)

    model = Net()
    variables = model.init(jax.random.key(0), images()[0], train=False)
    maps = {"Dense_0/kernel": specops.Dense(out_axes=(-1,))}
    params = specops_jax.enforce(variables["params"], specops.ClipSpectralNorm(0.25), maps)
    old = variables["batch_stats"]
    found = in_readme("estimated")(model, params, old, images(), momentum=0.8)["BatchNorm_0"]
    mean, var = by_hand(params["Dense_0"]["kernel"], params["Dense_0"]["bias"])
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-4)
    assert np.abs(np.asarray(old["BatchNorm_0"]["var"]) - var).min() > 0.5


def test_of_nnx_as_the_readme_says() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.dense = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.norm(self.dense(x))

    model = Net()
    model.dense.kernel[...] = specops_jax.enforce(
        {"w": model.dense.kernel[...]},
        specops.ClipSpectralNorm(0.25),
        {"w": specops.Dense(out_axes=(-1,))},
    )["w"]
    model.train()
    norm, found = model.norm, []
    for x in images():
        norm.mean[...] = norm.var[...] = jnp.zeros_like(norm.mean[...])
        model(x)
        own = [s / (1 - norm.momentum) for s in (norm.mean[...], norm.var[...])]
        found.append(own)
    mean, var = by_hand(model.dense.kernel[...], model.dense.bias[...])
    np.testing.assert_allclose(sum(m for m, _ in found) / len(found), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sum(v for _, v in found) / len(found), var, rtol=1e-4)
