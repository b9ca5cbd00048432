"""The penalties that spectral norms are compared with, as terms of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from specops.measures.rows import unit_rows

Loss = Callable[[Any, Any], Any]
Model = Callable[[Any], Any]


def jacobian_penalty(
    model: Model, x: Any, *, projections: int | None = 1, key: Any = None
) -> jax.Array:
    r"""Mean over the batch of :math:`\tfrac12\|\partial f(x)/\partial x\|_F^2`.

    Estimated without bias by :math:`\tfrac K2\|J^Tv\|^2` for v uniform on the unit sphere of
    the K outputs, or summed over all outputs.

    Parameters
    ----------
    model : callable
        Maps (N, ...) to (N, ...), every sample independently: ``lambda x: net.apply(params, x)``.
    x : array
        Shape (N, ...).
    projections : int or None
        Number of random directions, which cost one backward pass each. None computes the exact
        value, with one backward pass for each output.
    key : jax.random.key
        The key of the random directions; pass a new one in every step. It is required unless
        `projections` is None.

    Returns
    -------
    jax.Array
        A 0-d array, differentiable with respect to what the model closes over: add λ times it to
        the loss.

    Raises
    ------
    ValueError
        `projections` is below 1, or `key` is missing.

    References
    ----------
    Yoshida & Miyato 2017, section 3.3; Hoffman, Roberts & Yaida 2019 (random projections).

    Examples
    --------
    >>> float(jacobian_penalty(lambda x: x @ jnp.eye(2), jnp.ones((3, 2)), projections=None))
    1.0
    """
    if projections is not None and projections < 1:
        raise ValueError(f"projections must be at least 1 or None, got {projections}")
    if projections is not None and key is None:
        raise ValueError("random directions need a key: pass key=jax.random.key(...)")
    outputs, pull = jax.vjp(lambda x: _rows(model(x)), x)
    count, dtype = outputs.shape[1], outputs.dtype
    if projections is None:
        directions = jnp.broadcast_to(jnp.eye(count, dtype=dtype)[:, None], (count, *outputs.shape))
        weight = 1.0
    else:
        directions = jax.random.normal(key, (projections, *outputs.shape), dtype)
        directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
        weight = count / projections
    rows = jax.vmap(lambda v: pull(v)[0])(directions)
    return 0.5 * weight * jnp.sum(rows**2) / len(x)


def adversarial_loss(
    model: Model, loss: Loss, x: Any, y: Any, *, alpha: float = 0.5, epsilon: float = 1.0
) -> jax.Array:
    r""":math:`\alpha L(x) + (1-\alpha)L(x + \eta)`, :math:`\eta = \epsilon\,g/\|g\|_2`.

    g is the gradient of the loss with respect to each sample, and counts as a constant. A sample
    whose gradient is zero, for instance because the loss has underflowed, stays where it is.

    Parameters
    ----------
    model : callable
        Maps a batch to outputs: ``lambda x: net.apply(params, x)``.
    loss : callable
        Maps (outputs, y) to a 0-d array.
    x, y : array
        A batch and its targets.
    alpha : float
        Weight of the loss of the clean batch, in [0, 1].
    epsilon : float
        Euclidean length of the perturbation of each sample, in the units of x.

    Returns
    -------
    jax.Array
        A 0-d array to minimise instead of the loss.

    Raises
    ------
    ValueError
        `alpha` outside [0, 1] or `epsilon` negative.

    References
    ----------
    Goodfellow, Shlens & Szegedy 2015; Yoshida & Miyato 2017, section 4 (α = 0.5, ε = 1).

    Examples
    --------
    >>> x = jnp.array([[3.0, 4.0]])
    >>> loss = adversarial_loss(lambda x: x, lambda x, y: jnp.sum(x**2) / 2, x, None)
    >>> round(float(loss), 4)  # (25 + 36)/4
    15.25
    """
    if not 0.0 <= alpha <= 1.0 or not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"alpha must be in [0, 1] and epsilon 0 or more, got {alpha}, {epsilon}")
    clean, gradient = jax.value_and_grad(lambda x: loss(model(x), y))(x)
    moved = x + epsilon * unit_rows(jax.lax.stop_gradient(gradient))
    return alpha * clean + (1.0 - alpha) * loss(model(moved), y)


def _rows(y: Any) -> jax.Array:
    return jnp.reshape(y, (len(y), -1))
