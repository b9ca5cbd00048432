"""The inputs and operations that every backend must agree on, and what of them is determined.

An operation calls public functions, or one rule as an adapter does, and returns arrays by
``"name/quantity"``. Signs and directions that an input leaves open are nobody's: singular
vectors become dyads, projectors and reconstructions, and a quantity that begins with ``~`` is
reduced to its singular values where leading values repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import specops
from specops import Conv, Dense, TrainableScale, arrays
from specops.geometry import Geometry
from tests import oracle


class Case(NamedTuple):
    """An input, the map that it is, and the scale of the bounds it is put under."""

    geometry: Geometry
    values: np.ndarray
    unit: float = 1.0
    repeats: bool = False
    """Leading singular values repeat, so leading directions are not determined."""
    count: int = 2
    """Leading values that belong together: the next is well apart."""


class Given(NamedTuple):
    """What an operation gets: arrays of one backend."""

    w: Any
    later: Any
    """A weight like `w`, for the second firing of a rule."""
    unit: Any
    state: dict[str, Any] | None
    """Of a rule, where it is not to make its own."""


Found = dict[str, Any]
Operation = Callable[[Given, Case], Found]

_TORUS = Conv((3, 4), boundary="circular")
_PLAIN: dict[str, tuple[tuple[int, ...], Geometry]] = {
    "tall": ((6, 4), Dense()),
    "wide": ((3, 5), Dense()),
    "stack": ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    "split": ((7, 4), Dense(splits=(5, 2))),
    "circular": ((3, 2, 3, 3), _TORUS),
    "circular, grouped": (
        (4, 2, 3, 3),
        Conv((4, 6), stride=2, groups=2, boundary="circular"),
    ),
    "circular, transposed": (
        (3, 2, 4),
        Conv((3,), stride=2, transposed=True, boundary="circular", layout="IO*"),
    ),
    "circular, 3-D": ((2, 2, 2, 2, 2), Conv((2, 3, 2), boundary="circular")),
    "zeros": ((3, 2, 3, 3), Conv((3, 4))),
    "zeros, strided": ((4, 3, 2), Conv((7,), stride=2, padding=1, layout="*IO")),
    "zeros, 3-D, grouped": ((2, 1, 2, 2, 2), Conv((3, 2, 3), groups=2)),
    "zeros, transposed": (
        (3, 4, 3),
        Conv((4,), stride=2, padding=1, transposed=True, layout="IO*"),
    ),
}
_CLOSE = 4 * 2.0**-23
"""Relative distance of near-repeated values: 4 ulp of float32."""
_PART = 0.1
"""Share of the way to a stable rank by which the first axis and the last may differ."""
_GAP = 1e-2
"""Distance from the nearest kernel, over the norm of the kernel, that the clip asks for."""
_BELOW = 2e-2
"""How far below a norm its estimate from vectors of another weight may be."""


def _clustered() -> np.ndarray:
    """Singular values 2, 2, 1 and ½."""
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in (6, 4))
    return (u * [2.0, 2.0 * (1.0 - _CLOSE), 1.0, 0.5]) @ v.T


def _nearly_orthogonal() -> np.ndarray:
    """A kernel whose operator is nearly 2Q, so that all its singular values are close to 2."""
    rng = np.random.default_rng(6)
    kernel = _CLOSE * rng.standard_normal((3, 2, 3, 3))
    kernel[:, :, 1, 1] += 2.0 * np.linalg.qr(rng.standard_normal((3, 2)))[0]
    return kernel


def _cases() -> dict[str, Case]:
    cases = {}
    for seed, (name, (shape, geometry)) in enumerate(_PLAIN.items()):
        values = np.random.default_rng(seed).standard_normal(shape)
        cases[name] = Case(geometry, values, count=_together(values, geometry))
    for name, clustered in (("tall", _clustered()), ("circular", _nearly_orthogonal())):
        plain = cases[name]
        for unit in (1e15, 1e-15):
            cases[f"{name}, {unit:.0e}"] = plain._replace(values=plain.values * unit, unit=unit)
        cases[f"{name}, zero"] = plain._replace(values=0.0 * plain.values, repeats=True)
        cases[f"{name}, clustered"] = plain._replace(values=clustered, repeats=True)
    return cases


def _together(values: np.ndarray, geometry: Geometry) -> int:
    """Values before the widest gap among the first four; a torus has pairs. Matrices: 2."""
    if isinstance(geometry, Dense):
        return 2
    s = oracle.spectrum(values, geometry)
    return 1 + int(np.argmin(s[1:4] / s[:3]))


CASES = _cases()


def waves(shape: tuple[int, ...]) -> np.ndarray:
    """Fixed numbers of both signs, of size 1."""
    return np.cos(1.0 + np.arange(math.prod(shape))).reshape(shape)


def _largest(x: Any) -> Any:
    xp = arrays.namespace(x)
    return xp.max(xp.abs(x))


def _length(w: Any) -> Any:
    return arrays.namespace(w).sum(w * w) ** 0.5


def _values(given: Given, case: Case) -> Found:
    w, g = given.w, case.geometry
    bounds = specops.spectral_norm_bounds(w, g)
    return {
        "singular_values/": specops.singular_values(w, g),
        "spectral_norm/": specops.spectral_norm(w, g),
        "spectral_norm_bounds/lower": bounds.lower,
        "spectral_norm_bounds/upper": bounds.upper,
        "stable_rank/": specops.stable_rank(w, g),
        "effective_rank/": specops.effective_rank(w, g),
        "condition_number/": specops.condition_number(w, g),
    }


def _operator(given: Given, case: Case) -> Found:
    found = specops.linear_operator(given.w, case.geometry)
    found = found if isinstance(found, tuple) else (found,)

    def wave(length: int) -> Any:
        return arrays.constant(waves((length,)), given.w)

    return {
        "linear_operator/matvec": tuple(a.matvec(wave(a.shape[1])) for a in found),
        "linear_operator/rmatvec": tuple(a.rmatvec(wave(a.shape[0])) for a in found),
        "linear_operator/to_matrix": tuple(a.to_matrix() for a in found),
    }


def _triplets(given: Given, case: Case) -> Found:
    u, s, v = specops.top_singular_triplets(given.w, case.count, case.geometry)
    return {f"top_singular_triplets/{key}": x for key, x in zip("usv", (u, s, v), strict=True)}


def _spectral_ball(given: Given, case: Case) -> Found:
    new, info = specops.project_spectral_ball(
        given.w, 1.5 * given.unit, case.geometry, gap_tolerance=1e-6, return_info=True
    )
    found = {
        "project_spectral_ball/weight": new,
        "project_spectral_ball/norm_before": info.norm_before,
        "project_spectral_ball/norm_after": info.norm_after,
    }
    if isinstance(case.geometry, Conv):
        found["project_spectral_ball/weight within"] = info.gap**0.5 * _length(given.w)
    return found


def _stable_rank(given: Given, case: Case) -> Found:
    new, info = specops.project_stable_rank(given.w, case.geometry, ratio=0.4, return_info=True)
    found = {
        "project_stable_rank/~weight": new,
        "project_stable_rank/rank_before": info.rank_before,
        "project_stable_rank/rank_after": info.rank_after,
        "project_stable_rank/~weight distance": (info.distance, _length(given.w)),
    }
    if isinstance(case.geometry, Conv):
        found |= _along_one_axis("project_stable_rank/~weight", info.distance)
    return found


def _along_one_axis(key: str, distance: Any) -> Found:
    """What is open because a traced projection stops at its first axis."""
    return {f"{key} traced": _PART * distance, f"{key} distance traced": _PART * distance}


def _kept_stable_rank(given: Given, case: Case) -> Found:
    new = specops.project_stable_rank(given.w, case.geometry, target=1.6, preserve=1)
    return {"project_stable_rank/~preserving": new}


def _clip(given: Given, case: Case) -> Found:
    bounds = 1.2 * case.unit, 1.8 * case.unit
    return {"clip_singular_values/~": specops.clip_singular_values(given.w, *bounds, case.geometry)}


def _polar(given: Given, case: Case) -> Found:
    return {"polar_factor/~": specops.polar_factor(given.w, case.geometry, method="svd")}


def _polar_by_products(given: Given, case: Case) -> Found:
    new = specops.polar_factor(given.w, case.geometry, method="products")
    return {"polar_factor/~products": new}


def _schatten(given: Given, case: Case) -> Found:
    return {
        f"project_schatten_ball/{p}": specops.project_schatten_ball(
            given.w, given.unit, case.geometry, p=p
        )
        for p in (1, 2)
    }


def _balance(given: Given, case: Case) -> Found:
    other = arrays.constant(waves((3, 4)), given.w)
    done = specops.balance_norms([given.w, other], [case.geometry, None], [other, None])
    return {"balance_norms/": (*done.weights, done.biases[0])}


def started(make: Callable[[Any], Any]) -> Operation:
    """A rule's `init`."""

    def operation(given: Given, case: Case) -> Found:
        rule = make(given.unit)
        return _started(rule, rule.init(given.w, case.geometry, "layer"))

    return operation


def fired(make: Callable[[Any], Any]) -> Operation:
    """Two firings of a rule, and all else that it has; `init` unless a state is given."""

    def operation(given: Given, case: Case) -> Found:
        rule, w, g = make(given.unit), given.w, case.geometry
        name = type(rule).__name__
        state, found = given.state, Found()
        if state is None:
            state = rule.init(w, g, "layer")
            found |= _started(rule, state)
        for key, x in (("first", w), ("then", given.later)):
            new, state, figures = rule.update(x, g, state, step=1, name="layer")
            found |= _entries(rule, "update", key, state)
            found |= _results(rule, "update", key, x, new, g, figures)
        if hasattr(rule, "apply"):
            found[f"{name}.apply/~"] = rule.apply(w, g, state, step=1, name="layer")
        if hasattr(rule, "penalty"):
            value, gradient = rule.penalty(w, g, state, step=1, name="layer")
            found |= {f"{name}.penalty/value": value, f"{name}.penalty/~gradient": gradient}
        followed = getattr(rule, "norm", "") == "operator" and name != "ClipSpectralNorm"
        if followed and isinstance(g, Conv):
            # The plane of a pair of equal values is followed from where rounding started in it.
            for key in [k for k in found if "init/" not in k and "distance" not in k]:
                x = found[key]
                if not isinstance(x, tuple) and "state:" not in key.replace("state:axis", ""):
                    found[f"{key.replace('state:axis', '~axis')} within"] = _BELOW * _largest(x)
        if hasattr(rule, "enforce"):
            new, _, figures = rule.enforce(given.later, g, state, step=1, name="layer")
            found |= _results(rule, "enforce", "", given.later, new, g, figures)
        return found

    return operation


def _started(rule: Any, state: Found) -> Found:
    # A row also where there is no state.
    return {f"{type(rule).__name__}.init/": ()} | _entries(rule, "init", "", state)


def _entries(rule: Any, method: str, key: str, state: Found) -> Found:
    return {f"{type(rule).__name__}.{method}/{key} state:{k}": x for k, x in state.items()}


def _results(
    rule: Any, method: str, key: str, w: Any, new: Any, geometry: Geometry, figures: Found
) -> Found:
    place = f"{type(rule).__name__}.{method}/"
    found = {f"{place}{key} {k}": x for k, x in figures.items()} | {f"{place}~{key}": new}
    if "distance" in figures:
        del found[f"{place}{key} distance"]
        found[f"{place}~{key} distance"] = (figures["distance"], _length(w))
        if isinstance(geometry, Conv) and rule.norm == "operator":
            found |= _along_one_axis(f"{place}~{key}", figures["distance"])
    if isinstance(rule, specops.ClipSpectralNorm):
        below = _BELOW * figures["norm_before"]
        if key == "then":
            # Screened by an estimate, but by nothing where a compiler traces.
            found |= {f"{place}{key} {k} traced": below for k in figures}
        if isinstance(rule.view(geometry), Conv):
            found[f"{place}~{key} within"] = _GAP * _length(w)
            if key != "first":
                found[f"{place}{key} norm_before within"] = below
    return found


def _at(bound: Any) -> Any:
    """A number, or a schedule that gives what is being traced."""
    return bound if isinstance(bound, float) else lambda *_: bound


RULES: dict[str, Callable[[Any], Any]] = {
    "ClipSpectralNorm": lambda c: specops.ClipSpectralNorm(_at(1.5 * c), distance_tolerance=0.0),
    "ClipSpectralNorm, reshaped": lambda c: specops.ClipSpectralNorm(_at(1.2 * c), norm="reshaped"),
    "ClipAndCut": lambda c: specops.ClipAndCut(_at(1.5 * c)),
    "ClipSpectralNorm, inside": lambda c: specops.ClipSpectralNorm(_at(64.0 * c)),
    "ProjectStableRank, operator": lambda c: specops.ProjectStableRank(ratio=0.4, norm="operator"),
    "ProjectStableRank, reshaped": lambda c: specops.ProjectStableRank(target=1.4, norm="reshaped"),
    "NormalizeIfAbove, operator": lambda c: specops.NormalizeIfAbove(_at(1.5 * c), norm="operator"),
    "NormalizeIfAbove, reshaped": lambda c: specops.NormalizeIfAbove(_at(1.2 * c), norm="reshaped"),
    "SpectralSoftCap": lambda c: specops.SpectralSoftCap(_at(1.2 * c), norm="reshaped"),
    "SpectralHammer, operator": lambda c: specops.SpectralHammer(_at(1.5 * c), norm="operator"),
    "SpectralHammer, reshaped": lambda c: specops.SpectralHammer(_at(1.2 * c), norm="reshaped"),
    "Monitor": lambda c: specops.Monitor(),
} | {
    f"{kind}, {norm}": lambda c, make=make, norm=norm: make(norm)
    for kind, make in {
        "SpectralNormalization": lambda norm: specops.SpectralNormalization(
            norm=norm, scale=TrainableScale(1.5)
        ),
        "SpectralNormPenalty": lambda norm: specops.SpectralNormPenalty(0.3, norm=norm),
        "StableRankNormalization": lambda norm: specops.StableRankNormalization(0.4, norm=norm),
    }.items()
    for norm in ("operator", "reshaped", "bidirectional")
    if (kind, norm) != ("StableRankNormalization", "bidirectional")
}
OPERATIONS: dict[str, Operation] = {
    "values": _values,
    "linear_operator": _operator,
    "top_singular_triplets": _triplets,
    "project_spectral_ball": _spectral_ball,
    "project_stable_rank": _stable_rank,
    "project_stable_rank, preserving": _kept_stable_rank,
    "clip_singular_values": _clip,
    "polar_factor": _polar,
    "polar_factor, products": _polar_by_products,
    "project_schatten_ball": _schatten,
    "balance_norms": _balance,
} | {name: fired(make) for name, make in RULES.items()}


STARTS: dict[str, Operation] = {name: started(make) for name, make in RULES.items()}


def settled(found: dict[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    """What the input determines, of what an operation found."""
    result = {}
    for key, x in found.items():
        name, _, part = key.partition("state:")
        if not part or part.startswith(("sigma", "firings")):
            result[key] = x
        elif part == "axis":
            result[f"{name}~axis"] = x
        elif part[0] == "u":
            result[f"{name}~dyad {part}"] = _outer(x, found[f"{name}state:v{part[1:]}"])
    if "top_singular_triplets/u" in result:
        u, s, v = (result.pop(f"top_singular_triplets/{key}") for key in "usv")
        result["top_singular_triplets/s"] = s
        result["top_singular_triplets/~left"] = u @ _adjoint(u)
        result["top_singular_triplets/~right"] = v @ _adjoint(v)
        result["top_singular_triplets/~product"] = (u * s[..., None, :]) @ _adjoint(v)
    if not case.repeats:
        return result
    return {
        key: oracle.spectrum(x, case.geometry) if "~" in key else x
        for key, x in result.items()
        if "~" not in key or (x.shape == case.values.shape and isinstance(case.geometry, Dense))
    }


def _outer(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u[..., :, None] * v.conj()[..., None, :]


def _adjoint(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a.conj(), -2, -1)
