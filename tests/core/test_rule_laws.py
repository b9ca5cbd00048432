"""The laws of every rule: its protocol, purity, symmetries, scales and zero."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

from specops import (
    ClipSpectralNorm,
    Conv,
    Dense,
    ProjectStableRank,
)
from specops.geometry import Geometry
from specops.rules import Rule
from tests import oracle
from tests.backends import Backend
from tests.core.laws import (
    GEOMETRIES,
    LAWS,
    assert_near,
    cases,
    every_rule,
    flat,
    outcome,
    skip_unless_needed,
    weight,
)


@every_rule
def test_protocol(name: str) -> None:
    rule = LAWS[name].make(1.0)
    assert isinstance(rule, Rule)
    assert rule.stage in ("weights", "gradients", "forward")
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule)
    assert hash(rule) == hash(copy.deepcopy(rule))


@every_rule
def test_pure_of_one_kind_and_alike_on_all_backends(backend: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(backend):
        if backend.traced and (name == "soft cap" or "reshaped" in name):
            continue  # compiled elsewhere
        w = backend.array(host)
        # Compilers get the state of NumPy: that of their own takes them seconds.
        start = rule.init(host if backend.traced else w, geometry, "w")
        start = {key: backend.convert(x) for key, x in start.items()} if backend.traced else start

        def fire(x: Any, state: Any, geometry: Geometry = geometry) -> Any:
            return outcome(rule, x, geometry, state)

        result, state, figures = backend.call(fire, w, start)
        backend.same_kind(result, w)
        assert result.shape == w.shape
        for held in (start, state):
            assert type(held) is dict
            for key, value in held.items():
                assert isinstance(key, str)
                assert compat.array_namespace(value, w) is compat.array_namespace(w)
                assert backend.traced or compat.device(value) == compat.device(w)
        np.testing.assert_array_equal(backend.numpy(w), host)
        for held in () if backend.traced else (start, state):
            before = {key: backend.numpy(value).copy() for key, value in held.items()}
            fire(w, held)
            assert before.keys() == held.keys()
            for key, value in held.items():
                np.testing.assert_array_equal(backend.numpy(value), before[key])
        expected, _, wanted = outcome(rule, host.astype(np.float64), geometry)
        # Compiled, a clip constrains a torus around the small layer instead of the layer.
        if not (backend.traced and isinstance(rule, ClipSpectralNorm)):
            assert_near(backend.numpy(result), expected, geometry, rule, 2e-5)
        assert figures.keys() == wanted.keys()
        if not isinstance(rule, ClipSpectralNorm):
            np.testing.assert_allclose(
                flat(backend, figures), flat(backend, wanted), rtol=2e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.idempotent])
def test_idempotent(backend: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(backend):
        if backend.traced and (name == "soft cap" or "reshaped" in name):
            continue

        def fire(x: Any, geometry: Geometry = geometry) -> Any:
            return outcome(rule, x, geometry)[0]

        once = backend.call(fire, backend.array(host))
        again = backend.call(fire, once)
        np.testing.assert_allclose(backend.numpy(again), backend.numpy(once), rtol=0, atol=2e-6)
        if isinstance(rule, ClipSpectralNorm | ProjectStableRank) and not backend.traced:
            assert again is once


_STRIDED = Conv((8,), padding=1, stride=2)

_CIRCULAR = Conv((4, 4), boundary="circular")

_GROUPED = Conv((6,), stride=2, groups=2, boundary="circular")

TRANSPOSED: list[tuple[tuple[int, ...], Conv, Conv]] = [
    ((4, 3, 4), _STRIDED, Conv((4,), padding=1, stride=2, transposed=True, layout="IO*")),
    ((4, 3, 3, 3), _CIRCULAR, _CIRCULAR.transpose()),
    ((4, 2, 3), _GROUPED, _GROUPED.transpose()),
]


@every_rule
def test_stacks_transposes_and_changes_of_basis(
    eager: Backend, name: str, rng: np.random.Generator
) -> None:
    skip_unless_needed(eager)
    law = LAWS[name]
    rule = law.make(1.0)

    def result(w: np.ndarray, geometry: Geometry) -> np.ndarray:
        dtype = "complex64" if np.iscomplexobj(w) else "float32"
        return eager.numpy(outcome(rule, eager.array(w, dtype), geometry)[0])

    host = weight((2, 5, 4))
    one_by_one = np.stack([result(w, Dense()) for w in host])
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    phases = np.exp(1j * np.arange(5))[:, None] * np.exp(2j * np.arange(4))
    last = Dense(batch_axes=(-1,))
    for got, expected in [
        (result(host, GEOMETRIES["stack"][1]), one_by_one),
        (result(np.moveaxis(host, 0, 2), last), np.moveaxis(one_by_one, 0, 2)),
        (result(host.reshape(10, 4), Dense(splits=(5, 5))), one_by_one.reshape(10, 4)),
        (result(host[1].T, Dense()), one_by_one[1].T),
        (result(host[1], Dense().transpose(2)), one_by_one[1]),
        (result(left @ host[1] @ right, Dense()), left @ one_by_one[1] @ right),
        (result(phases * host[1], Dense()), phases * one_by_one[1]),
    ]:
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)
    if not law.transposes or eager.name.startswith("array_api_strict"):
        return
    for shape, conv, transposed in TRANSPOSED:
        there, back = (result(weight(shape), g) for g in (conv, transposed))
        # Iterations that stop at 1e-4 of the norm stop elsewhere.
        assert_near(back, there, conv, rule, 2e-3 if "operator" in name else 5e-6)


@every_rule
@pytest.mark.parametrize("scale", [2.0**40, 1e20, 1e-20])
def test_scaling(eager: Backend, name: str, scale: float) -> None:
    skip_unless_needed(eager, "jax")
    law = LAWS[name]
    keys = ("stack", "circular", "zeros") if eager.name in ("numpy", "torch") else ("stack",)
    for shape, geometry in [GEOMETRIES[key] for key in keys]:
        host = weight(shape).astype(np.float32)
        rule, scaled = law.make(1.0), law.make(scale)
        plain, _, before = outcome(rule, eager.array(host), geometry)
        with np.errstate(over="ignore"):  # a penalty's value is a square
            got, state, after = outcome(scaled, eager.array(host * np.float32(scale)), geometry)
        got = eager.numpy(got).astype(np.float64) / scale**law.degree
        tolerance = 2e-6 if math.log2(scale) % 1 == 0 else 2e-5
        assert_near(got, eager.numpy(plain), geometry, rule, tolerance)
        assert all(np.isfinite(eager.numpy(x)).all() for x in state.values())
        for key in before.keys() & {"norm", "norm_before", "norm_after"}:
            seen = eager.numpy(after[key]) / scale
            np.testing.assert_allclose(seen, eager.numpy(before[key]), rtol=1e-3)


@every_rule
def test_zero_stays_zero(eager: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for geometry, host in cases(eager):
        result, state, figures = outcome(rule, eager.array(np.zeros_like(host)), geometry)
        np.testing.assert_array_equal(eager.numpy(result), 0.0)
        assert all(np.isfinite(eager.numpy(x)).all() for x in state.values())
        assert np.isfinite(flat(eager, figures)).all()
        # What is no longer zero finds its way from there, and a zero in a stack hurts no other.
        later = eager.numpy(outcome(rule, eager.array(host), geometry, state)[0])
        assert np.isfinite(later).all()
        assert later.any()
        if isinstance(geometry, Dense) and geometry.batch_axes:
            mixed = eager.array(host * np.array([1, 0], host.dtype)[:, None, None])
            got = eager.numpy(outcome(rule, mixed, geometry)[0])
            np.testing.assert_array_equal(got[1], 0.0)
            alone = eager.numpy(outcome(rule, eager.array(host), geometry)[0])
            np.testing.assert_allclose(got[0], alone[0], rtol=0, atol=5e-6)


def halves(backend: Backend, w: np.ndarray) -> Iterator[Any]:
    """The weight in every half precision dtype that the library has."""
    if backend.name == "numpy":
        yield w.astype(np.float16)
    elif backend.name.startswith("torch"):
        torch = pytest.importorskip("torch")
        yield from (backend.array(w).to(d) for d in (torch.float16, torch.bfloat16))
    elif backend.name == "jax":
        numpy = pytest.importorskip("jax.numpy")
        yield from (backend.array(w).astype(d) for d in (numpy.float16, numpy.bfloat16))


@every_rule
def test_half_precision_storage(eager: Backend, name: str) -> None:
    rule = LAWS[name].make(1.0)
    for key in ("stack",) if eager.name == "jax" else ("stack", "circular", "zeros"):
        shape, geometry = GEOMETRIES[key]
        for w in halves(eager, weight(shape)):
            result, state, _ = outcome(rule, w, geometry)
            eager.same_kind(result, w)
            assert all("16" not in str(x.dtype) for x in state.values())
            stored = np.asarray(eager.numpy(result)).astype(np.float64)
            exact = np.asarray(eager.numpy(w)).astype(np.float64)
            expected = outcome(rule, exact, geometry)[0]
            assert_near(stored, expected, geometry, rule, 0.04)
            if name in ("clip", "normalize operator"):
                assert oracle.spectrum(stored, geometry).max() <= 1.0 + 1e-9
