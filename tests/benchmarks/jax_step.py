"""What `specops_jax.constrain` adds to a jitted training step of ResNet-20."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import specops
from tests.benchmarks.harness import seconds_of

_EVERY = 10
_BLOCKS = 4


def run(repeats: int, quick: bool) -> None:
    """Print the table."""
    batch, blocks = (4, 1) if quick else (64, _BLOCKS * repeats)
    table = Table(
        title=f"constrain(ClipSpectralNorm, every={_EVERY}) inside the ball, jitted step, JAX on "
        f"the CPU, float32",
        title_justify="left",
        title_style="bold",
    )
    headers = ("network", "plain step", "constrained", "added", "compile", "constrained", "traces")
    for header in headers:
        table.add_column(header, justify="left" if header == "network" else "right")
    # Threads of LAPACK inside XLA only wait for each other.
    with threadpool_limits(1, user_api="blas"):
        # In little: one residual block.
        _fill(table, batch, blocks, {"widths": (16, 16)} if quick else {})
    Console(width=120).print(table)


def _fill(table: Table, batch: int, blocks: int, network: dict[str, Any]) -> None:
    sides = [_training(batch, slack, network) for slack in (None, 1.5)]
    compiling = [seconds_of(side.ten_steps) for side in sides]
    times: list[list[float]] = [[], []]
    shuffle = random.Random(0).shuffle
    for _ in range(blocks):
        order = [0, 1]
        shuffle(order)
        for i in order:
            times[i].append(seconds_of(sides[i].ten_steps) / _EVERY)
    plain = statistics.median(times[0])
    added = statistics.median(b - a for a, b in zip(*times, strict=True))
    table.add_row(
        f"{'a block of ' if network else ''}ResNet-20, batch {batch}",
        f"{plain * 1e3:.1f} ms",
        f"{statistics.median(times[1]) * 1e3:.1f} ms",
        f"{added / plain:.1%}",
        f"{compiling[0]:.1f} s",
        f"{compiling[1]:.1f} s",
        str(sides[1].traces),
    )


class _Side:
    """A training loop that takes ten steps at a time, so that each time holds one firing."""

    def __init__(self, step: Callable[[Any, Any], Any], params: Any, state: Any) -> None:
        import jax

        self.traces = 0

        def counted(params: Any, state: Any) -> Any:
            self.traces += 1
            return step(params, state)

        self._step = jax.jit(counted, donate_argnums=(0, 1))
        self._params, self._state = params, state

    def ten_steps(self) -> None:
        """Take them, and wait."""
        import jax

        for _ in range(_EVERY):
            self._params, self._state = self._step(self._params, self._state)
        jax.block_until_ready(self._params)


def _training(batch: int, slack: float | None, network: dict[str, Any]) -> _Side:
    """Plain, or with every norm capped at `slack` times the largest there is."""
    import jax
    import jax.numpy as jnp
    import optax

    import specops_jax
    from tests.benchmarks.jax_networks import ResNet20

    model, x = ResNet20(**network), jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    params = model.init(jax.random.key(1), x)["params"]
    transform = optax.sgd(1e-4, momentum=0.9)
    if slack is not None:
        geometries = specops_jax.geometries_of(model, x)
        rows = specops_jax.report(params, specops.Monitor(), geometries).constrained
        largest = max(row.norm for row in rows if row.norm is not None)
        rule = specops.ClipSpectralNorm(slack * largest)
        transform = optax.chain(transform, specops_jax.constrain(rule, geometries, every=_EVERY))

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(model.apply({"params": params}, x)))

    def step(params: Any, state: Any) -> Any:
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return _Side(step, params, transform.init(params))
