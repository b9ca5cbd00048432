"""PyTorch adapter: rules that follow an optimizer's steps.

torch is imported on first use of a name, not with this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops_torch.adapter import attach
    from specops_torch.attachment import Attachment
    from specops_torch.balance import balance_norms
    from specops_torch.baselines import adversarial_loss
    from specops_torch.collecting import weights_and_geometries
    from specops_torch.critics import neural_discriminator_loss, neural_divergence
    from specops_torch.derivatives import (
        hessian_operator,
        input_gradient_norms,
        jacobian_operator,
    )
    from specops_torch.generative import (
        frechet_inception_distance,
        inception_score,
        intra_class_fid,
    )
    from specops_torch.geometry import geometry_of
    from specops_torch.jacobian_penalties import jacobian_penalty, layerwise_jacobian_penalty
    from specops_torch.lipschitz import lipschitz_upper_bound
    from specops_torch.margins import margin_jacobians
    from specops_torch.stateful import Stateful

__all__ = [
    "Attachment",
    "Stateful",
    "adversarial_loss",
    "attach",
    "balance_norms",
    "frechet_inception_distance",
    "geometry_of",
    "hessian_operator",
    "inception_score",
    "input_gradient_norms",
    "intra_class_fid",
    "jacobian_operator",
    "jacobian_penalty",
    "layerwise_jacobian_penalty",
    "lipschitz_upper_bound",
    "margin_jacobians",
    "neural_discriminator_loss",
    "neural_divergence",
    "weights_and_geometries",
]

_HOMES = {
    "adapter": ("attach",),
    "attachment": ("Attachment",),
    "balance": ("balance_norms",),
    "baselines": ("adversarial_loss",),
    "collecting": ("weights_and_geometries",),
    "critics": ("neural_discriminator_loss", "neural_divergence"),
    "derivatives": ("hessian_operator", "input_gradient_norms", "jacobian_operator"),
    "generative": ("frechet_inception_distance", "inception_score", "intra_class_fid"),
    "geometry": ("geometry_of",),
    "jacobian_penalties": ("jacobian_penalty", "layerwise_jacobian_penalty"),
    "lipschitz": ("lipschitz_upper_bound",),
    "margins": ("margin_jacobians",),
    "stateful": ("Stateful",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"specops_torch.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
