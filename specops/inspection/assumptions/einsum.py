"""Kernels of einsum layers, such as Keras' EinsumDense."""

from __future__ import annotations

from specops.geometry import Dense
from specops.inspection.assumptions.context import Context
from specops.inspection.assumptions.reading import Assumption, Reading


def einsum(name: str, shape: tuple[int, ...], context: Context) -> Assumption | None:
    """The map by the equation in the configuration; None for other layers.

    Without an equation in the file, either the first or the last axes are those of outputs.
    """
    told = context.configuration.layer(name)
    if told is not None and told.equation:
        geometry = _of_equation(told.equation, len(shape))
        if geometry is None:
            return None
        return Assumption.of(Reading(geometry, f"an einsum: {told.equation}"))
    if len(shape) < 3 or "einsum_dense" not in name:
        return None
    ends = [tuple(range(first, 0)) for first in range(-len(shape) + 1, 0)]
    readings = [
        Reading(Dense(out_axes=e), f"an einsum with {len(e)} axes of outputs") for e in ends
    ]
    return Assumption.of(*readings)


def _of_equation(equation: str, axes: int) -> Dense | None:
    """The map of the second operand of "input,kernel->output"; None for other equations."""
    left, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    operand, comma, kernel = left.partition(",")
    letters = {*operand, *kernel, *output}
    if not (arrow and comma) or len(kernel) != axes != 0 or not all(x.isalpha() for x in letters):
        return None
    out = tuple(i for i, x in enumerate(kernel) if x in output and x not in operand)
    inner = tuple(i for i, x in enumerate(kernel) if x in operand and x not in output)
    batch = tuple(i for i, x in enumerate(kernel) if x in operand and x in output)
    if not out or not inner or len({*kernel}) != axes or len(out + inner + batch) != axes:
        return None
    return Dense(out_axes=out, in_axes=inner, batch_axes=batch)
