"""A bound on every step of a transformer that the devices of a mesh hold in parts, in JAX.

    python examples/train_distributed_jax.py --devices 8 --quick

Trains on lines of sums that it makes, or on ``--data FILE``, letter by letter. Matrices are stacked
and sharded along the stack by `NamedSharding`, so that each is bounded where it lies, batches along
the mesh's first axis. The rule is the last link of the optax chain. Every step is also computed
without it, and the last line says what it adds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import letters
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from threadpoolctl import threadpool_limits

import specops
import specops_jax

LAYOUTS = {
    "letters": P(),
    "places": P(),
    "attention": P(None, "data"),
    "feed": P(None, "model"),
}
MAPS = {
    "attention": specops.Dense(out_axes=(-1,), batch_axes=(0, 1)),
    "feed": specops.Dense(out_axes=(-1,), batch_axes=(0, 1)),
}
"""Of stacked layers each matrix is constrained for itself."""


def initial(count: int, options: argparse.Namespace) -> dict[str, jax.Array]:
    """Parameters before the first step, matrices of all layers stacked."""
    d, n = options.size, options.layers
    shapes = {
        "letters": (count, d),
        "places": (options.length, d),
        "attention": (n, 4, d, d),
        "feed": (n, 2, d, 4 * d),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / d**0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    """(batch, length) letters to (batch, length, letters): of the letter that comes next."""

    def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        query, key, value, out = w["attention"]
        heads = (*h.shape[:2], 4, -1)
        q, k, v = ((normed(h) @ each).reshape(heads) for each in (query, key, value))
        met = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h = h + met.reshape(h.shape) @ out
        up, down = w["feed"]
        return h + jax.nn.gelu(normed(h) @ up) @ down.T, None

    h = params["letters"][x] + params["places"][: x.shape[1]]
    h, _ = jax.lax.scan(layer, h, {name: params[name] for name in MAPS})
    found: jax.Array = normed(h) @ params["letters"].T
    return found


def normed(h: jax.Array) -> jax.Array:
    """Of mean square 1."""
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def step_of(optimizer: Any) -> Any:
    """A training step, for `jax.jit`."""

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        found = logits(params, batch[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(found, batch[:, 1:])
        return losses.mean()

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def timed(program: Any, *given: Any) -> tuple[Any, float]:
    """(what a program gives, its seconds)."""
    began = time.perf_counter()
    return jax.block_until_ready(program(*given)), time.perf_counter() - began


def train(options: argparse.Namespace) -> tuple[dict[str, jax.Array], list[float]]:
    """(the parameters, the loss by step); and say what the rule cost."""
    text, devices = letters.load(options.data), jax.devices()
    pairs = 2 if len(devices) % 2 == 0 else 1
    mesh = Mesh(np.asarray(devices).reshape(-1, pairs), ("data", "model"))
    layouts = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS.items()}
    params = jax.device_put(initial(len(text.names), options), layouts)

    rule, adam = specops.ClipSpectralNorm(options.max_norm), optax.adamw(1e-3)
    bounded = optax.chain(adam, specops_jax.constrain(rule, MAPS))
    # Laid out from the beginning as it stays, or the second step would be compiled anew.
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
        bounded.init(params),
    )
    kept = jax.tree.map(lambda x: x.sharding, state)
    with_rule = jax.jit(step_of(bounded), out_shardings=(layouts, kept, whole))
    without = jax.jit(step_of(adam), out_shardings=(layouts, kept[0], whole))

    rng, losses, seconds = np.random.default_rng(0), [], []
    for _ in range(options.steps):
        chosen = text.batch(options, rng).astype(np.int32)
        batch = jax.device_put(chosen, NamedSharding(mesh, P("data")))
        _, plain = timed(without, params, state[0], batch)  # the state of the first link
        (params, state, loss), bound = timed(with_rule, params, state, batch)
        losses.append(float(loss))
        seconds.append((bound, plain))
    specops_jax.check(specops_jax.find_state(state))
    params = specops_jax.enforce(params, rule, MAPS)
    specops_jax.report(params, rule, MAPS).show()
    # Compilation is over, and weights have come inside.
    bound, plain = (statistics.median(x[options.steps // 5 :]) for x in zip(*seconds, strict=True))
    print(
        f"{len(devices)} devices, {options.steps} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}; "
        f"a step {bound * 1e3:.1f} ms, without the rule {plain * 1e3:.1f} ms: "
        f"{1 - plain / bound:.1%} of it"
    )
    return params, losses


def main(arguments: list[str] | None = None) -> tuple[dict[str, jax.Array], list[float]]:
    """Train on the devices that are there."""
    parser = letters.parser(__doc__)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="so many devices, made of the processor's cores"
    )
    options = letters.parsed(parser, arguments)
    if options.devices:
        # Read when the first device is asked for.
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        # Threads in which they wait for each other: with one a core they may do so for ever.
        os.environ.setdefault("NPROC", str(4 * options.devices))
        jax.config.update("jax_platforms", "cpu")
    # XLA calls LAPACK for one small matrix after the other, which threads slow down a hundredfold.
    with threadpool_limits(1, user_api="blas"):
        return train(options)


if __name__ == "__main__":
    main()
