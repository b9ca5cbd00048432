"""The spectrum of a Hessian: both of its ends, and its density."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from specops.geometry.arguments import check_bound, integer
from specops.linalg.lanczos import Ritz, lanczos, random_start
from specops.measures.operators import SymmetricOperator


class SpectrumEnds(NamedTuple):
    """Both ends of a symmetric operator's spectrum.

    Attributes
    ----------
    smallest, largest : float
        Ritz values: the true ends lie at or beyond them.
    smallest_error, largest_error : float
        The operator has an eigenvalue at most that far from each, up to the rounding of its
        products. That none lies further out is likely after convergence, but not certified.
    steps : int
        Number of products that were computed.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    steps: int


class SpectralDensity(NamedTuple):
    """The density of a symmetric operator's eigenvalues.

    Attributes
    ----------
    grid : ndarray (points,)
        Eigenvalues.
    density : ndarray (points,)
        Density of the eigenvalues on the grid, which integrates to 1.
    """

    grid: np.ndarray
    density: np.ndarray


def spectrum_ends(
    operator: SymmetricOperator, *, tolerance: float = 1e-3, max_steps: int = 100, seed: int = 0
) -> SpectrumEnds:
    r"""Both ends of a symmetric operator's spectrum, by Lanczos: of a loss's Hessian, sharpness.

    :math:`\lambda_{\max}(H)` says how steeply the loss rises in its steepest direction, and
    limits the step of gradient descent to :math:`2/\lambda_{\max}`; a negative
    :math:`\lambda_{\min}` shows a saddle. Neither is invariant: rescaling the layers of a ReLU
    network changes both and not its function (see `specops.balance_norms`).

    Parameters
    ----------
    operator : SymmetricOperator
        From ``hessian_operator`` of an adapter.
    tolerance : float
        Stop when both errors are below tolerance · max(\|smallest\|, \|largest\|).
    max_steps : int
        Largest number of products. As many vectors of the operator's size are kept.
    seed : int
        Seed of the start vector, which is the same on every backend.

    Returns
    -------
    SpectrumEnds

    Raises
    ------
    ValueError
        The tolerance is not positive, or `max_steps` is below 1.
    NonFiniteError
        A product holds NaN or infinity.

    Notes
    -----
    In single precision errors do not fall below about 1e-6 of the larger end.

    References
    ----------
    Lanczos 1950; Parlett 1998, theorem 4.5.1. Yoshida & Miyato 2017 track the largest by power
    iteration, which finds the end that is larger in magnitude.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import numpy as np
    >>> a = np.diag([-1.0, 0.5, 3.0])
    >>> ends = spectrum_ends(SimpleNamespace(shape=a.shape, like=a, matvec=lambda x: a @ x))
    >>> round(ends.smallest, 6), round(ends.largest, 6)
    (-1.0, 3.0)
    """
    tolerance = check_bound(tolerance, "tolerance")
    max_steps = integer(max_steps, "max_steps", least=1)

    def settled(found: Ritz) -> bool:
        size = max(abs(found.values[0]), abs(found.values[-1]))
        worst = max(found.residuals[0], found.residuals[-1])
        return len(found.values) > 1 and bool(worst <= tolerance * size)

    found = lanczos(
        operator.matvec,
        random_start(operator.shape[1], operator.like, seed),
        steps=max_steps,
        settled=settled,
    )
    return SpectrumEnds(
        float(found.values[0]),
        float(found.values[-1]),
        float(found.residuals[0]),
        float(found.residuals[-1]),
        len(found.values),
    )


def spectral_density(
    operator: SymmetricOperator,
    *,
    steps: int = 64,
    probes: int = 4,
    points: int = 512,
    width: float = 0.01,
    seed: int = 0,
) -> SpectralDensity:
    r"""The density of a symmetric operator's eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \frac1n\sum_i\delta(t - \lambda_i) \approx
              \frac1p\sum_{j\le p}\sum_k \omega_{jk}\, N(t;\, \theta_{jk},\, s^2)

    with the Ritz values θ and Gauss weights ω of p random starts, smoothed by normal densities.
    It shows the bulk of the eigenvalues, and how many lie apart from it. It does not resolve
    single eigenvalues, and fractions below 1/n·probes are noise.

    Parameters
    ----------
    operator : SymmetricOperator
        From ``hessian_operator`` of an adapter.
    steps, probes : int
        The number of products for each start vector, and the number of start vectors.
    points : int
        Number of points of the grid, at least 16; it extends past both ends by 4 s.
    width : float
        s as a fraction of the distance between the ends; at least 2/points.
    seed : int
        Seed of the start vectors.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ValueError
        The width is not positive, a count is below 1, or there are fewer points than 16.
    NonFiniteError
        A product holds NaN or infinity.

    References
    ----------
    Golub & Welsch 1969; Ghorbani, Krishnan & Xiao 2019.
    """
    width = check_bound(width, "width")
    steps, probes = integer(steps, "steps", least=1), integer(probes, "probes", least=1)
    points = integer(points, "points", least=16)
    found = [
        lanczos(
            operator.matvec,
            random_start(operator.shape[1], operator.like, seed, probe),
            steps=steps,
        )
        for probe in range(probes)
    ]
    values = np.concatenate([f.values for f in found])
    weights = np.concatenate([f.weights for f in found]) / probes
    spread = max(values.max() - values.min(), 1e-3 * np.abs(values).max()) or 1.0
    # At least as wide as two points of the grid, or bumps would fall between points.
    sigma = max(width, 2.0 / points) * spread
    grid = np.linspace(values.min() - 4 * sigma, values.max() + 4 * sigma, points)
    bumps = np.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2)
    return SpectralDensity(grid, bumps @ weights / (sigma * math.sqrt(2 * math.pi)))
