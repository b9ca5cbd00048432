"""How every measurement starts: checks, a cast to the compute dtype, and a safe scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import NonFiniteError, NonFiniteWarning
from specops.geometry import Conv, Dense, Geometry, resolve_geometry
from specops.maps.unread import without_unread
from specops.typing import Array, Namespace
from specops.warned import warn


@dataclass
class Prepared:
    """A checked weight. ``given weight = scale · w`` (for Conv; Dense scales each matrix).

    Kernel taps that are never read are set to zero.
    """

    xp: Namespace
    w: Array
    geometry: Geometry
    scale: Array


@dataclass
class MatrixBlock:
    """Stacked matrices scaled to entries near 1; those that are not finite become zeros."""

    matrices: Array
    scale: Array
    """(*batch, 1, 1)"""
    finite: Array
    """(*batch,) booleans"""
    restore: Callable[[Array], Array]
    """Undoes the scale on values of shape (*batch, k); gives NaN if a matrix was not finite."""


def prepare(
    w: Array, geometry: Geometry | None, *, scaled: bool = True, once: bool = False
) -> Prepared:
    """Check a weight against its geometry and bring it to compute dtype (and scale).

    Pass `once` if the multiplicity of singular values does not matter: a convolution that consists
    of copies of one matrix is then treated as that matrix.
    """
    xp = arrays.namespace(w)
    geometry = resolve_geometry(w.ndim, geometry)
    geometry.check(tuple(w.shape))
    if once and isinstance(geometry, Conv):
        geometry = geometry.repeated_matrix(tuple(w.shape)) or geometry
    w = arrays.to_compute(xp, w)
    if isinstance(geometry, Dense):
        return Prepared(xp, w, geometry, None)
    if scaled:
        arrays.check_finite(xp, w, "the kernel")
    w = without_unread(w, geometry)
    if not scaled:
        return Prepared(xp, w, geometry, None)
    scale = arrays.magnitude(xp, w)
    return Prepared(xp, w / scale, geometry, xp.reshape(scale, ()))


def matrix_blocks(given: Prepared) -> tuple[MatrixBlock, ...]:
    """The blocks of a Dense weight, each matrix with its own scale, bad ones isolated."""
    assert isinstance(given.geometry, Dense)
    return tuple(_block(given.xp, m) for m in given.geometry.blocks(given.w))


def _block(xp: Namespace, matrices: Array) -> MatrixBlock:
    # If any entry is NaN, the largest is.
    largest = arrays.largest_entry(xp, matrices, (-2, -1), keepdims=True)
    finite = xp.isfinite(largest[..., 0, 0])
    if arrays.truth(xp.all(finite)) is False:
        _report_bad(xp, finite, tuple(matrices.shape))
        matrices = xp.where(finite[..., None, None], matrices, xp.zeros_like(matrices))
    scale = arrays.power_below(xp, largest)

    def restore(values: Array) -> Array:
        values = values * scale[..., 0]
        return xp.where(finite[..., None], values, xp.full_like(values, math.nan))

    return MatrixBlock(matrices / scale, scale, finite, restore)


def _report_bad(xp: Namespace, finite: Array, shape: tuple[int, ...]) -> None:
    bad = np.argwhere(~np.asarray([bool(f) for f in _items(xp, finite)]).reshape(finite.shape))
    if finite.ndim == 0 or len(bad) == math.prod(finite.shape):
        raise NonFiniteError(
            f"the matrix holds NaN or infinity (shape {shape}): look for a diverged step, an "
            f"overflow in half precision, or a bad checkpoint"
        )
    where = ", ".join(str(tuple(int(i) for i in b)) if len(b) > 1 else str(int(b[0])) for b in bad)
    warn(f"matrices at batch index {where} of shape {shape} hold NaN or infinity", NonFiniteWarning)


def _items(xp: Namespace, x: Array) -> list[Any]:
    flat = xp.reshape(x, (-1,))
    return [flat[i] for i in range(flat.shape[0])]
