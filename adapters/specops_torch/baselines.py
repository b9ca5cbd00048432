"""The penalties that spectral norms are compared with, as terms of a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specops.measures.rows import unit_rows

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Model = Callable[[torch.Tensor], torch.Tensor]


def jacobian_penalty(
    model: Model,
    x: torch.Tensor,
    *,
    projections: int | None = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Mean over the batch of :math:`\tfrac12\|\partial f(x)/\partial x\|_F^2`.

    Estimated without bias by :math:`\tfrac K2\|J^Tv\|^2` for v uniform on the unit sphere of
    the K outputs, or summed over all outputs.

    Parameters
    ----------
    model : callable
        From (N, ...) to (N, ...), each sample for itself (batch norm in training mode mixes
        them, and then this is the gradient of the sum over the batch).
    x : torch.Tensor
        Shape (N, ...).
    projections : int or None
        Random directions, one backward pass each; None: every output, exactly.
    generator : torch.Generator, optional
        Of the directions.

    Returns
    -------
    torch.Tensor
        0-d and differentiable by the parameters: add λ times it to the loss.

    Raises
    ------
    ValueError
        `projections` below 1.

    References
    ----------
    Yoshida & Miyato 2017, section 4; Hoffman, Roberts & Yaida 2019 (random projections).

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.eye_(layer.weight)
    >>> jacobian_penalty(layer, torch.ones(3, 2), projections=None).item()
    1.0
    """
    if projections is not None and projections < 1:
        raise ValueError(f"projections must be at least 1 or None, got {projections}")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = model(x).reshape(len(x), -1)
        count = outputs.shape[1]
        total = outputs.new_zeros(())
        if projections is None:
            directions = torch.eye(count, dtype=outputs.dtype, device=outputs.device)
            directions = directions[:, None, :].expand(-1, len(x), -1)
            weight = 1.0
        else:
            shape = (projections, len(x), count)
            directions = torch.randn(
                shape, generator=generator, dtype=outputs.dtype, device=outputs.device
            )
            directions = directions / directions.norm(dim=-1, keepdim=True)
            weight = count / projections
        for v in directions:
            (row,) = torch.autograd.grad(outputs, x, v, create_graph=True)
            total = total + row.square().sum()
        return 0.5 * weight * total / len(x)


def adversarial_loss(
    model: Model,
    loss: Loss,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    alpha: float = 0.5,
    epsilon: float = 1.0,
) -> torch.Tensor:
    r""":math:`\alpha L(x) + (1-\alpha)L(x + \eta)`, :math:`\eta = \epsilon\,g/\|g\|_2`.

    g is the gradient of the loss by each sample, and a constant. A sample whose gradient is zero,
    as that of a loss which has underflown is, stays where it is.

    Parameters
    ----------
    model : callable
        From a batch to outputs.
    loss : callable
        (outputs, y) to a 0-d tensor.
    x, y : torch.Tensor
        A batch and its targets.
    alpha : float
        In [0, 1].
    epsilon : float
        Euclidean length of the perturbation of each sample, in the units of x.

    Returns
    -------
    torch.Tensor
        0-d, in place of the loss.

    Raises
    ------
    ValueError
        `alpha` outside [0, 1] or `epsilon` negative.

    Notes
    -----
    Two forward passes in the model's own mode: batch norm sees clean and perturbed inputs.

    References
    ----------
    Goodfellow, Shlens & Szegedy 2015; Yoshida & Miyato 2017, section 4 (α = 0.5, ε = 1).
    """
    if not 0.0 <= alpha <= 1.0 or not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"alpha must be in [0, 1] and epsilon 0 or more, got {alpha}, {epsilon}")
    with torch.enable_grad():
        seen = x.detach().requires_grad_()
        clean = loss(model(seen), y)
        (gradient,) = torch.autograd.grad(clean, seen, retain_graph=True)
        return alpha * clean + (1.0 - alpha) * loss(model(x + epsilon * unit_rows(gradient)), y)
