"""Run by test_meshes.py in a process of its own, which has eight devices: one line per case."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import specops
import specops_jax

Step = Callable[[Any, Any], Any]
GEOMETRIES = {
    "matrix": specops.Dense(out_axes=(-1,)),
    "twin": specops.Dense(out_axes=(-1,)),
    "stack": specops.Dense(out_axes=(-1,), batch_axes=(0,)),
    "kernel": specops.Conv((4, 4), layout="*IO"),
}
FOUR, EIGHT = (2, 2), (4, 2)
LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, P]]] = {
    "replicated": (FOUR, {"matrix": P()}),
    "rows": (EIGHT, {"matrix": P("x")}),
    "columns": (FOUR, {"matrix": P(None, "x")}),
    "both": (EIGHT, {"matrix": P("x", "y")}),
    "several": (EIGHT, {"matrix": P("x", "y"), "twin": P("y")}),
    "kernel": (FOUR, {"kernel": P(None, None, "y", "x")}),
    "stack": (EIGHT, {"stack": P(("x", "y"))}),
}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(-start)?\("
)


def weights() -> dict[str, np.ndarray]:
    """A matrix, a stack of eight and a kernel, all far outside of the unit ball."""
    rng = np.random.default_rng(0)
    shapes = {"matrix": (8, 12), "twin": (8, 12), "stack": (8, 4, 6), "kernel": (3, 3, 4, 4)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def optimized(transform: Any, params: Any) -> tuple[Step, Any]:
    """One step of optax."""

    def step(params: Any, state: Any) -> Any:
        updates, state = transform.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    return step, transform.init(params)


def constrained(plan: Any, maps: Any, params: Any) -> tuple[Step, Any]:
    """`constrain`, last in the chain."""
    return optimized(optax.chain(optax.adam(0.01), specops_jax.constrain(plan, maps)), params)


def penalized(plan: Any, maps: Any, params: Any) -> tuple[Step, Any]:
    """`add_penalty`, first in the chain."""
    return optimized(optax.chain(specops_jax.add_penalty(plan, maps), optax.sgd(0.01)), params)


def added(plan: Any, maps: Any, params: Any) -> tuple[Step, Any]:
    """`penalty` in the loss, and its gradient; `init` compiled."""

    def step(params: Any, state: Any) -> Any:
        terms = jax.grad(lambda p: specops_jax.penalty(p, plan, state, maps))(params)
        params = jax.tree.map(lambda w, g: w - 0.01 * g, params, terms)
        return specops_jax.project_params(params, plan, state, maps)

    return step, jax.jit(lambda params: specops_jax.init(params, plan, maps))(params)


def projected(plan: Any, maps: Any, params: Any) -> tuple[Step, Any]:
    """`project_params` alone."""

    def step(params: Any, state: Any) -> Any:
        return specops_jax.project_params(params, plan, state, maps)

    return step, specops_jax.init(params, plan, maps)


def normalized(plan: Any, maps: Any, params: Any) -> tuple[Step, Any]:
    """`normalize_params` in the loss; what it gives is given back too."""

    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            used = specops_jax.normalize_params(params, plan, state, maps)
            return sum(jnp.sum(jnp.sin(w)) for w in used.values()), used

        terms, used = jax.grad(loss, has_aux=True)(params)
        moved = jax.tree.map(lambda w, g: w - 0.01 * g, params, terms)
        params, state = specops_jax.project_params(moved, plan, state, maps)
        return params, state, used

    return step, specops_jax.init(params, plan, maps)


WAYS: dict[str, tuple[Any, Any]] = {
    "project_params": (projected, specops.ClipSpectralNorm(1.0)),
    "constrain": (constrained, specops.NormalizeIfAbove(1.0, norm="operator")),
    "add_penalty": (penalized, specops.SpectralNormPenalty(0.1, norm="operator")),
    "penalty": (added, specops.SpectralNormPenalty(0.1, norm="operator")),
    "normalize_params": (normalized, specops.SpectralNormalization(norm="operator")),
}
CASES = {
    "project_params": {"Auto": "stack", "Explicit": "stack"},
    "constrain": {"Auto": "replicated rows several stack", "Explicit": "both kernel stack"},
    "add_penalty": {"Auto": "rows"},
    "penalty": {"Explicit": "rows"},
    "normalize_params": {"Auto": "columns", "Explicit": "rows stack"},
}
"""Layouts by way and kind of the mesh's axes: all of the product would be minutes of compiling."""


def case(way: str, layout: str, kind: AxisType) -> dict[str, Any]:
    """How far two steps are from those on one device, and which arrays lost their layout."""
    make, plan = WAYS[way]
    shape, specs = LAYOUTS[layout]
    count = shape[0] * shape[1]
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2, devices=jax.devices()[:count])
    host = {name: w for name, w in weights().items() if name in specs}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {name: jax.device_put(w, places[name]) for name, w in host.items()}
    maps = {name: GEOMETRIES[name] for name in host}
    step, state = make(plan, maps, params)
    compiled = jax.jit(step).lower(params, state).compile()
    lost = []
    for _ in range(2):
        params, state, *used = compiled(params, state)
        lost += [
            name
            for tree in (params, *used)
            for name, w in tree.items()
            if not w.sharding.is_equivalent_to(places[name], w.ndim)
        ]
    expected = on_one(way, *host)
    found = [(n, w, expected[i][n]) for i, t in enumerate((params, *used)) for n, w in t.items()]
    off = max(float(np.max(np.abs(w - e)) / np.max(np.abs(e))) for _, w, e in found)
    inside, loops = within_loops(compiled.as_text())
    return {"off": off, "lost": sorted(set(lost)), "collectives": inside, "loops": loops}


@cache
def on_one(way: str, *names: str) -> Any:
    """What two steps make of these weights on one device."""
    make, plan = WAYS[way]
    params: Any = {name: jnp.asarray(w) for name, w in weights().items() if name in names}
    step, state = make(plan, {name: GEOMETRIES[name] for name in names}, params)
    compiled = jax.jit(step)
    for _ in range(2):
        params, state, *used = compiled(params, state)
    return jax.device_get((params, *used))


def within_loops(text: str) -> tuple[list[str], int]:
    """(the collectives that a compiled program runs inside of its loops, how many loops it has)."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start:
            lines = bodies.setdefault(start[1], [])
        else:
            lines.append(line)
    loops = [x for body in bodies.values() for x in body if " while(" in x]
    waiting, seen = [name for line in loops for name in called(line)], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [other for line in bodies[name] for other in called(line)]
    inside = [line.strip()[:160] for name in seen for line in bodies[name]]
    return [line for line in inside if COLLECTIVE.search(line)], len(loops)


def called(line: str) -> list[str]:
    """The computations that an instruction runs."""
    one = r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    several = re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line)
    return re.findall(one, line) + [n.strip(" %") for names in several for n in names.split(",")]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    for way, by_kind in CASES.items():
        for kind, layouts in by_kind.items():
            for layout in layouts.split():
                names = f"{way}; {layout}; {kind}"
                if all(part in names for part in sys.argv[1:]):
                    print(json.dumps([names, case(way, layout, AxisType[kind])]), flush=True)
