"""`project_spectral_ball`: the nearest weight whose operator norm is at most a given value."""

from __future__ import annotations

from typing import Any

from specops import backend
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import check_bound, integer
from specops.projections import conv_support, matrix_ball
from specops.projections.conv_support import KernelProblem
from specops.projections.feasible import ProjectionInfo
from specops.projections.matrix_ball import project_block
from specops.spectra.prepare import Prepared, matrix_blocks, prepare

Array = Any
_METHODS = {Dense: matrix_ball.METHODS, Conv: conv_support.METHODS}


def project_spectral_ball(
    w: Array,
    max_norm: float,
    geometry: Geometry | None = None,
    *,
    method: str = "auto",
    iterations: int | None = None,
    gap_tolerance: float = 1e-4,
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
    gap_tolerance = check_bound(gap_tolerance, "gap_tolerance")
    if iterations is not None:
        iterations = integer(iterations, "iterations", least=1)
    given = prepare(w, geometry)
    methods = _METHODS[type(given.geometry)]
    if method not in methods:
        raise ValueError(
            f"method must be one of {', '.join(methods)} for "
            f"{type(given.geometry).__name__}, got {method!r}"
        )
    if isinstance(given.geometry, Dense):
        result, info = _project_dense(given, w, max_norm, method, state or {}, return_info)
    else:
        problem = KernelProblem(given, w, max_norm)
        result, info = problem.project(method, iterations, gap_tolerance, state, return_info)
    return (result, info) if return_info else result


def _project_dense(
    given: Prepared,
    w: Array,
    max_norm: float,
    method: str,
    state: dict[str, Array],
    measure: bool,
) -> tuple[Array, ProjectionInfo]:
    xp = given.xp
    assert isinstance(given.geometry, Dense)
    blocks = matrix_blocks(given)
    keys = [f"vectors{index}" for index in range(len(blocks))]
    unknown = set(state) - set(keys)
    if unknown:
        raise ValueError(f"the state of another geometry: unknown entries {sorted(unknown)}")
    results = [
        project_block(xp, block, max_norm, w.dtype, method, state.get(key), measure)
        for key, block in zip(keys, blocks, strict=True)
    ]
    split = given.geometry.splits is not None

    def joined(name: str) -> Array:
        parts = [getattr(result, name) for result in results]
        return xp.stack(parts, axis=-1) if split else parts[0]

    untouched = all(result.matrices is None for result in results)
    info = ProjectionInfo(
        joined("before"),
        joined("after"),
        joined("gap"),
        0 if untouched else 1,
        {k: r.basis for k, r in zip(keys, results, strict=True) if r.basis is not None},
    )
    if untouched:
        return w, info
    kept = given.geometry.blocks(w)
    matrices = tuple(
        old if r.matrices is None else xp.where(block.finite[..., None, None], r.matrices, old)
        for r, old, block in zip(results, kept, blocks, strict=True)
    )
    return given.geometry.assemble(matrices, tuple(w.shape)), info
