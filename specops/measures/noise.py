"""How far noise on the inputs moves the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from specops import arrays
from specops.geometry.arguments import integer
from specops.measures.rows import row_norms, rows
from specops.typing import Array


def noise_sensitivity(
    function: Callable[[Array], Array], x: Array, *, samples: int = 16, seed: int = 0
) -> Array:
    r"""The relative energy that noise adds to a function's outputs, sample by sample.

    .. math:: \phi(x) = E_\eta\frac{\|f(x + \eta\|x\|) - f(x)\|^2}{\|f(x)\|^2},
              \qquad \eta\sim N(0, I)

    The noise sensitivity of a network is its maximum over samples. For a linear map it is
    :math:`\|A\|_F^2\|x\|^2/\|Ax\|^2`, at least the stable rank: maps of low stable rank attenuate
    noise relative to what they pass on.

    Parameters
    ----------
    function : callable
        Maps (n, ...) to (n, ...), every sample independently: a network in evaluation mode,
        without gradients.
    x : array (n, ...)
        Inputs.
    samples : int
        Number of draws of the noise; the mean over them has a relative error of about
        √(2/samples) if few directions carry the noise, and far less if many do.
    seed : int
        Seed of the noise, which is the same on every backend.

    Returns
    -------
    array (n,)
        In compute precision. If f(x) is zero, it is inf where noise changes it, and NaN where
        noise does not.

    Raises
    ------
    ValueError
        `samples` is below 1, or there are not as many outputs as inputs.

    References
    ----------
    Arora, Ge, Neyshabur & Zhang 2018, definition 3; Sanyal, Torr & Dokania 2020.

    Examples
    --------
    >>> import numpy as np
    >>> a, x = np.diag([3.0, 1.0, 1.0]), np.array([[1.0, 0.0, 0.0]])
    >>> found = noise_sensitivity(lambda x: x @ a.T, x, samples=4000)
    >>> abs(float(found[0]) - 11 / 9) < 0.1
    True
    """
    samples = integer(samples, "samples", least=1)
    xp = arrays.namespace(x)
    clean = rows(function(x))
    if clean.shape[0] != x.shape[0]:
        raise ValueError(
            f"function must keep samples apart: {x.shape[0]} inputs gave {clean.shape[0]} outputs"
        )
    sizes, lengths = row_norms(clean), arrays.along_first(row_norms(x), x)
    rng = np.random.Generator(np.random.Philox(key=[seed, math.prod(x.shape)]))
    dead = sizes == 0
    divisors, total = arrays.nonzero(xp, sizes), xp.zeros_like(sizes)
    for _ in range(samples):
        noise = arrays.constant(rng.standard_normal(tuple(x.shape)), lengths)
        moved = rows(function(x + xp.astype(noise * lengths, x.dtype)))
        distances = row_norms(moved - clean)
        # Divided before squaring, because squares may leave the range of single precision.
        total = total + (xp.where(dead, xp.sign(distances), distances) / divisors) ** 2
    of_dead = xp.where(total > 0, xp.full_like(total, math.inf), xp.full_like(total, math.nan))
    return xp.where(dead, of_dead, total / samples)
