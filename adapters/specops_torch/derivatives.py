"""Derivatives of torch functions as operators for `specops.measures`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from specops.errors import AdapterError
from specops.measures.rows import row_norms


class JacobianOperator:
    """The Jacobian of a function at a point; see `jacobian_operator`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y
        self.shape = (y.numel(), x.numel())
        self.like = x.detach()
        # J^T u is linear in u: its derivative by u is J.
        self._u = torch.zeros_like(y, requires_grad=True)
        self._pulled = self._pull(self._u, create_graph=True)

    def matvec(self, x: Tensor) -> Tensor:
        """J x."""
        v = x.reshape(self._x.shape).to(self._x)
        (image,) = torch.autograd.grad(
            self._pulled, self._u, v, retain_graph=True, materialize_grads=True
        )
        return image.reshape(-1)

    def rmatvec(self, y: Tensor) -> Tensor:
        """Jᵀ y."""
        return self._pull(y.reshape(self._y.shape).to(self._y)).reshape(-1)

    def _pull(self, u: Tensor, create_graph: bool = False) -> Tensor:
        return torch.autograd.grad(
            self._y,
            self._x,
            u,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )[0]


def jacobian_operator(function: Callable[[Tensor], Tensor], x: Tensor) -> JacobianOperator:
    """The Jacobian of a function at a point, as products with vectors.

    Parameters
    ----------
    function : callable
        Maps a tensor to a tensor, of any shapes. For a network on one sample pass
        ``lambda x: model(x[None])[0]``, with the model in evaluation mode.
    x : tensor
        The point.

    Returns
    -------
    JacobianOperator
        ``shape`` (outputs, inputs), ``matvec(x)`` = J x and ``rmatvec(y)`` = Jᵀ y on flat
        vectors. It keeps the graph of one forward pass.

    Raises
    ------
    AdapterError
        The result has no derivative because gradients were switched off within the function.

    Notes
    -----
    Products are backward passes, twice differentiated for J x, so that every operation needs a
    double backward; recurrent layers on cuDNN have none.

    Examples
    --------
    >>> from specops.measures import local_lipschitz
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    >>> round(local_lipschitz(jacobian_operator(layer, torch.ones(2))).value, 4)
    3.0
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = function(x)
        if not y.requires_grad:
            raise AdapterError(
                "the function's value does not depend on x differentiably: it ran without "
                "gradients (torch.no_grad, inference_mode, detach), or is constant"
            )
        return JacobianOperator(x, y)


class HessianOperator:
    """The Hessian of a loss; see `hessian_operator`."""

    def __init__(self, losses: Sequence[Callable[[], Tensor]], parameters: list[Tensor]) -> None:
        if not parameters:
            raise AdapterError("there is no parameter to differentiate by")
        self._losses, self._parameters = losses, parameters
        size = sum(p.numel() for p in parameters)
        self.shape = (size, size)
        self.like = parameters[0].detach()
        self._kept: tuple[Tensor, ...] | None = None
        self._known: list[tuple[int, Tensor]] = []

    def matvec(self, x: Tensor) -> Tensor:
        """H x: the mean over the losses."""
        parts = x.split([p.numel() for p in self._parameters])
        direction = [v.reshape(p.shape).to(p) for v, p in zip(parts, self._parameters, strict=True)]
        total = torch.zeros_like(x)
        for loss in self._losses:
            gradients = self._gradients(loss)
            # Only gradients that depend on the parameters: a linear loss has no second derivative.
            used = [(g, v) for g, v in zip(gradients, direction, strict=True) if g.requires_grad]
            if not used:
                continue
            products = torch.autograd.grad(
                [g for g, _ in used],
                self._parameters,
                [v for _, v in used],
                retain_graph=self._kept is not None,
                materialize_grads=True,
            )
            total = total + torch.cat([p.reshape(-1) for p in products]).to(x)
        return total / len(self._losses)

    def _gradients(self, loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        if self._kept is not None and self._unchanged():
            return self._kept
        with torch.enable_grad():
            gradients: tuple[Tensor, ...] = torch.autograd.grad(
                loss(), self._parameters, create_graph=True, materialize_grads=True
            )
        if len(self._losses) == 1:
            self._kept = gradients
            self._known = [(p._version, p.detach().clone()) for p in self._parameters]
        return gradients

    def _unchanged(self) -> bool:
        """Compares values, too: a write through `.data` does not change the version."""
        return all(
            p._version == version and torch.equal(p, known)
            for p, (version, known) in zip(self._parameters, self._known, strict=True)
        )


def hessian_operator(
    loss: Callable[[], Tensor] | Sequence[Callable[[], Tensor]], parameters: Iterable[Tensor]
) -> HessianOperator:
    """The Hessian of a loss with respect to parameters, as products with vectors.

    Parameters
    ----------
    loss : callable or sequence of callables
        Each gives a scalar: ``lambda: criterion(model(x), y)``. Several, one for each batch,
        stand for their mean, and are computed anew for each product; a single loss is computed
        anew only after its parameters have changed.
    parameters : iterable of tensor
        Such as ``model.parameters()``. Only those that require gradients count, each once.

    Returns
    -------
    HessianOperator
        ``shape`` (n, n) and ``matvec(x)`` = H x on flat vectors of all entries.

    Raises
    ------
    AdapterError
        No parameter requires a gradient.

    Notes
    -----
    Put the model into evaluation mode: dropout and batch statistics change from call to call, and
    the operator would not be one matrix. At the kinks of ReLU there is no second derivative; what
    is measured is that of the linear pieces.

    Examples
    --------
    >>> from specops.measures import spectrum_ends
    >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> ends = spectrum_ends(hessian_operator(lambda: 2 * w[0] ** 2 - w[1] ** 2, [w]))
    >>> round(ends.smallest, 4), round(ends.largest, 4)
    (-2.0, 4.0)
    """
    losses = [loss] if callable(loss) else list(loss)
    if not losses:
        raise AdapterError("there is no loss")
    # Each parameter once, even if several modules share it.
    distinct = {id(p): p for p in parameters if p.requires_grad}
    return HessianOperator(losses, list(distinct.values()))


def input_gradient_norms(losses: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""The norm of each sample's loss gradient with respect to its input, :math:`\|\nabla_x L\|_2`.

    Small norms mean that small changes of inputs hardly change the loss, to first order only.

    Parameters
    ----------
    losses : callable
        Maps (n, ...) to (n,), every sample's own loss: ``lambda x: cross_entropy(model(x), y,
        reduction="none")``, with the model in evaluation mode.
    x : tensor (n, ...)
        Inputs.

    Returns
    -------
    tensor (n,)

    Raises
    ------
    AdapterError
        `losses` gives another shape, such as the mean of the losses.

    References
    ----------
    Yoshida & Miyato 2017, section 4.2.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        values = losses(x)
        if tuple(values.shape) != (len(x),):
            raise AdapterError(
                f"losses must be those of each sample, of shape ({len(x)},): got "
                f"{tuple(values.shape)}. Pass reduction='none' to torch's losses"
            )
        (gradient,) = torch.autograd.grad(values.sum(), x, materialize_grads=True)
    norms: Tensor = row_norms(gradient)
    return norms
