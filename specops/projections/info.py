"""What a projection did: the records that ``return_info=True`` adds to the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from specops import arrays
from specops.errors import StateError
from specops.typing import Array, State


def given_state(state: Any) -> State:
    """The state to start from, empty if there is none.

    Raises
    ------
    StateError
        The state is not a dict; perhaps the whole `ProjectionInfo` was given.
    """
    if state is not None and not isinstance(state, Mapping):
        raise StateError(
            f"state must be None or a dict, the info.state of an earlier call, got "
            f"{type(state).__name__}"
        )
    return dict(state or {})


@arrays.record("constrained")
@dataclass
class ProjectionInfo:
    """What a projection onto a ball did.

    Attributes
    ----------
    norm_before, norm_after : array
        The constrained norm of the weight given and of the weight returned, the latter as
        stored. Shape (\\*batch,), one more axis for ``Dense(splits=...)``; NaN for matrices
        that are not finite. For a zero-padded Conv, and a circular one whose stride does not
        divide its grid, these are the layer's own if that was constrained, and else norms on the
        torus that contains the layer: `constrained` says which. Measured from
        below, to about 1e-4, where a single matrix has more than 2^16 entries, and
        `norm_before` also from the directions of a warm start: what is certified is that the
        weight returned is inside.
    gap : array
        Certified: ``‖returned − nearest‖² ≤ gap·‖given‖²`` for the nearest weight in the ball
        of the constrained norm. Where that is the norm on a torus that contains the layer, the
        layer's own ball is larger, and nothing is certified of the nearest weight in that. It
        is twice the difference of the primal and the dual objective over ‖given‖², up to
        rounding; 0 where nothing changed. Shape as the norms.
    iterations : int
        Rounds that an iterative method took; 0 if the weight was inside, 1 for a direct one. Those
        on a sample of a convolution's frequencies, before those on all, are not counted. Of a
        kernel that a compiler was given, an array, also where the kernel was inside.
    state : dict of str to array
        What the next call on a similar weight may start from. It is empty if the weight was
        inside the ball, and if an accelerated method took over because the kernel was far outside
        and `distance_tolerance` below 0.01.
    constrained : str
        Which norm was constrained: "layer" for the operator's own; "torus", for a Conv, for the
        norm on a torus that contains the layer, or on a grid that covers every size.
    """

    norm_before: Array
    norm_after: Array
    gap: Array
    iterations: int
    state: dict[str, Array] = field(default_factory=dict, repr=False)
    constrained: Literal["layer", "torus"] = "layer"


@arrays.record()
@dataclass
class StableRankInfo:
    """What a stable rank projection did.

    Attributes
    ----------
    rank_before, rank_after : array
        Stable rank of the weight given and of the weight returned, the latter measured as
        stored. Shape (\\*batch,), one more axis for ``Dense(splits=...)``. Upper bounds, as
        they divide by a lower bound of the norm: sharp for Dense and for a Conv that is given,
        within 0.1 % for one that is returned unless its iteration was cut short.
    distance : array
        Frobenius norm of the change, of the same shape.
    preserved : int or array
        Leading singular triplets that were kept exactly: the largest feasible number up to
        `preserve`, of the same shape; 0 for ``preserve=0``.
    iterations : int
        0 if the weight was inside; for Dense, how often it was rounded to its dtype until that
        held; for a Conv, along how many directions it was projected.
    state : dict of str to array
        What the next call on a similar weight may start from; empty where nothing is gained.
    """

    rank_before: Array
    rank_after: Array
    distance: Array
    preserved: Array
    iterations: int
    state: dict[str, Array] = field(default_factory=dict, repr=False)
