"""One firing of rules: all results are computed first, then checked, then written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, Literal, TypeVar

from specops import arrays
from specops.errors import NonFiniteError, NonFiniteWarning, SpecopsError
from specops.rules.base import check_result
from specops.training.cautions import caution
from specops.training.constrained import UNSEEN, Constrained
from specops.training.outcome import Outcome
from specops.training.weight import is_misfit
from specops.typing import Array
from specops.warned import warn

C = TypeVar("C", bound=Constrained[Any])
NonFinitePolicy = Literal["raise", "skip", "warn"]
_POLICIES = ("raise", "skip", "warn")
NOT_FINITE = "NaN or infinity"


class Firing(Generic[C]):
    """Lets rules act on weights, and applies the policy for weights that are not finite.

    Parameters
    ----------
    on_nonfinite : "raise", "skip" or "warn"
        What to do about a weight that holds NaN or infinity.

    Raises
    ------
    ValueError
        `on_nonfinite` is none of the three.
    """

    def __init__(self, on_nonfinite: NonFinitePolicy) -> None:
        if on_nonfinite not in _POLICIES:
            raise ValueError(
                f'on_nonfinite must be "raise", "skip" or "warn", got {on_nonfinite!r}'
            )
        self.on_nonfinite = on_nonfinite

    def compute(self, due: Iterable[C], step: int, *, certain: bool = False) -> list[Outcome[C]]:
        """Let rules act, without writing anything; with `certain`, certified where they can."""
        return [self._one(c, step, certain) for c in due]

    def _one(self, c: C, step: int, certain: bool) -> Outcome[C]:
        weight, record = c.parameter.read(), {"step": step, "name": c.name}
        try:
            with c.parameter.context():
                reason = c.why_not(weight)
                if not reason:
                    array, state, figures = c.act(weight, step, certain=certain)
                    if c.stage != "forward":
                        check_result(c.rule, array, weight)
                    c.misfit = ""
                    return Outcome(c, weight, array, state, record | figures)
            if reason == UNSEEN and c.stage == "weights":
                _warn_unseen(c)
        except NonFiniteError:
            reason = self._not_finite(c, weight, step)
        except SpecopsError as error:
            if not (c.assignment.lenient and is_misfit(error, c.geometry, weight.shape)):
                raise type(error)(f"{c.name} at step {step}: {error}") from error
            reason = c.misfit = str(error)
        except Exception as error:
            error.add_note(f"while {c.rule!r} acted on {c.name} at step {step}")
            raise
        return Outcome(c, weight, None, None, record | {"skipped": reason})

    def _shape(self, c: C, weight: Array) -> tuple[int, ...]:
        return tuple(weight.shape)

    def _holds(self, c: C, weight: Array) -> str:
        finite = arrays.truth(arrays.all_finite(arrays.namespace(weight), weight))
        return "numbers too large for their norm" if finite else NOT_FINITE

    def _not_finite(self, c: C, weight: Array, step: int) -> str:
        message = (
            f"{c.name} holds {self._holds(c, weight)} at step {step} "
            f"(shape {self._shape(c, weight)}): look for a diverged step or an overflow in half "
            f"precision"
        )
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f'{message}. The rules wrote to no weight at this step; on_nonfinite="warn" goes '
                f"on without this one"
            ) from None
        if self.on_nonfinite == "warn":
            warn(f"{message}; it was left as it is", NonFiniteWarning)
        return "not finite"


def _warn_unseen(c: Constrained[Any]) -> None:
    """Warn once that a rule does nothing to a weight until its layer has seen an input."""
    if not c.told:
        c.told = True
        caution(
            f"{c.name} is left as it is, because {UNSEEN}, and {c.rule!r} needs its size: run a "
            f"forward pass first, or name the input_shape in geometries="
        )


def write(outcomes: Sequence[Outcome[Any]]) -> None:
    """Write new weights and keep the states, if all can be written."""
    for o in outcomes:
        if o.changes_weight:
            o.constrained.parameter.check_writable()
    for o in outcomes:
        o.constrained.keep(o)
