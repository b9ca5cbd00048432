"""The gap between training and test accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specops.geometry.arguments import non_negative


def generalization_gap(train: Sequence[float], test: Sequence[float], threshold: float) -> float:
    """The least train − test accuracy once the test accuracy exceeds a threshold.

    It compares training methods at equal quality, whereas the gap at the end of training rewards a
    network that has learnt nothing.

    Parameters
    ----------
    train, test : sequence of float
        Accuracies after each epoch, on the same scale.
    threshold : float
        What the test accuracy must exceed, on that scale.

    Returns
    -------
    float
        NaN if the threshold was never exceeded.

    Raises
    ------
    ValueError
        The sequences are empty or of different lengths, or the threshold is not a finite number
        of zero or more.

    References
    ----------
    Yoshida & Miyato 2017, section 4.

    Examples
    --------
    >>> generalization_gap([0.5, 0.9, 1.0], [0.4, 0.8, 0.85], threshold=0.75)
    0.09999999999999998
    """
    threshold = non_negative(threshold, "threshold")
    if len(train) != len(test) or not len(train):
        raise ValueError(f"expected as many accuracies of both: got {len(train)} and {len(test)}")
    gaps = [float(a) - float(b) for a, b in zip(train, test, strict=True) if b > threshold]
    return min(gaps, default=math.nan)
