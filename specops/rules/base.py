"""What a rule is: what is done to one weight, and when in a training step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from specops import arrays
from specops.errors import PlanError, UnsupportedArrayError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import check_bound
from specops.typing import Array, State

Figures = dict[str, Array]
Schedule = Callable[[int, str, Geometry], float]
Stage = Literal["weights", "gradients", "forward"]
_OFF = ": to switch a layer off, give it no rule"


def check_stages(stages: Any) -> tuple[Stage, ...]:
    """The stages that an adapter claims, if they are valid.

    Raises
    ------
    TypeError
        They are no tuple of one or more stages; ``("weights")`` is a string, not a tuple.
    """
    if not isinstance(stages, tuple) or not stages or not set(stages) <= set(get_args(Stage)):
        raise TypeError(
            f"stages must be a tuple of 'weights', 'gradients' and 'forward', got {stages!r}"
        )
    return stages


def check_result(rule: Any, array: Any, weight: Array) -> None:
    """Raise unless the first result of `update` can be written, or added to the gradient.

    Without this check a single number would be broadcast over the whole weight.

    Raises
    ------
    UnsupportedArrayError
        It is no array, has another shape than the weight, or would write NaN or infinity.
    """
    if array is weight:
        return
    shape = getattr(array, "shape", None)
    if shape is None or tuple(shape) != tuple(weight.shape):
        given = type(array).__name__ if shape is None else f"an array of shape {tuple(shape)}"
        raise UnsupportedArrayError(
            f"{rule!r} gave {given} for a weight of shape {tuple(weight.shape)}: the first of what "
            f"update() returns has to be an array of the weight's shape"
        )
    # Gradients may overflow where losses are scaled; training loops skip such steps themselves.
    written = rule.stage == "weights"
    if written and arrays.truth(arrays.all_finite(arrays.namespace(array), array)) is False:
        raise UnsupportedArrayError(f"{rule!r} gave NaN or infinity for a weight that is finite")


@runtime_checkable
class Rule(Protocol):
    """What every rule has; third-party rules need nothing more.

    `stage` says when it acts: "weights" after the optimizer's step, "gradients" before it,
    "forward" in every forward pass. `init` and `update` are pure. Weights and gradients come
    back as they were given, not as a copy, where nothing changes.

    A rule of stage "forward" also has ``apply(weight, geometry, state, *, step, name)``, pure
    and differentiable, which gives the weight that the layer uses.

    What else adapters ask of a rule has defaults: see `specops.rules.WeightRule`,
    `GradientRule` and `ForwardRule`, from which a class may inherit.
    """

    @property
    def stage(self) -> Stage: ...

    @abstractmethod
    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """The state before the first firing: a flat dict of arrays."""

    @abstractmethod
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """One firing at `step` (counted from 1): (array, new state, figures for the history).

        The array is the new weight for stage "weights", what is to be added to the gradient
        for "gradients", and the weight itself for "forward", where only the state advances.
        """


class Scheduled:
    """A rule whose numbers may be schedules; a base of dataclasses."""

    def is_scheduled(self) -> bool:
        """Whether any of its numbers is a schedule."""
        return any(map(callable, vars(self).values()))

    def __repr__(self) -> str:
        given = (f"{f.name}={shown(getattr(self, f.name))}" for f in fields(self) if f.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(given)})"


def shown(value: Any) -> str:
    """The repr of a number, or the name of a schedule: its repr differs from run to run."""
    function = getattr(value, "func", value)  # the function inside functools.partial
    return getattr(function, "__name__", repr(value)) if callable(value) else repr(value)


def value_at(value: Any, step: int, name: str, geometry: Geometry) -> Any:
    """A number, or what its schedule gives for this step and layer.

    Raises
    ------
    PlanError
        The schedule takes other arguments, as the schedules of optimizers do.
    """
    if not callable(value):
        return value
    try:
        return value(step, name, geometry)
    except TypeError as error:
        if _takes_three(value):
            raise
        raise PlanError(
            f"schedules are called with (step, name, geometry), which {shown(value)} does not "
            f"take: wrap one of the step alone as lambda step, name, geometry: schedule(step)"
        ) from error


def numbers_of(rule: Scheduled, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
    """The attributes of a rule that are arrays or, with their values at this step, schedules."""
    given = {k: v for k, v in vars(rule).items() if callable(v) or arrays.is_array(v)}
    return {key: value_at(value, step, name, geometry) for key, value in given.items()}


def _takes_three(function: Any) -> bool:
    try:
        signature(function).bind(0, "", None)
    except TypeError:
        return False
    except ValueError:  # functions written in C need not have a signature
        pass
    return True


def check_scheduled(value: Any, what: str) -> None:
    """Raise unless `value` is a positive bound, or a schedule, which is checked when used."""
    if not callable(value):
        check_bound(value, what, _OFF)


def bound_at(value: Any, step: int, name: str, geometry: Geometry, what: str) -> Any:
    """What `value_at` gives, checked to be a positive bound."""
    return check_bound(value_at(value, step, name, geometry), what, _OFF)


def figure(norms: tuple[Array, ...]) -> Array:
    """The norms as one array: those of several blocks are stacked along a last axis."""
    return arrays.namespace(norms[0]).stack(norms, axis=-1) if len(norms) > 1 else norms[0]


def measured_as(geometry: Geometry, norm: str) -> Geometry:
    """The map whose norm is meant: the operator's own, or the reshaped kernel's matrix."""
    if norm == "reshaped" and isinstance(geometry, Conv):
        return Dense(out_axes=(geometry.channel_axes[0],))
    return geometry
