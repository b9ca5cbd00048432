"""Run by test_meshes.py in a process of its own, which has eight devices: one line per case."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock

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
    "tall": specops.Dense(out_axes=(-1,)),
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
    "all": (
        EIGHT,
        {
            "matrix": P("x", "y"),
            "twin": P("y"),
            "stack": P(("x", "y")),
            "tall": P(None, "x"),
            "kernel": P(None, None, "y", "x"),
        },
    ),
}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(-start)?\("
)


def weights() -> dict[str, np.ndarray]:
    """A matrix, a stack of eight and a kernel, all far outside of the unit ball."""
    rng = np.random.default_rng(0)
    shapes = {
        "matrix": (8, 12),
        "twin": (8, 12),
        "stack": (8, 4, 6),
        "kernel": (3, 3, 4, 4),
        "tall": (12, 8),
    }
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

    compiled = jax.jit(lambda params: specops_jax.init(params, plan, maps))
    on_mesh = any(len(w.sharding.device_set) > 1 for w in params.values())
    return step, (compiled(params) if on_mesh else specops_jax.init(params, plan, maps))


def projected(plan: Any, maps: Any, params: Any) -> tuple[Step, Any]:
    """`project_params`, and what the loss would use then."""

    def step(params: Any, state: Any) -> Any:
        params, state = specops_jax.project_params(params, plan, state, maps)
        return params, state, specops_jax.normalize_params(params, plan, state, maps)

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
    "project_params": (projected, specops.Plan([("*", specops.ClipSpectralNorm(1.0))])),
    "constrain": (constrained, specops.NormalizeIfAbove(1.0, norm="operator")),
    "add_penalty": (penalized, specops.SpectralNormPenalty(0.1, norm="operator")),
    "penalty": (added, specops.SpectralNormPenalty(0.1, norm="operator")),
    "normalize_params": (normalized, specops.SpectralNormalization(norm="operator")),
    "a rule each": (
        projected,
        specops.Plan(
            [
                ("matrix", specops.SpectralSoftCap(1.0, norm="operator")),
                ("twin", specops.SpectralHammer(1.0, norm="operator")),
                ("stack", specops.ProjectStableRank(ratio=0.5, norm="operator")),
                ("tall", specops.StableRankNormalization(0.5, norm="operator")),
                ("kernel", specops.ClipAndCut(1.0)),
            ]
        ),
    ),
}
RULES: dict[str, Any] = {
    "ClipSpectralNorm": specops.ClipSpectralNorm(1.0),
    "SpectralSoftCap": specops.SpectralSoftCap(1.0, norm="operator"),
    "SpectralHammer": specops.SpectralHammer(1.0, norm="operator"),
    "ProjectStableRank": specops.ProjectStableRank(ratio=0.5, norm="operator"),
    "StableRankNormalization": specops.StableRankNormalization(0.5, norm="operator"),
    "SpectralNormalization": specops.SpectralNormalization(norm="operator"),
    "NormalizeIfAbove": specops.NormalizeIfAbove(1.0, norm="operator"),
    "ClipAndCut": specops.ClipAndCut(1.0),
}
CASES = {
    "project_params": {"Auto": "stack", "Explicit": "rows stack"},
    "constrain": {"Auto": "replicated rows several stack", "Explicit": "both kernel stack"},
    "add_penalty": {"Auto": "rows"},
    "penalty": {"Explicit": "rows"},
    "normalize_params": {"Auto": "columns", "Explicit": "rows stack"},
    "a rule each": {"Auto": "all"},
}
"""Layouts by way and kind of the mesh's axes: all of the product is minutes of compiling."""


def cases() -> list[tuple[str, str, str]]:
    """(way, layout, kind) of those above; with SPECOPS_CASES all there are, of each rule alone."""
    if "SPECOPS_CASES" not in os.environ:
        return [(w, x, k) for w, kinds in CASES.items() for k in kinds for x in kinds[k].split()]
    WAYS.update({name: (projected, specops.Plan([("*", rule)])) for name, rule in RULES.items()})
    one_kind = [name for name in LAYOUTS if name != "all"]
    return [
        (way, layout, kind)
        for way in WAYS
        for layout in (["all"] if way == "a rule each" else one_kind)
        for kind in ("Auto", "Explicit")
        if way not in RULES
        or not any(RULES[way].obstacle(GEOMETRIES[name]) for name in LAYOUTS[layout][1])
    ]


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
    lost, given = [], compiled.input_shardings[0][1]
    for _ in range(2):
        # Where states lie is the partitioner's choice; this program was compiled for one.
        params, state, *used = compiled(params, jax.device_put(state, given))
        lost += [
            name
            for tree in (params, *used)
            for name, w in tree.items()
            if not w.sharding.is_equivalent_to(places[name], w.ndim)
        ]
    jax.eval_shape(step, params, state)  # a loop goes on with it as it lies now
    expected = on_one(way, *host)
    found = [(n, w, expected[i][n]) for i, t in enumerate((params, *used)) for n, w in t.items()]
    off = max(float(np.max(np.abs(w - e)) / np.max(np.abs(e))) for _, w, e in found)
    text = compiled.as_text()
    collectives = [line.strip()[:160] for line in text.splitlines() if COLLECTIVE.search(line)]
    ends = [f"{m},{n}]" for w in host.values() for m, n in permutations(w.shape[-2:])]
    matrices = [x for x in collectives if any(end in COLLECTIVE.split(x)[0] for end in ends)]
    loops = within_loops(text)
    return {"off": off, "lost": sorted(set(lost)), "matrices": matrices, "loops": loops}


@cache
def on_one(way: str, *names: str) -> Any:
    """What two steps make of these weights on one device, or without JAX where it is simple."""
    make, plan = WAYS[way]
    # Kernels are clipped by other methods where values are known.
    if make is projected and not (
        "kernel" in names and way in ("ClipSpectralNorm", "project_params")
    ):
        return in_numpy(plan, *names)
    params: Any = {name: jnp.asarray(w) for name, w in weights().items() if name in names}
    step, state = make(plan, {name: GEOMETRIES[name] for name in names}, params)
    compiled = jax.jit(step)
    for _ in range(2):
        params, state, *used = compiled(params, state)
    return jax.device_get((params, *used))


def in_numpy(plan: specops.Plan, *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the weights after two firings, what a loss would use then)."""
    params, used = {}, {}
    for name in names:
        (rule,) = (rule for pattern, rule in plan.entries if pattern in ("*", name))
        w, geometry = weights()[name], GEOMETRIES[name]
        state = rule.init(w, geometry, name)
        for step in (1, 2):
            w, state, _ = rule.update(w, geometry, state, step=step, name=name)
        forward = rule.stage == "forward"
        params[name] = w
        used[name] = rule.apply(w, geometry, state, step=3, name=name) if forward else w
    return params, used


def within_loops(text: str) -> list[str]:
    """The collectives that a compiled program runs inside of its loops."""
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
    return [line for line in inside if COLLECTIVE.search(line)]


def called(line: str) -> list[str]:
    """The computations that an instruction runs."""
    one = r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    several = re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line)
    return re.findall(one, line) + [n.strip(" %") for names in several for n in names.split(",")]


def example() -> dict[str, Any]:
    """The program that users copy from, in little, in its own precision."""
    place = str(Path(__file__).parents[2] / "examples")
    with (
        mock.patch.object(sys, "path", [place, *sys.path]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        program = importlib.import_module("train_distributed_jax")
        params, losses = program.main(["--quick", "--max-norm", "1.0"])
    largest = {
        name: float(np.max(specops.spectral_norm(np.asarray(params[name], np.float64), geometry)))
        for name, geometry in program.MAPS.items()
    }
    return {"norms": largest, "losses": losses}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(["example", example()]), flush=True)
    jax.config.update("jax_enable_x64", True)
    for way, layout, kind in cases():
        names = f"{way}; {layout}; {kind}"
        if all(part in names for part in sys.argv[1:]):
            print(json.dumps([names, case(way, layout, AxisType[kind])]), flush=True)
