"""`project_spectral_ball`: the nearest weight whose operator norm is at most a given value."""

from __future__ import annotations

import math
from typing import Any

from specops import backend
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import check_bound
from specops.linalg.clip import clip
from specops.linalg.decompositions import svdvals
from specops.projections.conv_support import project_kernel
from specops.projections.feasible import ProjectionInfo, store_within
from specops.spectra.prepare import MatrixBlock, Prepared, matrix_blocks, prepare

Array = Any
_METHODS = {Dense: ("auto", "svd"), Conv: ("auto", "alternating")}


def project_spectral_ball(
    w: Array,
    max_norm: float,
    geometry: Geometry | None = None,
    *,
    method: str = "auto",
    state: dict[str, Array] | None = None,
    return_info: bool = False,
) -> Any:
    r"""A weight like `w` whose operator norm is at most `max_norm`.

    Dense: the nearest point in Frobenius norm, :math:`U\min(\Sigma, c)V^H`, of which only the
    part that changes is computed, so that what lies inside stays as it was. Conv: the singular
    values are clipped on the torus and the kernel is cut back to its support, in turn, until
    both hold; the last step rescales, so the result is always feasible.

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    max_norm : float
        The bound c > 0 on the operator norm.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.
    method : str
        "auto"; for Dense "svd" (default: eigenvectors of the Gram matrix where they are
        accurate); for Conv "alternating" (the two projections of Sedghi et al.).
    state : dict, optional
        ``info.state`` of an earlier call on a similar weight; empty for these methods.
    return_info : bool
        Also return a `ProjectionInfo` with the norms before and after.

    Returns
    -------
    array, or (array, ProjectionInfo)
        Of the shape, dtype, namespace and device of `w`: `w` itself if it is inside already.
        Its norm, measured as stored, is at most `max_norm` up to rounding. A zero-padded Conv
        is constrained on the torus that contains it, which implies the bound; with
        ``input_shape=None`` on a grid whose cosine certificate covers every size. In a stack
        (``batch_axes``) a matrix that holds NaN or infinity is left as it was, with a warning.

    Raises
    ------
    ValueError
        `max_norm` is not positive and finite.
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As `specops.singular_values`.

    Notes
    -----
    For a Conv the result is feasible and has the support of `w`; it is *not* guaranteed to be
    the nearest such kernel.

    References
    ----------
    Sedghi, Gupta & Long 2019, Proposition 9 and appendix A.

    Examples
    --------
    >>> import numpy as np
    >>> project_spectral_ball(np.diag([3.0, 0.5]), 1.0).round(6)
    array([[1. , 0. ],
           [0. , 0.5]])
    """
    max_norm = check_bound(max_norm, "max_norm")
    given = prepare(w, geometry)
    methods = _METHODS[type(given.geometry)]
    if method not in methods:
        raise ValueError(
            f"method must be one of {', '.join(methods)} for "
            f"{type(given.geometry).__name__}, got {method!r}"
        )
    if isinstance(given.geometry, Dense):
        result, info = _project_dense(given, w, max_norm, method == "svd")
    else:
        result, info = project_kernel(given, w, max_norm)
    return (result, info) if return_info else result


def _project_dense(
    given: Prepared, w: Array, max_norm: float, force_svd: bool
) -> tuple[Array, ProjectionInfo]:
    xp = given.xp
    assert isinstance(given.geometry, Dense)
    blocks = matrix_blocks(given)
    results, before, after = [], [], []
    for block in blocks:
        matrix, norm, stored_norm = _clip_block(xp, block, max_norm, w.dtype, force_svd)
        results.append(matrix)
        before.append(norm)
        after.append(stored_norm)
    split = given.geometry.splits is not None
    info = ProjectionInfo(
        xp.stack(before, axis=-1) if split else before[0],
        xp.stack(after, axis=-1) if split else after[0],
        0 if all(matrix is None for matrix in results) else 1,
    )
    if info.iterations == 0:
        return w, info
    kept = given.geometry.blocks(w)
    matrices = tuple(
        old if new is None else xp.where(block.finite[..., None, None], new, old)
        for new, old, block in zip(results, kept, blocks, strict=True)
    )
    return given.geometry.assemble(matrices, tuple(w.shape)), info


def _clip_block(
    xp: Any, block: MatrixBlock, max_norm: float, dtype: Any, force_svd: bool
) -> tuple[Array | None, Array, Array]:
    """(the clipped matrices as stored or None if all are inside, norm before, norm after)."""
    values = svdvals(xp, block.matrices)
    limit = max_norm / block.scale[..., 0, 0]
    norm = values[..., 0]
    before = block.restore(values[..., :1])[..., 0]
    if backend.truth(xp.all(norm <= limit)):
        return None, before, before
    # A hair below the limit, so that the rounding of the products stays inside as well.
    target = limit * (1.0 - 4.0 * backend.epsilon(block.matrices.dtype))
    above = norm > limit
    clipped = clip(xp, block.matrices, target, norm, force_svd=force_svd)
    clipped = xp.where(above[..., None, None], clipped, block.matrices)
    stored, stored_norm = store_within(
        xp,
        clipped * block.scale,
        dtype,
        xp.where(above, max_norm * xp.ones_like(limit), xp.full_like(limit, math.inf)),
        lambda x: svdvals(xp, x / block.scale)[..., 0] * block.scale[..., 0, 0],
    )
    return stored, before, xp.where(above, stored_norm, before)
