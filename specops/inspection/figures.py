"""The figures of one weight: exact from its singular values, or bounds where it is too large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from specops import arrays
from specops.geometry import Conv, Dense, Geometry
from specops.inspection.large import norm_bounds
from specops.maps.convolution import ConvOperator
from specops.spectra import singular_values, spectral_norm, spectral_norm_bounds

Method = Literal["auto", "exact", "bounds"]
BOUNDED = "certified bounds"
LANCZOS = "by Lanczos"
"""How methods are told apart in what they say of themselves."""
COLLAPSED_BELOW = 0.01
"""A direction counts as collapsed below this fraction of the largest singular value."""
_EXACT_UP_TO = 2048
"""Smaller side of a matrix up to which all its values are computed."""
_EXPLICIT_UP_TO = {"auto": 2**22, "exact": 2**24, "bounds": 0}
"""Entries of a zero-padded convolution's matrix up to which it is decomposed."""
_REFINED_UP_TO = 128
"""Channels up to which a supremum over all frequencies is refined."""
_CHUNK = 2**22
"""Entries of which a triangular factor is made at once: a choice of memory, 32 MiB in double."""
_SAFE = 1e-15
"""Entries whose squares are far from the ends of single precision."""


@dataclass(frozen=True)
class Figures:
    """What is known of one weight. None where it was not computed.

    Attributes
    ----------
    sigma_max : float or (float, float)
        Largest singular value, or certified lower and upper bound.
    sigma_min : float, optional
        The smallest of min(rows, columns).
    frobenius : float
        Root of the sum of squares.
    stable_rank, effective_rank, condition_number : float, optional
        ‖·‖_F²/σ₁², exp of the entropy of σ/Σσ, σ₁/σ_min (inf for a singular matrix).
    collapsed : float, optional
        Share of singular values below 1 % of the largest.
    method : str
        What was computed, in words.
    spectrum : ndarray, optional
        The singular values, descending.
    """

    sigma_max: float | tuple[float, float]
    frobenius: float
    method: str
    sigma_min: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    condition_number: float | None = None
    collapsed: float | None = None
    spectrum: np.ndarray | None = None


@arrays.in_full_precision
def figures_of(w: np.ndarray, geometry: Geometry, method: Method = "auto") -> Figures:
    """The figures of a finite weight that stands for `geometry`."""
    if isinstance(geometry, Dense):
        return _dense(w, geometry, method)
    if geometry.grid is None:
        return _every_size(w, geometry, method)
    return _sized(w, geometry, method)


def takes_bounds(side: int, method: Method) -> bool:
    """Whether of matrices with this smaller side the norm is bounded and nothing decomposed."""
    return method == "bounds" or (method == "auto" and side > _EXACT_UP_TO)


def _dense(w: np.ndarray, geometry: Dense, method: Method) -> Figures:
    blocks = geometry.blocks(w)[0]
    stack = blocks.reshape(-1, *blocks.shape[-2:])
    if takes_bounds(min(stack.shape[1:]), method):
        found = [_bounded(a) for a in stack]
        return found[0] if len(found) == 1 else _worst(found)
    if len(stack) == 1:
        return _from_values(exact_values(stack[0]), "all singular values")
    return _worst([_from_values(exact_values(a), "all singular values") for a in stack])


def exact_values(a: np.ndarray) -> np.ndarray:
    """All singular values in double precision, with little memory beside two copies of `a`."""
    a = a.T if a.shape[0] < a.shape[1] else a
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    rows, columns = a.shape
    if rows <= 2 * columns:
        square = a.astype(wide)
    else:
        # Triangular factors of slices one after the other: A itself is never copied whole.
        step = max(columns, _CHUNK // columns)
        square = np.zeros((0, columns), wide)
        factor: Any
        for at in range(0, rows, step):
            part = np.concatenate([square, a[at : at + step].astype(wide)])
            factor = np.linalg.qr(part, mode="r")
            square = factor
    del a
    scale = float(np.abs(square).max(initial=0.0))
    if scale == 0.0:
        return np.zeros(columns)
    square /= scale
    return np.asarray(np.linalg.svd(square, compute_uv=False)) * scale


def _from_values(values: np.ndarray, method: str, **over: Any) -> Figures:
    """Of singular values in descending order."""
    top, least = float(values[0]), float(values[-1])
    # What decompositions leave of a singular matrix.
    least = least if least > len(values) * np.finfo(float).eps * top else 0.0
    if top == 0.0:
        # As specops.stable_rank and its like define them for the zero matrix.
        return Figures(0.0, 0.0, method, 0.0, 0.0, 0.0, math.inf, None, values)
    shares = values / values.sum()
    entropy = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
    parts: dict[str, Any] = {
        "sigma_max": top,
        "frobenius": top * math.sqrt(float(np.sum((values / top) ** 2))),
        "method": method,
        "sigma_min": least,
        "stable_rank": float(np.sum((values / top) ** 2)),
        "effective_rank": math.exp(entropy),
        "condition_number": top / least if least > 0 else math.inf,
        "collapsed": float(np.mean(values < COLLAPSED_BELOW * top)),
        "spectrum": values,
    }
    return Figures(**(parts | over))


def _worst(found: list[Figures]) -> Figures:
    """Of a stack: extremes over its matrices, all their values together."""

    def over(key: str, function: Any) -> Any:
        values = [getattr(f, key) for f in found]
        return None if None in values else function(values)

    ends = [f.sigma_max if isinstance(f.sigma_max, tuple) else (f.sigma_max,) * 2 for f in found]
    low, high = max(e[0] for e in ends), max(e[1] for e in ends)
    spectra = [f.spectrum for f in found if f.spectrum is not None]
    return Figures(
        sigma_max=low if low == high else (low, high),
        frobenius=math.hypot(*(f.frobenius for f in found)),
        method=f"{len(found)} matrices: extremes over them, their mean share collapsed; "
        f"{found[0].method}",
        sigma_min=over("sigma_min", min),
        stable_rank=over("stable_rank", min),
        effective_rank=over("effective_rank", min),
        condition_number=over("condition_number", max),
        collapsed=over("collapsed", lambda x: float(np.mean(x))),
        spectrum=-np.sort(-np.concatenate(spectra)) if spectra else None,
    )


def _bounded(a: np.ndarray) -> Figures:
    scale = _largest(a)
    if scale == 0.0:
        return Figures(0.0, 0.0, "zero", 0.0, 0.0, 0.0, math.inf)
    if not _SAFE < scale < 1.0 / _SAFE:
        scale = 2.0 ** math.floor(math.log2(scale))  # exact
        a = a / a.dtype.type(scale)
    else:
        scale = 1.0
    bounds = norm_bounds(a)
    return Figures(
        sigma_max=(bounds.lower * scale, bounds.upper * scale),
        frobenius=bounds.frobenius * scale,
        method=f"{BOUNDED} of σ_max",
        stable_rank=(bounds.frobenius / bounds.lower) ** 2,
    )


def _largest(a: np.ndarray) -> float:
    """max|a|, of real entries without a copy of all."""
    if np.iscomplexobj(a):
        return float(np.abs(a).max(initial=0.0))
    return max(float(a.max(initial=0.0)), -float(a.min(initial=0.0)))


def _every_size(w: np.ndarray, geometry: Conv, method: Method) -> Figures:
    """The operator's supremum over input sizes; the rest of the reshaped kernel."""
    scale = 2.0 ** math.floor(math.log2(float(np.abs(w).max(initial=0.0)) or 1.0))
    w = w / w.dtype.type(scale)  # exact, and far from the ends of single precision
    wide = np.complex128 if np.iscomplexobj(w) else np.float64
    if max(geometry.kernel(w).shape[1:3]) <= _REFINED_UP_TO and method != "bounds":
        bounds = spectral_norm_bounds(w.astype(wide), geometry, rtol=1e-6)
    else:
        bounds = spectral_norm_bounds(w, geometry)
    reshaped = Dense(out_axes=(geometry.channel_axes[0],))
    rest = _dense(w * w.dtype.type(scale), reshaped, method)
    return Figures(
        **{
            **vars(rest),
            "sigma_max": (float(bounds.lower) * scale, float(bounds.upper) * scale),
            "method": "σ_max: of the operator, over all input sizes; the rest: of the kernel as "
            "a matrix outputs × (inputs·taps)",
        }
    )


def _sized(w: np.ndarray, geometry: Conv, method: Method) -> Figures:
    shape = tuple(w.shape)
    rows, columns = geometry.sizes(shape).matrix_shape()
    exact = geometry.has_exact_spectrum(shape)
    w = w.astype(np.complex128 if np.iscomplexobj(w) else np.float64)
    if method != "bounds" and (exact or rows * columns <= _EXPLICIT_UP_TO[method]):
        values = np.asarray(singular_values(w, geometry))
        return _from_values(values, "all singular values of the operator")
    frobenius = _operator_frobenius(w, geometry)
    if method == "bounds":
        bounds = spectral_norm_bounds(w, geometry)
        ends = float(bounds.lower), float(bounds.upper)
        sigma, method_text = ends[0], f"{BOUNDED} of the operator"
        top: float | tuple[float, float] = ends
    else:
        top = sigma = float(np.asarray(spectral_norm(w, geometry)))
        method_text = f"σ_max of the operator {LANCZOS}"
    rank = (frobenius / sigma) ** 2 if sigma > 0 else 0.0
    return Figures(top, frobenius, method_text, stable_rank=rank)


def _operator_frobenius(w: np.ndarray, geometry: Conv) -> float:
    kernel = geometry.kernel(w)
    scale = float(np.abs(kernel).max(initial=0.0)) or 1.0
    operator = ConvOperator(kernel / scale, geometry.sizes(tuple(w.shape)))
    return math.sqrt(float(operator.squared_frobenius())) * scale
