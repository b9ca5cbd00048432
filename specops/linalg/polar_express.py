"""Composed minimax quintics for the sign function: the coefficients of Polar Express."""

from __future__ import annotations

import numpy as np

from specops import arrays
from specops.typing import Array

Quintic = tuple[float, float, float]
EPSILONS = (2.0**-23, 2.0**-52)
"""The ε of single and double precision, for which coefficients are fitted."""
CUSHION = 0.05
"""Least ratio of the ends of an interval to which a quintic is fitted: without it single precision
lost a digit, and bfloat16 gave NaN."""
MARGIN = 0.01
"""By what fraction of its half-width an interval is extended for rounding: every extremum maps to
its end, where the slope of the next quintic is 20 and more."""
PRODUCTS_FROM = 128
"""Smaller side from which an accelerator is faster at products than at eigenvalues."""
_FLAT = 1e-3
"""For intervals around 1 of a smaller half-width the Newton–Schulz quintic replaces the minimax
one. It errs by 2e-8 there, and the next step by its cube; the discriminant of the extrema would
have lost five digits."""
_MOST_STEPS = 60
"""Most steps: twice as many as the longest interval in double precision, [1e-16, 1], takes."""


def suits_products(a: Array, method: str) -> bool:
    """Whether to treat stacked matrices by products: as asked, or for "auto" on accelerators."""
    if method != "auto" or min(a.shape[-2:]) < PRODUCTS_FROM:
        return method == "products"
    return arrays.on_host(a) is None and not arrays.is_traced(a)


def sign_quintics(lower: float, accuracy: float) -> tuple[Quintic, ...]:
    r"""Quintics p₁, p₂, … whose composition is 1 on [lower, 1] up to `accuracy`.

    Each is odd, :math:`p(x) = a x + b x^3 + c x^5`, given as (a, b, c), and positive on the
    positive part of its domain. On the current interval [l, u] the best is the minimiser of
    max |1 − p|, and composing the best of each step is the best composition: the next interval
    is [p(l), 2 − p(l)]. Three departures keep it stable in floating point:

    - an interval longer than u·[`CUSHION`, 1] is fitted as if it were that long, then scaled so
      that the image of [l, u] is again centred at 1. Small values grow by 5 instead of 8 a
      step, and the middle of the range is never thrown back to the lower end;
    - the upper end is moved out by 1 % of the half-width: every extremum maps to the end, where
      the next slope is 20 and more, so that rounding errors beyond it would explode;
    - within 0.1 % of 1 it is the Newton–Schulz quintic (15x − 10x³ + 3x⁵)/8, the limit of
      the minimax ones, whose equations have become singular.

    Parameters
    ----------
    lower : float
        In (0, 1).
    accuracy : float
        Largest |1 − p(x)| on [lower, 1] to stop at.

    References
    ----------
    Amsel, Persson, Musco & Gower 2025, "The Polar Express", Theorem 3.1 and section 3.
    """
    if not 0.0 < lower < 1.0:
        raise ValueError(f"lower must be in (0, 1), got {lower}")
    low, high = lower, 1.0
    found: list[Quintic] = []
    while (not found or 1.0 - low > accuracy) and len(found) < _MOST_STEPS:
        a, b, c = best_quintic(max(low, CUSHION * high), high)
        centre = 2.0 / (_value((a, b, c), low) + _value((a, b, c), high))
        if low > 1.0 - _FLAT:
            centre = 1.0
        found.append((a * centre, b * centre, c * centre))
        low = min(_value(found[-1], low), 1.0)
        high = (2.0 - low) * (1.0 + MARGIN * (1.0 - low))
    return tuple(found)


def best_quintic(low: float, high: float) -> Quintic:
    """(a, b, c) of the odd quintic p that minimises max |1 − p| on [low, high].

    By the exchange algorithm: 1 − p takes its largest size at both ends and at two extrema
    between, with alternating signs.
    """
    if low > high * (1.0 - 2.0 * _FLAT):
        return 15.0 / 8.0, -10.0 / 8.0, 3.0 / 8.0
    inner = np.asarray([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high])
    error, previous = 0.0, np.inf
    a = b = c = 0.0
    while abs(error - previous) > 1e-15:
        previous = error
        x = np.asarray([low, *inner, high])
        system = np.stack([x, x**3, x**5, np.asarray([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        root = np.sqrt(9.0 * b * b - 20.0 * a * c)
        inner = np.sqrt((-3.0 * b + np.asarray([-root, root])) / (10.0 * c))
    return a, b, c


def _value(quintic: Quintic, x: float) -> float:
    a, b, c = quintic
    return x * (a + x * x * (b + x * x * c))
