"""Norms of gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specops import arrays


def gradient_norms(gradients: Mapping[str, Any]) -> dict[str, float]:
    r"""The Frobenius norm of each gradient, :math:`\|\nabla_{W_i} L\|_F`.

    Ratios of many orders of magnitude between layers indicate vanishing or exploding gradients;
    under spectral normalisation of a ReLU network each is at most
    :math:`\|x\|\prod_i Lip(a_i)`. Single figures depend on the scale of the loss.

    Parameters
    ----------
    gradients : mapping of str to array or None
        Gradients by name: ``{name: p.grad for name, p in model.named_parameters()}``, or a flat
        dict of what ``jax.grad`` gave. Entries that are None are left out. For
        :math:`\nabla_x L` of a batch see ``input_gradient_norms`` of an adapter.

    Returns
    -------
    dict of str to float
        NaN or inf where a gradient holds them.

    References
    ----------
    Lin, Sekar & Fanti 2021, Proposition 1.

    Examples
    --------
    >>> import numpy as np
    >>> gradient_norms({"a": np.array([[3.0, 4.0]]), "b": None})
    {'a': 5.0}
    """
    found = {}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        xp = arrays.namespace(gradient)
        g = xp.reshape(arrays.to_compute(xp, gradient), (-1,))
        if not g.shape[0]:
            found[name] = 0.0
            continue
        # Scaled first, because squares of small gradients underflow.
        scale = arrays.magnitude(xp, g)
        norm = arrays.number(xp.linalg.vector_norm(g / scale))
        found[name] = norm * arrays.number(xp.max(scale))
    return found
