"""Derivatives of JAX functions as operators for `specops.measures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from specops.errors import AdapterError
from specops.measures import MarginJacobians, margins
from specops.measures.rows import row_norms


class JacobianOperator:
    """The Jacobian of a function at a point; see `jacobian_operator`."""

    def __init__(self, function: Callable[[Any], Any], x: Any) -> None:
        at, unravel = ravel_pytree(x)
        # In half precision products would round the vectors of the iterations.
        self.like = at.astype(jnp.promote_types(at.dtype, jnp.float32))

        def flat(v: Any) -> Any:
            y = ravel_pytree(function(unravel(v.astype(at.dtype))))[0]
            return y.astype(jnp.promote_types(y.dtype, jnp.float32))

        y, push = jax.linearize(flat, self.like)
        self.shape = (int(y.size), int(self.like.size))
        self._push = jax.jit(push)
        self._pull = jax.jit(jax.linear_transpose(push, self.like))

    def matvec(self, x: Any) -> Any:
        """J x."""
        return self._push(x)

    def rmatvec(self, y: Any) -> Any:
        """Jᵀ y."""
        return self._pull(y)[0]


def jacobian_operator(function: Callable[[Any], Any], x: Any) -> JacobianOperator:
    """The Jacobian of a function at a point, as products with vectors.

    Parameters
    ----------
    function : callable
        Maps a pytree of arrays to a pytree of arrays. For a network on one sample pass
        ``lambda x: model.apply(variables, x[None])[0]``.
    x : pytree of arrays
        The point: real arrays of one dtype.

    Returns
    -------
    JacobianOperator
        ``shape`` (outputs, inputs), ``matvec(x)`` = J x and ``rmatvec(y)`` = Jᵀ y on flat
        vectors, compiled once each.

    Examples
    --------
    >>> from specops.measures import local_lipschitz
    >>> a = jnp.diag(jnp.array([3.0, 1.0]))
    >>> round(local_lipschitz(jacobian_operator(lambda x: a @ x, jnp.ones(2))).value, 4)
    3.0
    """
    return JacobianOperator(function, x)


class HessianOperator:
    """The Hessian of a loss; see `hessian_operator`."""

    def __init__(self, losses: Sequence[Callable[[Any], Any]], params: Any) -> None:
        at, unravel = ravel_pytree(params)
        self.like = at.astype(jnp.promote_types(at.dtype, jnp.float32))
        if not self.like.size:
            raise AdapterError("there is no parameter to differentiate by")
        self.shape = (int(self.like.size),) * 2

        def product(x: Any) -> Any:
            def mean(v: Any) -> Any:
                given = unravel(v.astype(at.dtype))
                return sum(loss(given) for loss in losses) / len(losses)

            return jax.jvp(jax.grad(mean), (self.like,), (x,))[1]

        self._product = jax.jit(product)

    def matvec(self, x: Any) -> Any:
        """H x: the mean over the losses."""
        return self._product(x)


def hessian_operator(
    loss: Callable[[Any], Any] | Sequence[Callable[[Any], Any]], params: Any
) -> HessianOperator:
    """The Hessian of a loss with respect to parameters, as products with vectors.

    Parameters
    ----------
    loss : callable or sequence of callables
        Each maps params to a scalar; several, one for each batch, stand for their mean.
    params : pytree of arrays
        The parameters, all of one dtype.

    Returns
    -------
    HessianOperator
        ``shape`` (n, n) and ``matvec(x)`` = H x on flat vectors, compiled once.

    Raises
    ------
    AdapterError
        There is no loss, or there are no parameters.

    Examples
    --------
    >>> from specops.measures import spectrum_ends
    >>> h = hessian_operator(lambda w: 2 * w[0] ** 2 - w[1] ** 2, jnp.ones(2))
    >>> ends = spectrum_ends(h)
    >>> round(ends.smallest, 4), round(ends.largest, 4)
    (-2.0, 4.0)
    """
    losses = [loss] if callable(loss) else list(loss)
    if not losses:
        raise AdapterError("there is no loss")
    return HessianOperator(losses, params)


def input_gradient_norms(losses: Callable[[Any], Any], x: Any) -> Any:
    r"""The norm of each sample's loss gradient with respect to its input, :math:`\|\nabla_x L\|_2`.

    Small norms mean that small changes of inputs hardly change the loss, to first order only.

    Parameters
    ----------
    losses : callable
        Maps (n, ...) to (n,), every sample's own loss.
    x : array (n, ...)
        Inputs.

    Returns
    -------
    array (n,)

    Raises
    ------
    AdapterError
        `losses` gives another shape, such as the mean of the losses.

    References
    ----------
    Yoshida & Miyato 2017, section 4.2.
    """
    shape = jax.eval_shape(losses, x).shape
    if shape != (len(x),):
        raise AdapterError(
            f"losses must be those of each sample, of shape ({len(x)},): got {shape}"
        )
    return row_norms(jax.grad(lambda x: jnp.sum(losses(x)))(x))


def margin_jacobians(
    stages: Sequence[Callable[[Any], Any]], x: Any, labels: Any
) -> MarginJacobians:
    r"""Norms of hidden layers and of the margin's gradients with respect to them, by sample.

    Parameters
    ----------
    stages : sequence of callables
        The network cut at its hidden layers: the first takes `x`, the last gives logits
        (n, classes), and what goes from one to the next, (n, ...), is a hidden layer.
    x : array (n, ...)
        Inputs.
    labels : integer array (n,)
        Indices of the right classes.

    Raises
    ------
    AdapterError
        There are fewer than two stages, so that there is no hidden layer.
    """
    if len(stages) < 2:
        raise AdapterError("two stages or more make a hidden layer: cut the network into parts")
    hidden = []
    for stage in stages[:-1]:
        x = stage(x)
        hidden.append(x)

    def total(added: Sequence[Any]) -> Any:
        h = hidden[0] + added[0]
        for stage, zero in zip(stages[1:-1], added[1:], strict=True):
            h = stage(h) + zero
        found = margins(stages[-1](h), labels)
        return jnp.sum(found), found

    zeros = [jnp.zeros_like(h) for h in hidden]
    gradients, found = jax.grad(total, has_aux=True)(zeros)

    def norms(arrays: Sequence[Any]) -> Any:
        return jnp.stack([row_norms(a) for a in arrays])

    return MarginJacobians(norms(hidden), norms(gradients), found)
