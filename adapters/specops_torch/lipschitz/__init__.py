"""A Lipschitz bound of a torch model, from its layers and the operations between them."""

from __future__ import annotations

import torch
from torch import nn

from specops.measures import LipschitzBound
from specops_torch.evaluation import evaluating
from specops_torch.lipschitz.operations import operations_of
from specops_torch.lipschitz.walk import walk

__all__ = ["lipschitz_upper_bound"]


def lipschitz_upper_bound(model: nn.Module, input_shape: tuple[int, ...]) -> LipschitzBound:
    r"""An upper bound of a model's Lipschitz constant in evaluation.

    .. math:: \prod_i\|W_i\|_2\,\prod_i Lip(a_i)

    along a chain; where branches meet, each from where they part,

    .. math:: Lip(f + g) \le Lip(f) + Lip(g), \qquad
              Lip\bigl((f, g)\bigr) \le \sqrt{Lip(f)^2 + Lip(g)^2},

    which bound residual blocks (1 + Lip of the branch) and concatenations. Operator norms at the
    sizes that convolutions see; batch normalisation as the diagonal map
    :math:`\gamma/\sqrt{var + \varepsilon}` that it is in evaluation, together with the linear
    layer or convolution before it as one map, whose norm is certified.

    Parameters
    ----------
    model : torch.nn.Module
        One tensor in, one out, and between them what `torch.fx` can follow: layers and functions
        of torch in an order that does not depend on values. Its mode stays as it is. Weights
        are those in use: normalised or reparametrised ones as the forward pass sees them.
    input_shape : tuple of int
        The shape of one sample: (channels, height, width).

    Returns
    -------
    specops.measures.LipschitzBound
        With a factor for every operation, or group of branches that part and meet again, in the
        order of the model, and what each is of.

    Raises
    ------
    AdapterError
        An operation whose constant is not known, or that has none (attention, gates and other
        products of two branches, layer normalisation), each by its name and with the reason; one
        with hooks of its own; values overwritten in place that are used afterwards, or that do
        not come from the input; what `torch.fx` cannot follow, or follows by another way than
        the model goes. Compute such factors, and give the numbers to
        `specops.measures.lipschitz_upper_bound`.
    NonFiniteError
        A weight that holds NaN or infinity, by its layer.

    Notes
    -----
    Rules exist for linear layers, convolutions and products with constant matrices; pooling,
    padding, reshaping, slices and sums over axes; activations of bounded slope; sums,
    differences, concatenations and maxima of branches; factors and terms that are constant.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> model[0].weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    >>> round(lipschitz_upper_bound(model, (2,)).value, 4)
    3.0
    >>> class Residual(nn.Sequential):
    ...     def forward(self, x):
    ...         return x + super().forward(x)
    >>> bound = lipschitz_upper_bound(Residual(*model), (2,))
    >>> round(bound.value, 4), bound.layers
    (4.0, ('0 … add',))
    """
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        x = torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0))
        parameter = next(model.parameters(), None)
        x = x if parameter is None else x.to(parameter)
        return walk(model, operations_of(model), x)
