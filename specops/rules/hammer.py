"""`SpectralHammer`: set the largest singular value to a bound, and touch no other."""

from __future__ import annotations

from dataclasses import dataclass

from specops import arrays
from specops.geometry import Geometry
from specops.geometry.arguments import nan_without
from specops.rules.base import Figures, figure, numbers_of
from specops.rules.caps import Cap, check_norms
from specops.rules.following import Following
from specops.typing import Array, State

_STEPS_AT_FIRING = 4
"""Power steps per firing: after a strike another pair leads, which they must find. A choice: the
most steps that compiled code has unrolled, not as a loop."""


@dataclass(frozen=True, repr=False)
class SpectralHammer(Following, Cap):
    r"""Set the largest singular value to `max_norm` where it is above; touch no other.

    :math:`W - (\sigma_1 - c)\,u_1v_1^H`, for a convolution's operator the same along the
    gradient E of its norm, :math:`K - (\sigma_1 - c)E/\|E\|^2`.

    Parameters
    ----------
    max_norm : float or callable
        The bound, or a schedule ``(step, name, geometry) -> float``.
    norm : "operator" or "reshaped"
        For a convolution: whether the norm is the layer's, or that of the reshaped kernel.

    Notes
    -----
    Only the first singular value is lowered. Others that exceed the bound stay where they are, and
    the largest of them leads from then on, so the norm stays near the bound only if the rule acts
    at every step and a step lifts few values above the bound. The leading pair of vectors is
    followed from one firing to the next; a second pair finds the value that leads after lowering.

    References
    ----------
    Newhouse et al. 2025 ("spectral hammer").

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> w = np.diag([4.0, 1.0])
    >>> rule = SpectralHammer(2.0, norm="operator")
    >>> np.linalg.svdvals(rule.update(w, Dense(), rule.init(w, Dense(), "w"))[0]).round(6)
    array([2., 1.])
    """

    numbers_at = numbers_of

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Strike; the figures are ``norm_before`` and ``norm_after``, of the pair followed."""
        bound = self._bound(step, name, geometry)
        state = self._advanced(weight, geometry, state, name, _STEPS_AT_FIRING)
        xp, follow = arrays.namespace(weight), self.tracked(geometry)
        before = follow.measured(state)
        check_norms(xp, before)
        excesses = tuple(xp.where(n > bound, n - bound, xp.zeros_like(n)) for n in before)
        # Not n - excess, which would cancel far above the bound.
        after = tuple(xp.where(n > bound, xp.zeros_like(n) + bound, n) for n in before)
        figures = {"norm_before": figure(before), "norm_after": figure(after)}
        if arrays.truth(xp.all(xp.stack([xp.all(e == 0) for e in excesses]))):
            return weight, state, figures
        new = follow.subtract(arrays.to_compute(xp, weight), state, excesses)
        return nan_without(bound, xp.astype(new, weight.dtype, copy=False)), state, figures
