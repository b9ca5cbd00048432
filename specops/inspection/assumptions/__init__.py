"""Which map a tensor of a checkpoint stands for, by its name, its shape and its neighbours."""

from __future__ import annotations

from dataclasses import replace

from specops.inspection.assumptions.context import Context
from specops.inspection.assumptions.einsum import einsum
from specops.inspection.assumptions.kernels import kernel
from specops.inspection.assumptions.matrices import matrix
from specops.inspection.assumptions.no_maps import no_map
from specops.inspection.assumptions.reading import Assumption, Reading
from specops.inspection.assumptions.stacks import WIDEST_TAP, heads, stack, stack_or_kernel

__all__ = ["Assumption", "Context", "Reading", "assume"]


def assume(name: str, shape: tuple[int, ...], dtype: str, context: Context) -> Assumption:
    """The maps that a tensor may stand for.

    There is more than one if names, neighbours and the file's configuration do not decide.
    """
    skipped = no_map(name, shape, dtype, context)
    if skipped is not None:
        return skipped
    found = _read(name, shape, context)
    if not _is_as_stored(name):
        return found
    note = "; a part of a reparametrised weight, as stored"
    noted = [replace(reading, why=reading.why + note) for reading in found.readings]
    return replace(found, readings=tuple(noted))


def _is_as_stored(name: str) -> bool:
    """Whether a tensor is not the layer's own weight, but one from which it is computed."""
    last = name.rpartition(".")[2]
    return "parametrizations." in name or last in ("weight_v", "weight_orig")


def _read(name: str, shape: tuple[int, ...], context: Context) -> Assumption:
    multiplied = einsum(name, shape, context)
    if multiplied is not None:
        return multiplied
    if len(shape) == 2:
        return matrix(name, shape, context)
    by_heads = heads(name, shape, context)
    if by_heads is not None:
        return Assumption.of(by_heads)
    if len(shape) > 3:
        return kernel(name, shape, context)
    verdict, for_stack, for_kernel = stack_or_kernel(name, shape, context)
    if verdict == "stack":
        return Assumption.of(stack(name, shape, for_stack, context))
    tapped = kernel(name, shape, context)
    if verdict == "kernel" or not tapped.readings:
        return tapped
    convolutions = [Reading(r.geometry, f"{r.why}; {for_kernel}", r.shape) for r in tapped.readings]
    stacked = stack(name, shape, for_stack, context)
    wide = (shape[0] if context.taps_first else shape[-1]) > WIDEST_TAP
    return Assumption.of(*([stacked, *convolutions] if wide else [*convolutions, stacked]))
