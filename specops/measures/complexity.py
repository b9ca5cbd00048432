"""Complexities of networks that generalisation bounds grow with, divided by margins.

All in logarithms: products of norms over many layers overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import GeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.maps.convolution import ConvOperator
from specops.maps.prepare import prepare
from specops.measures.margins import over_margin
from specops.spectra import spectral_norm, stable_rank
from specops.typing import Array, Namespace


def log_spec_fro(
    weights: Sequence[Array] | Mapping[str, Array],
    margin: float | Array,
    geometries: Sequence[Geometry | None] | Mapping[str, Geometry | None] | None = None,
) -> float | Array:
    r"""The logarithm of Spec-Fro,
    :math:`\prod_i\|W_i\|_2^2\,\sum_i\mathrm{srank}(W_i)\,/\,\gamma^2`.

    What the bound of Neyshabur et al. grows with, up to depth and logarithms. It compares
    networks of one architecture; its value is no bound on anything.

    Parameters
    ----------
    weights : sequence of array, or mapping of name to array
        The weights of all layers.
    margin : float or array
        γ > 0, of a sample or a percentile over samples (`margins`). The result is inf if it is
        not positive, because a misclassified sample has no margin.
    geometries : sequence of Dense or Conv, or mapping by the same names; optional
        The geometry of each weight; None is ``Dense()``. With a `Conv`, norm and stable rank are
        the operator's; with ``Dense()`` they are those of the reshaped kernel, as in papers.

    Returns
    -------
    float, or array of the margins' shape

    Raises
    ------
    ValueError
        There are no weights, or the sequences have different lengths.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.stable_rank`. Stacks and fused blocks are refused, as they have several
        norms.

    References
    ----------
    Neyshabur, Bhojanapalli & Srebro 2018; Sanyal, Torr & Dokania 2020, section 5.2.

    Examples
    --------
    >>> import numpy as np
    >>> round(log_spec_fro([np.diag([2.0, 2.0]), np.diag([3.0, 0.0])], 1.0), 6)
    4.682131
    >>> round(float(np.log(4 * 9 * (2 + 1))), 6)
    4.682131
    """
    norms, logs, ranks = _of_layers(weights, geometries, stable_rank)
    if 0.0 in norms:
        return over_margin(-math.inf, margin, 2.0)
    log = 2.0 * math.fsum(logs) + math.log(math.fsum(ranks))
    return over_margin(log, margin, 2.0)


def log_spec_l1(
    weights: Sequence[Array] | Mapping[str, Array],
    margin: float | Array,
    geometries: Sequence[Geometry | None] | Mapping[str, Geometry | None] | None = None,
) -> float | Array:
    r"""The logarithm of Spec-L1,

    .. math:: \prod_i\|W_i\|_2^2\,
              \Bigl(\sum_i\frac{\|W_i^T\|_{2,1}^{2/3}}{\|W_i\|_2^{2/3}}\Bigr)^3 / \gamma^2,

    with :math:`\|W^T\|_{2,1}` the sum over output units of the ℓ₂ norms of their rows: the
    spectrally normalised margin bound. Read it as `log_spec_fro`.

    Parameters
    ----------
    weights, margin, geometries
        As in `log_spec_fro`. A `Conv` has one output unit for every channel and position, so that
        it needs an ``input_shape``.

    Returns
    -------
    float, or array of the margins' shape

    Raises
    ------
    ValueError, GeometryError, UnsupportedArrayError, NonFiniteError
        As in `log_spec_fro`; also for a `Conv` without an input size.

    References
    ----------
    Bartlett, Foster & Telgarsky 2017, equation 1.2; Sanyal, Torr & Dokania 2020, section 5.2.

    Examples
    --------
    >>> import numpy as np
    >>> round(log_spec_l1([np.diag([2.0, 1.0])], 1.0), 6), round(float(np.log(4 * (3 / 2) ** 2)), 6)
    (2.197225, 2.197225)
    """
    norms, logs, rows = _of_layers(weights, geometries, _row_norms)
    if 0.0 in norms:
        return over_margin(-math.inf, margin, 2.0)
    shares = [(r / n) ** (2.0 / 3.0) for r, n in zip(rows, norms, strict=True)]
    log = 2.0 * math.fsum(logs) + 3.0 * math.log(math.fsum(shares))
    return over_margin(log, margin, 2.0)


def log_jac_norm(hidden_norms: Array, jacobian_norms: Array, margin: Array) -> Array:
    r"""The logarithm of Jac-Norm, :math:`\sum_i\|h_i\|_2\|J_i\|_2/\gamma`, sample by sample.

    :math:`h_i` is the i-th hidden layer and :math:`J_i = \partial\gamma/\partial h_i`. Unlike
    Spec-Fro and Spec-L1 it depends on the data, and so on the network's behaviour there.

    Parameters
    ----------
    hidden_norms, jacobian_norms : array (layers, n)
        As ``margin_jacobians`` of an adapter gives them.
    margin : array (n,)
        γ; the result is inf for samples for which it is not positive.

    Returns
    -------
    array (n,)

    Raises
    ------
    ValueError
        The shapes do not fit each other.

    References
    ----------
    Wei & Ma 2019; Sanyal, Torr & Dokania 2020, section 5.2.
    """
    shape = tuple(hidden_norms.shape)
    if len(shape) != 2 or tuple(jacobian_norms.shape) != shape or tuple(margin.shape) != shape[1:]:
        raise ValueError(
            f"expected norms (layers, n) and margins (n,), got {shape}, "
            f"{tuple(jacobian_norms.shape)} and {tuple(margin.shape)}"
        )
    xp = arrays.namespace(hidden_norms)
    # Products as sums of logarithms; the sum over layers relative to the largest term.
    terms = _log(xp, hidden_norms) + _log(xp, jacobian_norms)
    top = xp.max(terms, axis=0)
    safe = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    total = safe + _log(xp, xp.sum(xp.exp(terms - safe[None, :]), axis=0))
    return over_margin(total, margin, 1.0)


def _log(xp: Namespace, x: Array) -> Array:
    """Logarithms, -inf for zero without NumPy's warning."""
    with np.errstate(divide="ignore"):
        return xp.log(x)


def _of_layers(
    weights: Sequence[Array] | Mapping[str, Array],
    geometries: Sequence[Geometry | None] | Mapping[str, Geometry | None] | None,
    other: Callable[[Array, Geometry | None], Any],
) -> tuple[list[float], list[float], list[float]]:
    """(norms / scale, logarithms of the norms, `other` / scale) of the weights, one per layer."""
    norms, logs, others = [], [], []
    # One by one: all scaled weights at once would take as much memory as the model.
    for i, (w, geometry) in enumerate(_paired(weights, geometries)):
        xp = arrays.namespace(w)
        a = arrays.to_compute(xp, w)
        # Scaled, because norms and squares may leave the range of single precision.
        scale = arrays.magnitude(xp, a)
        a = a / scale
        norm = _one(spectral_norm(a, geometry), i)
        norms.append(norm)
        logs.append(math.log(norm) + math.log(arrays.number(xp.max(scale))) if norm else -math.inf)
        others.append(_one(other(a, geometry), i))
    return norms, logs, others


def _paired(
    weights: Sequence[Array] | Mapping[str, Array],
    geometries: Sequence[Geometry | None] | Mapping[str, Geometry | None] | None,
) -> list[tuple[Array, Geometry | None]]:
    if not len(weights):
        raise ValueError("weights is empty")
    geometries = [None] * len(weights) if geometries is None else geometries
    if len(geometries) != len(weights):
        raise ValueError(f"got {len(weights)} weights and {len(geometries)} geometries")
    if isinstance(weights, Mapping):
        if isinstance(geometries, Mapping):
            if set(weights) != set(geometries):
                raise ValueError("weights and geometries have different names")
            geometries = [geometries[name] for name in weights]
        weights = list(weights.values())
    if isinstance(geometries, Mapping):
        raise ValueError("geometries by name need weights by name")
    return list(zip(weights, geometries, strict=True))


def _one(value: Any, index: int) -> float:
    if isinstance(value, tuple) or value.ndim:
        raise GeometryError(
            f"weights[{index}] is a stack of matrices or of fused blocks, with a norm for each: "
            f"give the matrices as layers of their own"
        )
    return arrays.number(value)


def _row_norms(w: Array, geometry: Geometry | None) -> Array:
    """‖Aᵀ‖₂,₁: the sum of the ℓ₂ norms of A's rows."""
    given = prepare(w, geometry, scaled=False)
    xp = given.xp
    if isinstance(given.geometry, Dense):
        blocks = given.geometry.blocks(given.w)
        if len(blocks) > 1:
            return tuple(blocks)
        return xp.sum(xp.linalg.vector_norm(blocks[0], axis=-1), axis=-1)
    return _conv_row_norms(given.w, given.geometry)


def _conv_row_norms(w: Array, geometry: Conv) -> Array:
    sizes = geometry.sizes(tuple(w.shape))
    assert sizes.fine is not None  # `spectral_norm` has refused it
    xp, kernel = arrays.namespace(w), geometry.kernel(w)
    if sizes.wraps:
        # Taps that wrap onto the same entry add up before they are squared.
        matrix = ConvOperator(kernel, sizes).to_matrix()
        return xp.sum(xp.linalg.vector_norm(matrix, axis=-2 if geometry.transposed else -1))
    squares = ConvOperator(xp.abs(kernel) ** 2, sizes)
    rows, columns = squares.shape
    if geometry.transposed:
        sums = squares.rmatvec(xp.ones_like(arrays.zeros((rows,), squares.data)))
    else:
        sums = squares.matvec(xp.ones_like(arrays.zeros((columns,), squares.data)))
    return xp.sum(xp.sqrt(sums))
