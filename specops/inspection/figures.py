"""The figures of one weight: exact from its singular values, or bounds where it is too large."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from specops import arrays
from specops.geometry import Conv, Dense, Geometry
from specops.inspection.large import norm_bounds
from specops.inspection.spectrum import CIRCULAR, RESHAPED, Figures, from_values, worst
from specops.maps.convolution import ConvOperator
from specops.spectra import singular_values, spectral_norm, spectral_norm_bounds

Method = Literal["auto", "exact", "bounds"]
BOUNDED = "certified bounds"
LANCZOS = "by Lanczos"
"""Words by which `Figures.method` can be recognised."""
_EXACT_UP_TO = 2048
"""Largest smaller side of a matrix for which all values are computed."""
_EXPLICIT_UP_TO = {"auto": 2**22, "exact": 2**24, "bounds": 0}
"""Most entries of a zero-padded convolution's matrix that is decomposed, by method."""
_REFINED_UP_TO = 128
"""Most channels for which a supremum over all frequencies is refined."""
_CHUNK = 2**22
"""Entries of a slice from which a triangular factor is made: a choice of memory, 32 MiB in
double."""
_SAFE = 1e-4
"""If the largest entry is between this and its inverse, ‖AᵀAv‖² fits into single precision."""
_TORUS_UP_TO = 2**35
"""Most multiplications for which the values of the circular layer are computed unasked: half a
minute on two cores."""


@arrays.entry
def figures_of(w: np.ndarray, geometry: Geometry, method: Method = "auto") -> Figures:
    """The figures of a finite weight that stands for `geometry`."""
    if isinstance(geometry, Dense):
        return _dense(w, geometry, method)
    if geometry.grid is None:
        return _every_size(w, geometry, method)
    return _sized(w, geometry, method)


def takes_bounds(side: int, method: Method) -> bool:
    """Whether matrices with this smaller side get bounds of the norm, without a decomposition."""
    return method == "bounds" or (method == "auto" and side > _EXACT_UP_TO)


def _dense(w: np.ndarray, geometry: Dense, method: Method) -> Figures:
    stacks = [b.reshape(-1, *b.shape[-2:]) for b in geometry.blocks(w)]
    found = [_matrix(a, method) for stack in stacks for a in stack]
    return found[0] if len(found) == 1 else worst(found)


def _matrix(a: np.ndarray, method: Method) -> Figures:
    if takes_bounds(min(a.shape), method):
        return _bounded(a)
    return from_values(exact_values(a), "all singular values")


def product_figures(b: np.ndarray, a: np.ndarray, geometry: Dense | None = None) -> Figures:
    """The figures of B·A, from the triangular factors of B and Aᵀ: B·A itself is never formed.

    Splits of the geometry are along the rows of B.
    """
    split = Dense() if geometry is None else Dense(splits=geometry.splits, repeats=geometry.repeats)
    right: Any = np.linalg.qr(a.T, mode="r")
    found = []
    for block in split.blocks(b):
        left: Any = np.linalg.qr(block, mode="r")
        values = exact_values(left @ right.T)
        zeros = min(block.shape[0], a.shape[1]) - len(values)
        values = np.concatenate([values, np.zeros(max(zeros, 0))])
        found.append(from_values(values, "all singular values, from the factors"))
    return found[0] if len(found) == 1 else worst(found)


def exact_values(a: np.ndarray) -> np.ndarray:
    """All singular values in double precision, in little more memory than two copies of `a`."""
    a = a.T if a.shape[0] < a.shape[1] else a
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    rows, columns = a.shape
    if rows <= 2 * columns:
        square = a.astype(wide)
    else:
        # Triangular factors slice by slice, so that A is never copied as a whole.
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
    """max|a|; for real entries without a copy of the whole array."""
    if np.iscomplexobj(a):
        return float(np.abs(a).max(initial=0.0))
    return max(float(a.max(initial=0.0)), -float(a.min(initial=0.0)))


def _every_size(w: np.ndarray, geometry: Conv, method: Method) -> Figures:
    """The figures of the supremum over input sizes, with those of the reshaped kernel beside it."""
    sizes = geometry.sizes(tuple(w.shape))
    if all(k == 1 for k in sizes.kernel):
        return _positions(w, geometry, method, "1×1: the same matrix at every position")
    if sizes.apart:
        return _positions(w, geometry, method, "patches that do not overlap: a matrix for each")
    scale = 2.0 ** math.floor(math.log2(float(np.abs(w).max(initial=0.0)) or 1.0))
    scaled = w / w.dtype.type(scale)  # exact, and far from the ends of single precision
    wide = np.complex128 if np.iscomplexobj(w) else np.float64
    if max(geometry.kernel(w).shape[1:3]) <= _REFINED_UP_TO and method != "bounds":
        bounds = spectral_norm_bounds(scaled.astype(wide), geometry, rtol=1e-6)
    else:
        bounds = spectral_norm_bounds(scaled, geometry)
    reshaped = Dense(out_axes=(geometry.channel_axes[0],))
    return Figures(
        (float(bounds.lower) * scale, float(bounds.upper) * scale),
        None,
        "σ_max of the operator, over all input sizes",
        beside=_dense(w, reshaped, method),
        beside_of=RESHAPED,
    )


def _positions(w: np.ndarray, geometry: Conv, method: Method, why: str) -> Figures:
    """The figures of a layer that applies one matrix at every position: exact at every size."""
    text = f"{why}; ranks and ‖·‖_F of one position"
    groups = _at_one_position(w, geometry)
    if takes_bounds(min(groups.shape[1:]), method):
        found = worst([_bounded(a) for a in groups]) if len(groups) > 1 else _bounded(groups[0])
        return replace(found, method=f"{found.method}; {text}")
    values = np.concatenate([exact_values(a) for a in groups])
    return from_values(-np.sort(-values), f"all singular values; {text}")


def _sized(w: np.ndarray, geometry: Conv, method: Method) -> Figures:
    shape = tuple(w.shape)
    sizes = geometry.sizes(shape)
    rows, columns = sizes.matrix_shape()
    w = w.astype(np.complex128 if np.iscomplexobj(w) else np.float64)
    if method != "bounds":
        at_each = _repeated(w, geometry)
        if at_each is not None:
            return from_values(at_each, "all singular values of the operator")
        if geometry.has_exact_spectrum(shape) or rows * columns <= _EXPLICIT_UP_TO[method]:
            values = np.asarray(singular_values(w, geometry))
            return from_values(values, "all singular values of the operator")
    frobenius = _operator_frobenius(w, geometry)
    if method == "bounds":
        bounds = spectral_norm_bounds(w, geometry)
        top: float | tuple[float, float] = (float(bounds.lower), float(bounds.upper))
        sigma, text = float(bounds.lower), f"{BOUNDED} of the operator"
        beside = None
    else:
        top = sigma = float(np.asarray(spectral_norm(w, geometry)))
        text = f"σ_max of the operator {LANCZOS}"
        beside = _circular(w, geometry, method)
    return Figures(
        top,
        frobenius,
        text,
        stable_rank=(frobenius / sigma) ** 2 if sigma > 0 else 0.0,
        beside=beside,
        beside_of=CIRCULAR if beside is not None else "",
        cost=_cost(rows, columns),
    )


def _cost(rows: int, columns: int) -> str:
    """The cost of decomposing a matrix: memory, and time at 10¹⁰ multiplications a second."""
    hours = 4.0 * rows * columns * min(rows, columns) / 3.0 / 1e10 / 3600.0
    time = f"{hours:.1f} hours" if hours > 1.0 else f"{max(60.0 * hours, 0.1):.1f} minutes"
    limit = _EXPLICIT_UP_TO["exact"]
    reach = "which --method exact does"
    if rows * columns > limit:
        reach = f"more than the {limit * 8 / 2**30:.2g} GiB up to which --method exact does"
    size = rows * columns * 8 / 2**30
    return f"{rows}×{columns}: {size:.2g} GiB and about {time}, {reach}"


def _repeated(w: np.ndarray, geometry: Conv) -> np.ndarray | None:
    """All values of a layer whose outputs share no input, from its matrices; None for others."""
    sizes = geometry.sizes(tuple(w.shape))
    assert sizes.fine is not None
    assert sizes.coarse is not None
    last = [(m - 1) * s for m, s in zip(sizes.coarse, sizes.stride, strict=True)]
    inside = all(a + b <= n for a, b, n in zip(last, sizes.spans, sizes.fine, strict=True))
    if not sizes.apart or any(sizes.lower or ()) or not inside:
        return None
    values = np.concatenate([exact_values(a) for a in _at_one_position(w, geometry)])
    found = np.repeat(-np.sort(-values), math.prod(sizes.coarse))
    return np.concatenate([found, np.zeros(min(sizes.matrix_shape()) - len(found))])


def _at_one_position(w: np.ndarray, geometry: Conv) -> np.ndarray:
    """The matrices (groups, rows, columns·taps) that act at each position."""
    kernel = geometry.kernel(w)
    return np.asarray(kernel.reshape(*kernel.shape[:2], -1))


def _circular(w: np.ndarray, geometry: Conv, method: Method) -> Figures | None:
    """All values of the same layer with circular padding; None if they cost too much."""
    circular = replace(geometry, boundary="circular", padding="same", output_padding=0)
    if not circular.has_exact_spectrum(tuple(w.shape)):
        return None
    rows, columns = circular.sizes(tuple(w.shape)).matrix_shape()
    kernel = geometry.kernel(w).shape
    points = rows // (kernel[0] * kernel[1])
    side = columns // (kernel[0] * points)
    cost = points * kernel[0] * kernel[1] * side * min(kernel[1], side)
    if method != "exact" and cost > _TORUS_UP_TO:
        return None
    values = np.asarray(singular_values(w, circular))
    return from_values(values, "all singular values of the layer with circular padding")


def _operator_frobenius(w: np.ndarray, geometry: Conv) -> float:
    kernel = geometry.kernel(w)
    scale = float(np.abs(kernel).max(initial=0.0)) or 1.0
    operator = ConvOperator(kernel / scale, geometry.sizes(tuple(w.shape)))
    return math.sqrt(float(operator.squared_frobenius())) * scale
