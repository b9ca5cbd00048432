"""Adversarial training, which spectral norms are compared with, as a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specops.measures.rows import unit_rows

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Model = Callable[[torch.Tensor], torch.Tensor]


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

    g is the gradient of the loss with respect to each sample, and counts as a constant. A sample
    whose gradient is zero, for instance because the loss has underflowed, stays where it is.

    Parameters
    ----------
    model : callable
        Maps a batch to outputs.
    loss : callable
        Maps (outputs, y) to a 0-d tensor.
    x, y : torch.Tensor
        A batch and its targets.
    alpha : float
        Weight of the loss of the clean batch, in [0, 1].
    epsilon : float
        Euclidean length of the perturbation of each sample, in the units of x.

    Returns
    -------
    torch.Tensor
        A 0-d tensor to minimise instead of the loss.

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
