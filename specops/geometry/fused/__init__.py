"""Fused layers, which hold several maps in one array: the blocks that these maps are.

Layers are recognised by their names, in the same way in a model and in a checkpoint. A name counts
only if the layer's surroundings agree with it: the sizes of neighbouring layers, or a
configuration.
"""

from __future__ import annotations

from specops.geometry.fused.attention import QUERIES, attention
from specops.geometry.fused.experts import PAIRS, fused_experts
from specops.geometry.fused.gated import gated
from specops.geometry.fused.gates import gates, gates_of
from specops.geometry.fused.known import Fused, Shape, Surroundings
from specops.geometry.fused.latent import latent
from specops.geometry.fused.linear_attention import linear_attention
from specops.geometry.fused.state_space import state_space

__all__ = [
    "PAIRS",
    "Fused",
    "Surroundings",
    "fused",
    "fused_experts",
    "fused_kernel",
    "fused_stack",
    "gates_of",
]


def fused(layer: str, shape: Shape, out: int, around: Surroundings) -> Fused | None:
    """The maps that a matrix holds, by the name of its layer; None if it is no such layer.

    Parameters
    ----------
    layer : str
        The last part of the layer's name; of torch's MultiheadAttention that of its parameter.
    shape : tuple of int
        The matrix's shape.
    out : 0 or -1
        The axis of the matrix that indexes outputs.
    around : Surroundings
        What is known about the block that the layer belongs to.
    """
    if len(shape) != 2 or 0 in shape:
        return None
    rows, columns = (shape[out], shape[1 + out])
    for kind in (attention, gates, latent, linear_attention, state_space, gated):
        found = kind(layer, rows, columns, out, around)
        if found is not None:
            return found
    return None


def fused_stack(layer: str, shape: Shape, out: int, around: Surroundings) -> Fused | None:
    """As `fused`, for matrices of many layers that are stacked along the first axis.

    `out` is 1 or -1. Neighbours are taken without their first axis, which must be as long.
    """

    def beside(name: str) -> Shape:
        found = around.beside(name)
        return found[1:] if found[:1] == shape[:1] else ()

    inner = Surroundings(around.setting, beside)
    found = fused(layer, shape[1:], out if out < 0 else out - 1, inner)
    return None if found is None else found.stacked()


def fused_kernel(layer: str) -> str:
    """A remark on a convolution of this name, if it holds several maps that are treated as one."""
    return "query, key and value of all heads are taken for one map" if layer in QUERIES else ""
