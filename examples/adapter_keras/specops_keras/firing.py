"""One firing of rules: all new weights are computed first, then written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from specops.errors import NonFiniteError, NonFiniteWarning, SpecopsError
from specops.training.history import Record
from specops.training.plan import Assignment
from specops_keras.variables import Variable


@dataclass
class Constrained:
    """A variable under a rule, and the rule's state."""

    at: Variable
    assignment: Assignment
    state: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The variable's path in the model."""
        return self.at.weight.name

    def saved(self) -> dict[str, Any]:
        """State and size without arrays of a backend."""
        to_numpy, recorder = keras.ops.convert_to_numpy, self.at.recorder
        state = None if self.state is None else {k: to_numpy(x) for k, x in self.state.items()}
        return {"state": state, "grid": None if recorder is None else recorder.grid}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore `saved`."""
        state, to_tensor = saved["state"], keras.ops.convert_to_tensor
        if state is not None:
            state = {k: to_tensor(x, dtype=str(x.dtype)) for k, x in state.items()}
        self.state = state
        if self.at.recorder is not None:
            self.at.recorder.see(saved["grid"])


def fire(
    due: Iterable[Constrained], step: int, on_nonfinite: str, *, certain: bool
) -> list[Record]:
    """Let the rules act, as `enforce` does if `certain`; an error leaves every weight alone."""
    done = [(c, *_one(c, step, on_nonfinite, certain)) for c in due]
    for c, old, new, state, _ in done:
        if new is not old:
            c.at.write(new)
        c.state = state
    return [record for *_, record in done]


def _one(c: Constrained, step: int, on_nonfinite: str, certain: bool) -> tuple[Any, ...]:
    """(weight, new weight, new state, record)."""
    rule, geometry, old = c.assignment.rule, c.at.geometry(), c.at.read()
    assert rule is not None
    assert rule.stage == "weights"
    record: Record = {"step": step, "name": c.name}
    if not c.at.variable.trainable:
        return old, old, c.state, record | {"skipped": "frozen (trainable=False)"}
    try:
        if not _finite(old):
            raise NonFiniteError("it holds NaN or infinity")
        state = rule.init(old, geometry, c.name) if c.state is None else c.state
        act = rule.enforce if certain else rule.update
        new, state, figures = act(old, geometry, state, step=step, name=c.name)
        return old, new, state, record | figures
    except NonFiniteError:
        _not_finite(c, step, on_nonfinite)
        return old, old, c.state, record | {"skipped": "not finite"}
    except SpecopsError as error:
        raise type(error)(f"{c.name} at step {step}: {error}") from error
    except Exception as error:
        error.add_note(f"while {rule!r} acted on {c.name} at step {step}")
        raise


def _finite(weight: Any) -> bool:
    return bool(keras.ops.all(keras.ops.isfinite(weight)))


def _not_finite(c: Constrained, step: int, on_nonfinite: str) -> None:
    message = (
        f"{c.name} holds NaN or infinity at step {step} (shape {c.at.weight.shape}): look for a "
        f"diverged step or an overflow in half precision"
    )
    if on_nonfinite == "raise":
        raise NonFiniteError(
            f'{message}. No weight was changed; on_nonfinite="warn" goes on without this one'
        )
    if on_nonfinite == "warn":
        warnings.warn(f"{message}; it was left as it is", NonFiniteWarning, stacklevel=2)
