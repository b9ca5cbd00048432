"""Margins: how far the right class is ahead; and complexities divided by them."""

from __future__ import annotations

import math
from typing import NamedTuple

import array_api_compat as compat
import numpy as np

from specops import arrays
from specops.geometry.arguments import nan_unless
from specops.typing import Array


def margins(logits: Array, labels: Array) -> Array:
    r"""How far the right class is ahead, :math:`\gamma = f(x)_y - \max_{j\ne y} f(x)_j`.

    It is positive for samples that are classified correctly. Its size means nothing by itself, as
    outputs can be scaled at will: complexity measures divide by it.

    Parameters
    ----------
    logits : array (n, classes)
        Outputs for at least two classes.
    labels : integer array (n,)
        Indices of the right classes.

    Returns
    -------
    array (n,)

    Raises
    ------
    ValueError
        The shapes do not fit, there is one class only, or a label is no integer or no class.

    References
    ----------
    Bartlett, Foster & Telgarsky 2017; Sanyal, Torr & Dokania 2020, section 5.2.

    Examples
    --------
    >>> import numpy as np
    >>> margins(np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0]]), np.array([0, 1])).tolist()
    [2.0, -3.0]
    """
    xp = arrays.namespace(logits)
    shape = tuple(labels.shape) if hasattr(labels, "shape") else (len(labels),)
    if logits.ndim != 2 or logits.shape[1] < 2 or shape != (logits.shape[0],):
        raise ValueError(
            f"logits must be (n, classes) with two classes or more, and labels (n,): got "
            f"{tuple(logits.shape)} and {shape}"
        )
    if not arrays.is_array(labels) or compat.array_namespace(labels) is not xp:
        labels = arrays.constant(np.asarray(labels), logits)
    kind = arrays.dtype_name(labels.dtype)
    if not kind.startswith(("int", "uint")):
        raise ValueError(f"labels must be integers, the indices of classes: got {kind}")
    z = arrays.to_compute(xp, logits)
    classes = arrays.constant(np.arange(z.shape[1]), z)
    own = classes[None, :] == xp.astype(labels, classes.dtype)[:, None]
    if arrays.truth(xp.all(xp.any(own, axis=-1))) is False:
        raise ValueError(f"labels must lie in 0 … {z.shape[1] - 1}, one for each class")
    right = xp.sum(xp.where(own, z, xp.zeros_like(z)), axis=-1)
    found = right - xp.max(xp.where(own, xp.full_like(z, -math.inf), z), axis=-1)
    return nan_unless(xp.any(own, axis=-1), found)


class MarginJacobians(NamedTuple):
    """What `log_jac_norm` takes, as ``margin_jacobians`` of an adapter gives it.

    Attributes
    ----------
    hidden_norms, jacobian_norms : array (layers, n)
        Norms of hidden layers, and of the margin's gradients with respect to them.
    margins : array (n,)
        The samples' margins.
    """

    hidden_norms: Array
    jacobian_norms: Array
    margins: Array


def over_margin(log: float | Array, margin: float | Array, power: float) -> float | Array:
    """log − power · log γ; inf where γ is not positive."""
    if not arrays.is_array(margin):
        if math.isnan(margin):
            return math.nan
        return log - power * math.log(margin) if margin > 0 else math.inf
    margin = margin * 1.0
    xp = arrays.namespace(margin)
    positive = ~(margin <= 0)  # NaN stays
    logs = xp.log(xp.where(positive, margin, xp.ones_like(margin)))
    return xp.where(positive, log - power * logs, xp.full_like(margin, math.inf))
