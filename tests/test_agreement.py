"""Every public function and rule computes the same on every backend, up to rounding.

``python -m tests.test_agreement`` prints the largest disagreements; ``--full`` takes all inputs
on every backend, which takes compilers minutes.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

import specops
from specops import Conv, errors, rules
from specops.rules import ForwardRule, GradientRule, Rule, WeightRule
from tests.agreement import CASES, OPERATIONS, RULES, STARTS, Given, Operation, settled, waves
from tests.backends import BACKENDS, Backend

pytestmark = pytest.mark.slow

NUMPY = BACKENDS[0]
DEFAULT = (32.0, 32.0)
"""Largest disagreements with NumPy in the same dtype, and of float32 with float64: in ε, the
spacing of the dtype, times the largest entry. Three to four times what was measured."""
_FOLLOWED = (64.0, 64.0)
_STARTED = (128.0, 128.0)
BOUNDS: dict[str, tuple[float, float]] = {
    # As sensitive as the reciprocal of the smallest value.
    "condition_number": (128.0, 128.0),
    # Widened by an allowance for rounding that is as large.
    "spectral_norm_bounds": (32.0, 128.0),
    # As sensitive as the reciprocal of the gap below the last.
    "top_singular_triplets": (256.0, 256.0),
    # Vectors after few power steps.
    "SpectralHammer.update": _FOLLOWED,
    "SpectralNormPenalty.update": _FOLLOWED,
    "SpectralNormalization.update": _FOLLOWED,
    "StableRankNormalization.update": _FOLLOWED,
    # Vectors that are only iterated until they are known to 1e-4.
    "SpectralHammer.init": _STARTED,
    "SpectralNormPenalty.init": _STARTED,
    "SpectralNormalization.init": _STARTED,
    "StableRankNormalization.init": _STARTED,
}
EAGER_ONLY = {"balance_norms"}
"""Its factors are Python floats."""
OWN_BALL = {"ClipSpectralNorm", "project_spectral_ball"}
"""Operations that constrain small zero-padded layers themselves; compiled, a torus around them."""
STATIC = {"clip_singular_values"}
"""Its bounds are plain numbers, also where a compiler traces."""
PROTOCOLS = (Rule, WeightRule, GradientRule, ForwardRule)
NO_ARRAYS = {
    "Conv",
    "Dense",
    "Plan",
    "TrainableScale",
    "attach",
    "errors",
    "inspect",
    "project",
}
"""Public names that compute nothing from arrays."""


def _like(name: str) -> tuple[str, ...]:
    """The cases that a compiler takes for the same."""
    plain = CASES[name]
    return tuple(
        key
        for key, case in CASES.items()
        if (case.geometry, case.values.shape) == (plain.geometry, plain.values.shape)
    )


# The three devices of array_api_strict share the inputs. Compiling takes seconds for each
# geometry and dtype.
FEW: dict[str, dict[str, tuple[str, ...]]] = {
    f"array_api_strict-{device}": dict.fromkeys(("float64", "float32"), tuple(CASES)[i::3])
    for i, device in enumerate(("CPU_DEVICE", "device1", "no_x64"))
} | {
    "jax": {"float64": _like("tall"), "float32": _like("circular")},
    "jax-jit": {"float64": ("zeros, transposed",), "float32": _like("tall")},
}


class Entry(NamedTuple):
    """How far a quantity on a backend is from NumPy's, in ε times its largest entry."""

    row: str
    quantity: str
    case: str
    dtype: str
    same: float
    across: float


def selected(backend: Backend, full: bool = False) -> Iterator[tuple[str, str]]:
    """(case, dtype)."""
    everything = {"float64": tuple(CASES), "float32": tuple(CASES)}
    few = everything if full else FEW.get(backend.name, everything)
    for dtype, names in few.items():
        if dtype == "float32" or backend.doubles:
            yield from ((name, dtype) for name in names)


@cache
def function_of(operation: Operation, example: str) -> Callable[[Given], Any]:
    """An operation on one map: one function for all its weights, which is compiled once."""
    return lambda given: operation(given, CASES[example])


def compute(
    backend: Backend, name: str, case_name: str, dtype: str, given_as: str = "", start: bool = False
) -> Any:
    """What is determined of an operation's results; the class of error where it refuses."""
    case = CASES[case_name]
    example = case_name if name in STATIC else _like(case_name)[0]
    values = case.values.astype(given_as or dtype).astype(dtype)
    # Where values repeat, other weights are multiples: they leave the same directions open.
    factors = np.full(values.shape, 1.25) if case.repeats else 1.0 + 0.25 * waves(values.shape)
    later = values * factors.astype(dtype)
    unit: Any = case.unit
    state = None
    if name in RULES and _is_given_states(backend):
        made = RULES[name](unit).init(values, case.geometry, "layer")
        state = {key: backend.convert(x) for key, x in made.items()}
    if backend.traced:
        unit = backend.array(np.asarray(unit, dtype))
    given = Given(backend.array(values), backend.array(later), unit, state)
    operation = STARTS[name] if start else OPERATIONS[name]
    try:
        found = backend.call(function_of(operation, example), given)
    except (errors.SpecopsError, ValueError) as error:
        return type(error)
    return settled({key: host(backend, x) for key, x in found.items()}, case)


def host(backend: Backend, x: Any) -> np.ndarray:
    """On the host in one array; tuples one after the other."""
    if not isinstance(x, tuple):
        return np.asarray(backend.numpy(x))
    return np.concatenate([np.zeros(0), *(np.ravel(backend.numpy(part)) for part in x)])


reference = cache(lambda *arguments: compute(NUMPY, *arguments))


@cache
def measured(backend: Backend, name: str, full: bool = False) -> list[Entry]:
    """All entries of an operation."""
    entries: list[Entry] = []
    if backend.traced and name in EAGER_ONLY:
        return entries
    for case, dtype in selected(backend, full):
        if backend.traced and name in OWN_BALL and case.startswith("zeros"):
            continue
        for start in starts(backend, name, case, full):
            got = compute(backend, name, case, dtype, start=start)
            same = reference(name, case, dtype)
            narrow = dtype == "float32"
            across = reference(name, case, "float64", dtype) if narrow else same
            what = f"{name} on {case} in {dtype}"
            if isinstance(got, type) or isinstance(same, type):
                assert got is same is across, f"{what}: {got} on {backend}, {same} on NumPy"
                continue
            assert same.keys() == across.keys(), what
            wanted = {key for key in same if _is_expected(backend, name, key, start)}
            assert got.keys() == wanted, what
            traced = (" traced",) * backend.traced
            for key in got:
                if not key.endswith((" within", " traced")):
                    far = apart(got, same, key, dtype, traced and (" within", *traced))
                    wide = apart(got, across, key, dtype, (" within", *traced)) * narrow
                    entries.append(Entry(*key.split("/"), case, dtype, far, wide))
    return entries


def _is_given_states(backend: Backend) -> bool:
    """Vectors of equal values start as rounding has it, and JAX compiles their start."""
    return backend is not NUMPY


def starts(backend: Backend, name: str, case: str, full: bool = False) -> tuple[bool, ...]:
    """False for an operation, True for a rule's `init` by itself, which is else part of it.

    Where compiling takes seconds, each rule once for each kind of map.
    """
    if not _is_given_states(backend):
        return (False,)
    if full:
        return (False, True) if name in RULES else (False,)
    if isinstance(CASES[case].geometry, Conv):
        elsewhere = name == "SpectralSoftCap" or name.endswith((", reshaped", ", inside"))
        return () if elsewhere else (False,)
    if name.endswith((", operator", ", bidirectional")):
        return ()  # all norms of a matrix are one
    return (False, True) if name in RULES else (False,)


def _is_expected(backend: Backend, name: str, key: str, start: bool) -> bool:
    if backend.traced and key.endswith("state:firings"):
        return False  # a trust in estimates that nothing traced decides
    separate = name in RULES and _is_given_states(backend)
    return not separate or start == (".init/" in key)


def apart(got: Any, wanted: Any, key: str, dtype: str, left_open: tuple[str, ...]) -> float:
    """max|got − wanted| in units of ε·max|wanted|, or of ε where all that is wanted is 0."""
    x, y = got[key].astype(np.result_type(got[key], float)), wanted[key]
    if x.shape != y.shape:
        return math.inf
    agree = (x == y) | (np.isnan(x) & np.isnan(y))
    if agree.all():
        return 0.0
    size = float(np.abs(y[np.isfinite(y)]).max(initial=0.0)) or 1.0
    difference = float(np.abs(x - y)[~agree].max())
    if not np.isfinite(difference):
        return math.inf
    # Each is that close to the nearest point, which is all that either promises.
    for suffix in left_open:
        if key + suffix in got:
            difference -= float(got[key + suffix]) + float(wanted[key + suffix])
    return max(0.0, difference) / (float(np.finfo(dtype).eps) * size)


def largest(backend: Backend, full: bool = False) -> dict[str, tuple[float, float]]:
    """(same, across) of every row."""
    rows: dict[str, tuple[float, float]] = {}
    for name in OPERATIONS:
        for entry in measured(backend, name, full):
            same, across = rows.get(entry.row, (0.0, 0.0))
            rows[entry.row] = max(same, entry.same), max(across, entry.across)
    return rows


@pytest.mark.parametrize("name", OPERATIONS)
def test_agreement(backend: Backend, name: str) -> None:
    if backend.traced and name in EAGER_ONLY:
        pytest.skip("is not for compilers")
    entries = measured(backend, name)
    assert entries
    for entry in entries:
        same, across = BOUNDS.get(entry.row, DEFAULT)
        assert entry.same <= same, entry
        assert entry.across <= across, entry


@pytest.mark.parametrize("one", BACKENDS, ids=repr)
def test_every_backend_gets_every_function_rule_and_dtype(one: Backend) -> None:
    selection = list(selected(one))
    dtypes = {"float32", "float64"} if one.doubles else {"float32"}
    assert {dtype for _, dtype in selection} == dtypes
    rows = set()
    for name in set(OPERATIONS) - (EAGER_ONLY if one.traced else set()):
        for case, dtype in selection:
            for start in starts(one, name, case):
                found = reference(name, case, dtype)
                if isinstance(found, dict):
                    keys = (key for key in found if _is_expected(one, name, key, start))
                    rows |= {key.split("/")[0] for key in keys}
    assert rows == public_rows() - (EAGER_ONLY if one.traced else set())


def public_rows() -> set[str]:
    """What the public names have to offer: functions, and the methods of rules."""
    public = {name: getattr(specops, name) for name in specops.__all__ if name not in NO_ARRAYS}
    kinds = {
        kind.__name__: kind
        for kind in (*vars(rules).values(), *public.values())
        if inspect.isclass(kind) and kind not in PROTOCOLS and hasattr(kind, "stage")
    }
    rows = {name for name in public if name not in kinds}
    for name, kind in kinds.items():
        methods = ("init", "update", "apply", "penalty", "enforce")
        rows |= {f"{name}.{method}" for method in methods if hasattr(kind, method)}
    return rows


def test_public_names_and_inputs_are_accounted_for() -> None:
    assert set(specops.__all__) >= NO_ARRAYS
    together = {case for few in FEW.values() for names in few.values() for case in names}
    assert together == set(CASES)
    for row, bounds in BOUNDS.items():
        assert row in public_rows(), row
        assert max(bounds) > max(DEFAULT), row


def main() -> None:
    """Print the largest disagreement of every function on every backend."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m tests.test_agreement", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all inputs on every backend")
    full = parser.parse_args().full
    table = Table(
        title="Largest disagreement with NumPy in the same dtype / of float32 with float64",
        caption="in units of ε times the largest entry",
    )
    for heading in ("", *map(repr, BACKENDS), "bound"):
        table.add_column(heading, justify="right" if heading else "left")
    columns = [largest(backend, full) for backend in BACKENDS]
    for row in sorted(public_rows()):
        cells = [f"{c[row][0]:.1f} / {c[row][1]:.1f}" if row in c else "" for c in columns]
        table.add_row(row, *cells, "{:.0f} / {:.0f}".format(*BOUNDS.get(row, DEFAULT)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
