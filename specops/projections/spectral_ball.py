"""`project_spectral_ball`: the nearest weight whose operator norm is at most a given value."""

from __future__ import annotations

from typing import Literal, overload

from specops import arrays
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import check_bound, integer, nan_without, non_negative
from specops.linalg.clip_concrete import METHODS as MATRIX_METHODS
from specops.maps.prepare import prepare
from specops.projections.info import ProjectionInfo, given_state
from specops.projections.kernels.ball import METHODS as KERNEL_METHODS
from specops.projections.kernels.ball import project_kernel
from specops.projections.kernels.solution import Tolerance
from specops.projections.matrices.ball import project_matrices
from specops.typing import Array, State

_METHODS = {Dense: MATRIX_METHODS, Conv: KERNEL_METHODS}


@overload
def project_spectral_ball(
    w: Array,
    max_norm: float,
    geometry: Geometry | None = None,
    *,
    method: str = "auto",
    iterations: int | None = None,
    gap_tolerance: float = 1e-4,
    distance_tolerance: float = 0.0,
    state: State | None = None,
    return_info: Literal[False] = False,
    measure_norms: bool = True,
) -> Array: ...


@overload
def project_spectral_ball(
    w: Array,
    max_norm: float,
    geometry: Geometry | None = None,
    *,
    method: str = "auto",
    iterations: int | None = None,
    gap_tolerance: float = 1e-4,
    distance_tolerance: float = 0.0,
    state: State | None = None,
    return_info: Literal[True],
    measure_norms: bool = True,
) -> tuple[Array, ProjectionInfo]: ...


@arrays.entry
def project_spectral_ball(
    w: Array,
    max_norm: float,
    geometry: Geometry | None = None,
    *,
    method: str = "auto",
    iterations: int | None = None,
    gap_tolerance: float = 1e-4,
    distance_tolerance: float = 0.0,
    state: State | None = None,
    return_info: bool = False,
    measure_norms: bool = True,
) -> Array | tuple[Array, ProjectionInfo]:
    r"""The nearest weight to `w` whose operator norm is at most `max_norm`.

    Nearest in Frobenius norm, and feasible as stored. Dense: :math:`U\min(\Sigma, c)V^H`, of
    which only the part that changes is computed. Conv: the nearest kernel of the same support,
    found by its dual to a certified gap:

    .. math:: \min_X \tfrac12\|K - X\|^2 \quad\text{subject to}\quad \|A(X)\| \le c,
              \qquad \|X - X^*\|^2 \le 2(\text{primal} - \text{dual}).

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    max_norm : float
        The bound c > 0 on the operator norm.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.
    method : str
        "auto" chooses by device and shape.

        Dense:

        - "eigh": eigenvectors of the smaller Gram matrix; where σ₁ > 4c the SVD replaces it.
        - "svd": the SVD.
        - "products": matrix products only, for accelerators, with a proven error bound; where
          that bound is too large, "eigh" replaces it.

        Conv, of which the first three approach the nearest point and certify how near they are:

        - "cutting-planes": a quadratic program over half-spaces that contain the ball, one for
          each singular value above the bound. Where those are many, two half-spaces a round
          stand for all of them if `distance_tolerance` is at least 0.01, and "accelerated"
          takes over if it is less.
        - "accelerated": FISTA on the same dual.
        - "dykstra": slower, for comparison.
        - "alternating": the two projections of Sedghi et al. in turn, which end at a feasible
          point, not the nearest. "auto" takes it where σ₁ > 1000c.

        "auto" and "cutting-planes" constrain the operator of a small layer itself. For larger
        layers they, and the other methods for all, constrain a torus that contains the layer:
        Notes say what is small.
    iterations : int, optional
        Conv: how many rounds at the most; of "alternating" exactly so many. The default depends
        on the method: 100 for cutting planes, or 40 with two half-spaces a round; 40 to 200 for
        "accelerated", fewer where a round is more work; 200 for "dykstra"; for "alternating"
        at most 30, until the norm is within 1 % of the bound.
    gap_tolerance : float
        Conv: stop when ``2(primal − dual) ≤ gap_tolerance·‖K‖²``, which is `ProjectionInfo.gap`.
    distance_tolerance : float
        Conv: stop as well when the weight is certified to have moved at most
        ``1 + distance_tolerance`` times as far as the nearest point is away. With 0.1
        one to nine rounds do, however far the weight is.
    state : dict, optional
        ``info.state`` of an earlier call on a similar weight of the same geometry, to start
        from. It costs nothing if the weights turn out not to be similar.
    return_info : bool
        Also return a `ProjectionInfo`: norms, certified gap, iterations, state.
    measure_norms : bool
        False saves the time that measuring the norms takes; the information then holds NaN in
        their place, or a lower bound where a state gives one, and no gap for a Dense weight.
        Feasibility does not depend on it. While a compiler traces they are measured all the same.

    Returns
    -------
    array, or (array, ProjectionInfo)
        Of the shape, dtype, namespace and device of `w`: `w` itself if it is certified to be
        inside. With ``input_shape=None`` a Conv is constrained on a grid whose cosine certificate
        covers every size. Taps that no output reads inside the grid stay as they are. In a stack
        (``batch_axes``) a matrix that holds NaN or infinity is left as it was, with a warning.

    Raises
    ------
    ValueError
        `max_norm` or `gap_tolerance` is not positive and finite, `distance_tolerance` is
        negative, `iterations` below 1, an unknown method.
    StateError
        A state of another geometry, of a method that constrains another map, or not finite.
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.singular_values`.

    Notes
    -----
    Feasible means that limit²·I − G has a Cholesky factor in double precision for every Gram
    matrix G of the stored weight: exact up to its rounding, 1e-13 or so. Where a device has no
    double precision, while a compiler traces, and for torch tensors that require gradients in grad
    mode, the singular values in the weight's own precision decide: up to about 1e-6 in single.

    A Conv without groups that is copies of one matrix, of 1×1 kernels or patches that do not
    overlap, is projected as that matrix, unless `method` or `iterations` is given.

    The operator of any other zero-padded Conv, and of a circular one whose stride does not divide
    its grid, has no blocks. It is constrained itself, its norm then equal to the bound, where its
    matrix is small: rows·columns·min(rows, columns), summed over the groups, is at most 1024³,
    as of 64 channels on 4² points, or 512³ with a `distance_tolerance` of at least 0.01, as in
    training, where time counts. `method` is "auto" or "cutting-planes" for it; the former goes on
    by ADMM on the explicit matrix where many half-spaces are active or after 100 rounds, 20 to 400
    in all by how much work one is. Near 512³ a call takes 0.1 to 0.6 s on one core with a
    `distance_tolerance` of 0.1, 0.1 to 0.3 s from a state, where the torus takes 0.03 s; with none
    0.1 to 0.2 s at 0.95 of the norm, 2 to 10 s at half of it and below, and near 1024³ 0.2 to 0.7
    and 2 to 18 s.

    With a `distance_tolerance` below 0.01 and no `iterations`, layers up to 2048³ end at their own
    bound as well, unless their norm is at least 0.97 of that on the torus that contains them: at
    the nearest point where few singular values are above c, in 1 to 20 s, and otherwise on the way
    from the nearest point of the torus's ball to the given kernel, as far as the layer's own ball
    reaches. The gap then says little: it is 0.16 to 0.18 at half of the norm.

    Larger ones, other methods, layers some of whose taps wrap onto each other,
    kernels with an entry above a million times c, and everything that a compiler traces are
    constrained on the torus that contains the layer, which implies the bound, leaves the layer's
    own norm below it (3² taps: 6 % on 4² points, 1 % on 12²; 7² taps on 3² points 20 %) and changes
    some kernels that are inside already. Near the ball a kernel may move several times as far.

    Not guaranteed: that the gap reaches its tolerance within the iterations, which
    ``info.gap`` tells; nearness to the ball of a Conv that is constrained on a torus containing
    it, which is larger than the ball on that torus: there norms and gap are those of the torus.
    While a compiler traces, matrices are decomposed by SVD and kernels get 20 accelerated rounds,
    or in JAX, where a `distance_tolerance` of at least 0.01 is given, half-spaces until that is
    met, in 20 rounds at the most, without state; and 20 accelerated ones it is with torch tensors
    that require gradients in grad mode: project parameters under ``torch.no_grad()``. The
    derivative is that of a spectral function, which exists unless a singular value equals the
    bound; at repeated ones second derivatives are NaN.

    References
    ----------
    Sedghi, Gupta & Long 2019, Proposition 9 and appendix A; Sanyal, Torr & Dokania 2020,
    Algorithm 3.

    Examples
    --------
    >>> import numpy as np
    >>> project_spectral_ball(np.diag([3.0, 0.5]), 1.0).round(6)
    array([[1. , 0. ],
           [0. , 0.5]])
    >>> box = np.ones((1, 1, 3, 3))
    >>> conv = Conv((8, 8), boundary="circular")
    >>> _, info = project_spectral_ball(box, 4.5, conv, return_info=True)
    >>> float(info.norm_before), round(float(info.norm_after), 4), float(info.gap) < 1e-4
    (9.0, 4.5, True)
    """
    max_norm = check_bound(max_norm, "max_norm")
    gap_tolerance = check_bound(gap_tolerance, "gap_tolerance")
    distance_tolerance = non_negative(distance_tolerance, "distance_tolerance")
    if iterations is not None:
        iterations = integer(iterations, "iterations", least=1)
    start = given_state(state)
    # A method or a number of rounds is meant for a kernel: it is not treated as a matrix then.
    given = prepare(w, geometry, once=method == "auto" and iterations is None)
    measure = return_info and measure_norms
    methods = _METHODS[type(given.geometry)]
    if method not in methods:
        raise ValueError(
            f"method must be one of {', '.join(methods)} for "
            f"{type(given.geometry).__name__}, got {method!r}"
        )
    if isinstance(given.geometry, Conv):
        tolerance = Tolerance(gap_tolerance, distance_tolerance)
        result, info = project_kernel(
            given,
            w,
            max_norm,
            method=method,
            iterations=iterations,
            tolerance=tolerance,
            state=start,
            measure=measure,
        )
    else:
        result, info = project_matrices(
            given, w, max_norm, method=method, state=start, measure=measure
        )
    result = nan_without(max_norm, result)
    return (result, info) if return_info else result
