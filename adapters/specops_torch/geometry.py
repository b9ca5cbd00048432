"""Which linear map each parameter of a torch layer stands for."""

from __future__ import annotations

from typing import Any

from torch import nn

from specops.errors import GeometryError, UnsupportedGeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import every_axis
from specops.training.role import Role
from specops_torch.foreign_layers import foreign_role
from specops_torch.own_forward import obstacle_of

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
_REPARAMETRISED = ("orig", "g", "v")


def geometry_of(
    module: nn.Module,
    parameter: str = "weight",
    *,
    input_shape: tuple[int, ...] | None = None,
    output_padding: tuple[int, ...] | None = None,
) -> Geometry:
    """The geometry of a layer's weight.

    Parameters
    ----------
    module : torch.nn.Module
        Linear, Conv1d/2d/3d, their transposes, Embedding, recurrent layers and cells,
        MultiheadAttention, or of transformers Conv1D, stacked experts and routers.
    parameter : str
        Name of the parameter in the module.
    input_shape : tuple of int, optional
        Spatial size of a convolution's input; None stands for every size.
    output_padding : tuple of int, optional
        Output padding of a transposed convolution, if a call's ``output_size`` changed it.

    Raises
    ------
    UnsupportedGeometryError
        The layer is not a linear map that specops knows, overrides `forward`, or is padded by
        reflection.

    Examples
    --------
    >>> geometry_of(nn.Conv2d(3, 8, 3, padding=1), input_shape=(32, 32)).describe()
    'conv 32×32, zeros'
    """
    role = role_of(module, parameter, input_shape, output_padding)
    if role.geometry is None:
        raise UnsupportedGeometryError(f"{type(module).__name__}.{parameter}: {role.obstacle}")
    return role.geometry


def role_of(
    module: nn.Module,
    parameter: str,
    input_shape: tuple[int, ...] | None = None,
    output_padding: tuple[int, ...] | None = None,
) -> Role:
    """The role of one parameter; never raises."""
    plain, _, suffix = parameter.rpartition("_")
    if suffix in _REPARAMETRISED and hasattr(module, plain):
        return Role(
            obstacle=f"{parameter} is reparametrised (weight_norm, spectral_norm or pruning), so "
            f"it is not the layer's weight: remove the reparametrisation first"
        )
    role = _plain_role(module, parameter, input_shape, output_padding)
    if role is not None:
        own = obstacle_of(module) if role.geometry is not None else ""
        return Role(obstacle=own, opt_in=role.opt_in) if own else role
    return foreign_role(module, parameter) or Role(
        obstacle=f"no geometry is known for {parameter!r} of a {type(module).__name__}: pass "
        f"it in geometries="
    )


def _plain_role(
    module: nn.Module,
    parameter: str,
    input_shape: tuple[int, ...] | None,
    output_padding: tuple[int, ...] | None,
) -> Role | None:
    """The role in one of torch's own layers; None for other layers."""
    if isinstance(module, CONVOLUTIONS) and parameter == "weight":
        return _convolution(module, input_shape, output_padding)
    if isinstance(module, nn.Linear) and parameter == "weight":
        return Role(Dense())
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and parameter == "weight":
        return Role(Dense(), opt_in="an embedding: only a pattern that names it constrains it")
    if isinstance(module, nn.MultiheadAttention) and parameter.endswith("proj_weight"):
        size = module.embed_dim
        return Role(Dense(splits=(size,) * 3) if parameter == "in_proj_weight" else Dense())
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and parameter.startswith("weight_"):
        return _recurrent(module, parameter)
    return None


def _recurrent(module: Any, parameter: str) -> Role:
    gates = next((n for kind, n in _GATES.items() if isinstance(module, kind)), 1)
    if gates == 1 or parameter.startswith("weight_hr"):
        return Role(Dense())
    return Role(Dense(splits=(module.hidden_size,) * gates))


def _convolution(
    module: Any, input_shape: tuple[int, ...] | None, output_padding: tuple[int, ...] | None
) -> Role:
    mode = module.padding_mode
    if mode != "zeros" and not _pads(module) and not _is_torus(module, input_shape):
        mode = "zeros"  # nothing is padded, so that any mode is right
    if mode == "circular" and not _circular_is_torus(module):
        return Role(
            obstacle=f"circular padding {module.padding} does not give n/stride outputs for a "
            f"kernel of {module.kernel_size}, so the layer is no convolution on a torus: use "
            f'padding="same" or (kernel - 1) // 2'
        )
    transposed = module.transposed
    extra = module.output_padding if output_padding is None else output_padding
    try:
        return Role(
            Conv(
                input_shape,
                stride=module.stride,
                dilation=module.dilation,
                groups=module.groups,
                transposed=transposed,
                output_padding=extra if transposed else 0,
                padding=module.padding,
                boundary=mode,
                layout="IO*" if transposed else "OI*",
            )
        )
    except GeometryError as error:
        return Role(obstacle=str(error))


def _pads(module: Any) -> bool:
    """Whether the layer pads its input at all, so that the mode of padding matters."""
    if module.padding == "same":
        return any(k > 1 for k in module.kernel_size)
    return any(_paddings(module))


def _is_torus(module: Any, input_shape: tuple[int, ...] | None) -> bool:
    """Whether the layer is circular, and a map on the torus of this input (None: of any)."""
    if module.padding_mode != "circular" or not _circular_is_torus(module):
        return False
    strides = every_axis(module.stride, len(module.kernel_size), "stride")
    return input_shape is None or not any(n % s for n, s in zip(input_shape, strides, strict=True))


def _circular_is_torus(module: Any) -> bool:
    """Whether ⌊(n + 2p − span)/s⌋ + 1 = n/s: span − s ≤ 2p < span on every axis."""
    if module.padding == "same":
        return True
    strides, dilations = (
        every_axis(getattr(module, key), len(module.kernel_size), key)
        for key in ("stride", "dilation")
    )
    axes = zip(module.kernel_size, strides, dilations, _paddings(module), strict=True)
    return all(d * (k - 1) + 1 - s <= 2 * p < d * (k - 1) + 1 for k, s, d, p in axes)


def _paddings(module: Any) -> tuple[int, ...]:
    """The padding of each axis, if it is not "same"."""
    padding = 0 if module.padding == "valid" else module.padding
    return every_axis(padding, len(module.kernel_size), "padding")
