"""`TrainableScale`: a factor of weights in use that is trained with them."""

from __future__ import annotations

from dataclasses import dataclass

from specops.geometry.arguments import check_bound


@dataclass(frozen=True)
class TrainableScale:
    """A factor γ that is trained with the weights: for the `scale` of `SpectralNormalization`.

    Parameters
    ----------
    initial : float
        Value before training, positive.
    shared : bool
        Whether all layers on which the rule acts share one γ; otherwise each has its own.

    Examples
    --------
    >>> from specops import SpectralNormalization
    >>> SpectralNormalization(norm="bidirectional", scale=TrainableScale(1.5)).scale
    TrainableScale(initial=1.5, shared=False)
    """

    initial: float = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        check_bound(self.initial, "initial")
