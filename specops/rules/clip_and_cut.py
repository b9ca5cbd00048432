"""`ClipAndCut`: one round of clipping singular values and cutting the kernel back."""

from __future__ import annotations

from dataclasses import dataclass

from specops import arrays
from specops.geometry import Conv, Dense, Geometry
from specops.projections import project_spectral_ball
from specops.projections.kernels.one_round import clip_and_cut
from specops.rules.base import Figures, Schedule, Scheduled, bound_at, check_scheduled, numbers_of
from specops.rules.stages import WeightRule
from specops.typing import Array, State


@dataclass(frozen=True, repr=False)
class ClipAndCut(Scheduled, WeightRule):
    r"""One round of clipping a convolution's singular values and cutting back: *no* bound.

    The step of Sedghi et al., for comparison with them. On the torus of the layer's input, with
    F the Fourier transform of kernels padded to it and P the cut back to their support,

    .. math:: K \mapsto P F^{-1}\bigl(U_\theta \min(\Sigma_\theta, c) V_\theta^H\bigr)_\theta,
              \qquad (F K)_\theta = U_\theta \Sigma_\theta V_\theta^H .

    What is cut off raises singular values again, so that the norm afterwards exceeds `max_norm`
    as a rule, and nothing says by how much: see the notes. For a bound take `ClipSpectralNorm`.
    For a Dense weight nothing is cut, and the two rules are the same.

    Parameters
    ----------
    max_norm : float or callable
        c > 0, or a schedule ``(step, name, geometry) -> float``.

    Raises
    ------
    ValueError
        A bound that is not positive and finite.
    UnsupportedGeometryError
        On use: a convolution whose input size is not known.

    Notes
    -----
    At the paper's c = 0.5 one round leaves random 3×3 kernels of 16 to 64 channels and norm 3 to
    5 at norms of 0.68 to 0.72, and the layers of a trained ResNet-20 at 0.68 to 0.89, most of
    them at 0.75 to 0.84.

    The torus has the size of the input also where the layer pads with zeros, as in the paper,
    rounded up to a multiple of the stride; the figures are norms on it.

    References
    ----------
    Sedghi, Gupta & Long 2019, section 3 and appendix A.

    Examples
    --------
    >>> import numpy as np
    >>> rule, box = ClipAndCut(4.5), np.ones((1, 1, 3, 3))
    >>> _, _, figures = rule.update(box, Conv((8, 8), boundary="circular"), {})
    >>> float(figures["norm_before"]), round(float(figures["norm_after"]), 4)
    (9.0, 6.6418)
    """

    max_norm: float | Schedule
    numbers_at = numbers_of

    def __post_init__(self) -> None:
        check_scheduled(self.max_norm, "max_norm")

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state."""
        return {}

    def needs_input_size(self) -> bool:
        """True: the torus has the size of the input."""
        return True

    def refuses_nonfinite(self, geometry: Geometry) -> bool:
        """True but for stacks, of which it leaves single matrices as they are."""
        return not (isinstance(geometry, Dense) and geometry.batch_axes)

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Clip and cut; the figures are ``norm_before`` and ``norm_after``, both measured."""
        bound = bound_at(self.max_norm, step, name, geometry, "max_norm")
        if isinstance(geometry, Conv):
            new, before, after = clip_and_cut(weight, bound, geometry)
        else:
            new, info = project_spectral_ball(weight, bound, geometry, return_info=True)
            before, after = info.norm_before, info.norm_after
        return new, state, {"norm_before": before, "norm_after": after}
