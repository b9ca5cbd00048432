"""Batch normalisation in evaluation, where it is a diagonal map."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.geometry import Geometry
from specops.training.report import measured_norm
from specops_torch.geometry import CONVOLUTIONS
from specops_torch.pieces import is_sharded

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def diagonal(name: str, layer: Any) -> torch.Tensor:
    """γ/√(var + ε): what channels are multiplied by in evaluation, in double precision."""
    if layer.running_var is None:
        raise AdapterError(
            f"{name} keeps no running statistics: it normalises by the batch in evaluation too, "
            f"and is no linear map"
        )
    scale = torch.rsqrt(layer.running_var.detach().cpu().double() + layer.eps)
    if layer.weight is None:
        return scale
    weight = layer.weight.detach()
    return scale * (weight.full_tensor() if is_sharded(weight) else weight).cpu().double()


def scaled(layer: Any, w: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A layer's weight with its output channels multiplied, on the host in double precision."""
    w = w.detach().cpu().double()  # not every device has double precision
    if getattr(layer, "transposed", False):
        groups = w.reshape(layer.groups, -1, *w.shape[1:])
        each = factors.reshape(layer.groups, 1, -1, *[1] * (w.ndim - 2))
        return (groups * each).reshape(w.shape)
    return w * factors.reshape(-1, *[1] * (w.ndim - 1))


def behind(
    model: nn.Module, layers: Collection[nn.Module]
) -> dict[nn.Module, dict[nn.Module, torch.Tensor]]:
    """For each layer, the batch normalisations registered right after it, as diagonals.

    This is right for blocks of a convolution and its normalisation, as ResNets have them; networks
    that are not sequential may compute in another order than they register layers. Sharded
    statistics are gathered, so that all ranks have to call this.
    """
    found: dict[nn.Module, dict[nn.Module, torch.Tensor]] = {}
    for parent in model.modules():
        # Not `children`, which gives a shared layer once.
        for layer, following in pairwise(parent._modules.values()):
            if layer in layers and isinstance(following, BATCH_NORMS):
                outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
                if outputs == following.num_features and following.running_var is not None:
                    factors = diagonal(type(following).__name__, following)
                    found.setdefault(layer, {})[following] = factors
    return found


def norm_with(
    layer: nn.Module, w: torch.Tensor, geometry: Geometry, following: Iterable[torch.Tensor]
) -> float | None:
    """The norm of a layer together with the normalisation after it; None if not computed.

    If several blocks share the layer, the largest of their norms.
    """
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        return None
    norms = [measured_norm(scaled(layer, w, factors), geometry)["norm"] for factors in following]
    return max(norms, default=None)
