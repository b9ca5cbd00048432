"""Train a small convolutional network twice, plain and with every layer's norm clipped, in JAX.

The second run differs by one link at the end of the optax chain, which keeps the operator norm
of each layer at or below --max-norm. Network, data, batches and optimizer are those of
train_digits.py, and so are the statistics of batch normalisation, estimated anew after the last
step, the table and the figure.

    python examples/train_digits_jax.py
    python examples/train_digits_jax.py --data cifar10_train_*.npz cifar10_test.npz --epochs 3
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.progress import Progress
from threadpoolctl import threadpool_limits

import specops
import specops_jax

fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Between ±1/√(fan in), torch's default."""
MOMENTUM = 0.9
"""Of the running statistics, as flax counts it."""


class Network(nn.Module):
    """Four convolutions with batch norm and a linear head."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for features, stride in ((16, 1), (32, 1), (48, 2), (48, 1)):
            x = nn.Conv(
                features,
                (3, 3),
                strides=stride,
                padding=1,
                use_bias=False,
                kernel_init=fan_in_uniform,
            )(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
            x = nn.relu(x)
        x = x.mean((1, 2))
        bound = 1 / math.sqrt(x.shape[-1])
        return nn.Dense(
            self.classes,
            kernel_init=fan_in_uniform,
            bias_init=partial(jax.random.uniform, minval=-bound, maxval=bound),
        )(x)


def initial(network: Network, data: digits.Data, options: argparse.Namespace) -> Any:
    """Parameters and statistics before the first step."""
    return network.init(jax.random.key(options.seed), data.x_train[:1], train=False)


def one_cycle(steps: int, start: float, middle: float, end: float) -> optax.Schedule:
    """torch's OneCycleLR: half a cosine to the middle value, half a cosine to the end."""
    turn, last = 0.3 * steps - 1, steps - 1

    def value(step: jax.Array) -> jax.Array:
        def cosine(a: float, b: float, share: jax.Array) -> jax.Array:
            return b + (a - b) / 2 * (1 + jnp.cos(jnp.pi * share))

        there = cosine(start, middle, step / turn)
        back = cosine(middle, end, (step - turn) / (last - turn))
        return jnp.where(step <= turn, there, back)

    return value


def sgd(steps: int) -> optax.GradientTransformation:
    """Nesterov's momentum and weight decay, one cycle of both rates."""
    peak = 0.1
    return optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.inject_hyperparams(optax.sgd)(
            learning_rate=one_cycle(steps, peak / 25, peak, peak / 25e4),
            momentum=one_cycle(steps, 0.95, 0.85, 0.95),
            nesterov=True,
        ),
    )


def train(
    data: digits.Data,
    rule: specops.ClipSpectralNorm | None,
    options: argparse.Namespace,
    progress: Progress,
) -> digits.Run:
    """One run; both runs see the same initial weights and the same batches."""
    # XLA calls LAPACK for one small matrix after the other, which threads slow down a hundredfold.
    with jax.default_device(options.device), threadpool_limits(1, user_api="blas"):
        return _train(data, rule, options, progress)


def _train(
    data: digits.Data,
    rule: specops.ClipSpectralNorm | None,
    options: argparse.Namespace,
    progress: Progress,
) -> digits.Run:
    batches = data.batches(options)
    network = Network(data.classes)
    geometries = specops_jax.geometries_of(network, data.x_train[:1], train=False)
    optimizer = sgd(len(batches))
    if rule is not None:
        plan = last_step_included(rule, options.every, len(batches))
        optimizer = optax.chain(optimizer, specops_jax.constrain(plan, geometries))

    def step(state: Any, images: jax.Array, labels: jax.Array, chosen: jax.Array) -> Any:
        params, statistics, memory = state

        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            logits, new = network.apply(
                variables, images[chosen], train=True, mutable="batch_stats"
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
            return losses.mean(), new["batch_stats"]

        gradients, statistics = jax.grad(loss, has_aux=True)(params)
        updates, memory = optimizer.update(gradients, memory, params)
        return optax.apply_updates(params, updates), statistics, memory

    label = "plain" if rule is None else f"clipped at {options.max_norm:g}"
    task = progress.add_task(label, total=len(batches), result="compiling")
    began = time.perf_counter()
    variables = initial(network, data, options)
    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    arrays = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    # Compiled ahead, so that nothing is compiled during training and the times are told apart.
    compiled = jax.jit(step).lower(state, *arrays, batches[0]).compile()
    compilation = time.perf_counter() - began

    progress.update(task, result="")
    began = time.perf_counter()
    for chosen in batches:
        state = jax.block_until_ready(compiled(state, *arrays, chosen))
        progress.advance(task)
    seconds = time.perf_counter() - began
    params, statistics, memory = state
    if rule is not None:
        specops_jax.check(specops_jax.find_state(memory))
    one_pass = batches[-(len(batches) // options.epochs) :]
    statistics = estimated(network, params, statistics, (arrays[0][i] for i in one_pass))
    trained = network.bind({"params": params, "batch_stats": statistics})
    accuracy = evaluate(trained, data)
    progress.update(task, result=f"test accuracy {accuracy:.2%}")
    layers = {}
    for name, geometry in geometries.items():
        layer, kernel = name.split("/")
        layers[layer] = np.asarray(params[layer][kernel]), geometry
    remark = f"after {compilation:.1f} s of compilation"
    return digits.Run(trained, layers, accuracy, seconds, remark)


def estimated(network: Network, params: Any, statistics: Any, batches: Iterable[jax.Array]) -> Any:
    """Statistics of batch normalisation for these parameters: means over batches of their own."""
    none = jax.tree.map(jnp.zeros_like, statistics)

    @jax.jit
    def of_one(images: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": none}
        _, new = network.apply(variables, images, train=True, mutable="batch_stats")
        return jax.tree.map(lambda share: share / (1 - MOMENTUM), new["batch_stats"])

    found = [of_one(images) for images in batches]
    return jax.tree.map(lambda *each: sum(each) / len(each), *found)


def last_step_included(rule: specops.ClipSpectralNorm, every: int, steps: int) -> specops.Plan:
    """Act every so many steps, counted so that the last one is among them."""
    every = min(every, steps)
    return specops.Plan([("*", rule)], every=every, start=steps % every)


def evaluate(network: Network, data: digits.Data) -> float:
    """Share of test images classified correctly."""
    module, variables = network.unbind()
    classify = jax.jit(lambda x: module.apply(variables, x, train=False).argmax(1))
    chunks = [data.x_test[i : i + 500] for i in range(0, len(data.x_test), 500)]
    found = np.concatenate([np.asarray(classify(x)) for x in chunks])
    return float(np.mean(found == data.y_test))


def find_device(name: str) -> jax.Device:
    """The device called platform or platform:index."""
    platform, _, index = name.partition(":")
    return jax.devices(platform)[int(index or 0)]


def clip(options: argparse.Namespace) -> specops.ClipSpectralNorm:
    """The rule: certified whenever it acts, so that after the last step nothing remains to do."""
    return specops.ClipSpectralNorm(options.max_norm, screen=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return digits.parse(__doc__, find_device, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train twice, compare, draw."""
    options = parse(arguments)
    digits.compare(train, clip(options), options)


if __name__ == "__main__":
    main()
