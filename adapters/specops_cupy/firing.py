"""One firing of the rules of a stage: all computed first, then written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from specops import arrays
from specops.errors import (
    AdapterError,
    GeometryError,
    NonFiniteError,
    NonFiniteWarning,
    SpecopsError,
)
from specops.typing import Array, State
from specops_cupy.arrays import is_writeable
from specops_cupy.constrained import Constrained
from specops_cupy.device import on_device_of

Record = dict[str, Any]


@dataclass
class Outcome:
    """What a rule gave for one array; nothing of it has been written yet."""

    constrained: Constrained
    array: Array | None
    """The new weight, or the term of a gradient; None where the rule was skipped."""
    state: State | None
    record: Record


class Firing:
    """How rules act on arrays.

    Parameters
    ----------
    on_nonfinite : str
        "raise", "skip" or "warn".
    misfit : callable
        Told of an array under a lenient pattern whose geometry turned out not to fit.
    """

    def __init__(
        self, on_nonfinite: str, misfit: Callable[[Constrained, GeometryError], None]
    ) -> None:
        self.on_nonfinite, self._misfit = on_nonfinite, misfit

    def compute(
        self, due: Iterable[Constrained], step: int, *, certain: bool = False
    ) -> list[Outcome]:
        """Let rules act, without writing anything; with `certain`, certified where they can."""
        return [self._one(c, step, certain) for c in due]

    def _one(self, c: Constrained, step: int, certain: bool) -> Outcome:
        record: Record = {"step": step, "name": c.name}
        try:
            with on_device_of(c.array):
                if not bool(arrays.all_finite(arrays.namespace(c.array), c.array)):
                    raise NonFiniteError
                state = c.start() if c.state is None else c.state
                act = c.rule.enforce if certain else c.rule.update
                array, state, figures = act(c.array, c.geometry, state, step=step, name=c.name)
        except NonFiniteError:
            reason = self._not_finite(c, step)
        except SpecopsError as error:
            if not (isinstance(error, GeometryError) and c.assignment.lenient):
                raise type(error)(f"{c.name} at step {step}: {error}") from error
            self._misfit(c, error)
            reason = str(error)
        except Exception as error:
            error.add_note(f"while {c.rule!r} acted on {c.name} at step {step}")
            raise
        else:
            return Outcome(c, array, state, record | figures)
        return Outcome(c, None, c.state, record | {"skipped": reason})

    def _not_finite(self, c: Constrained, step: int) -> str:
        message = (
            f"{c.name} holds NaN or infinity at step {step} (shape {tuple(c.array.shape)}): "
            f"look for a diverged step or an overflow in half precision"
        )
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f'{message}. No array was changed; attach(..., on_nonfinite="warn") goes on '
                f"without this one"
            ) from None
        if self.on_nonfinite == "warn":
            warnings.warn(f"{message}; it was left as it is", NonFiniteWarning, stacklevel=2)
        return "not finite"


def write_weights(outcomes: Sequence[Outcome]) -> None:
    """Write new weights in place, and keep the states."""
    changed = [
        (o.constrained.name, o.constrained.array, o.array)
        for o in outcomes
        if o.array is not None and o.array is not o.constrained.array
    ]
    for name, array, _ in changed:
        check_writeable(name, array)
    for _, array, new in changed:
        with on_device_of(array):
            array[...] = new
    keep_states(outcomes)


def add_terms(outcomes: Sequence[Outcome], gradients: dict[str, Array]) -> None:
    """Add each term to its gradient in place, and keep the states."""
    for o in outcomes:
        if o.array is None:
            continue
        gradient = gradients[o.constrained.name]
        with on_device_of(gradient):
            xp = arrays.namespace(gradient)
            gradient[...] = gradient + xp.astype(o.array, gradient.dtype)
    keep_states(outcomes)


def keep_states(outcomes: Sequence[Outcome]) -> None:
    """The states of what was not skipped."""
    for o in outcomes:
        if o.array is not None:
            o.constrained.state, o.constrained.drifting = o.state, False


def check_writeable(name: str, array: Array) -> None:
    """Raise before the first of several arrays is written."""
    if not is_writeable(array):
        raise AdapterError(
            f"{name} is read-only, so no array was changed: pass a copy that can be written to"
        )
