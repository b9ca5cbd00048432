"""One firing of the rules of each stage: all computed first, then written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from specops.errors import (
    AdapterError,
    GeometryError,
    NonFiniteError,
    NonFiniteWarning,
    SpecopsError,
)
from specops.geometry import Conv, Dense, Geometry
from specops_torch.constrained import Constrained
from specops_torch.fast_paths import advanced

_PLAIN = (torch.float32, torch.float64)
Record = dict[str, Any]
Commit = Callable[[], None]
Update = Callable[[Constrained], Any]
"""(array, state, figures) of a weight."""


class Firing:
    """How rules act on a model's parameters.

    Parameters
    ----------
    on_nonfinite : str
        "raise", "skip" or "warn".
    misfit : callable
        Told of a weight whose geometry turned out not to fit, and the error.
    """

    def __init__(
        self, on_nonfinite: str, misfit: Callable[[Constrained, GeometryError], None]
    ) -> None:
        self.on_nonfinite, self._misfit = on_nonfinite, misfit

    def weights(
        self, due: Iterable[Constrained], step: int, *, certain: bool
    ) -> tuple[list[Record], Commit]:
        """Rules of stage "weights": (records, what writes the new weights)."""

        def update(c: Constrained) -> Any:
            rule, geometry = c.rule, c.geometry
            weight = c.location.parameter.detach()
            state = rule.init(weight, geometry, c.name) if c.state is None else c.state
            act = rule.enforce if certain else rule.update
            return act(weight, geometry, state, step=step, name=c.name)

        written, records = [], []
        for c in due:
            old = c.location.parameter.detach()
            new, state, record = self._one(c, old, step, update)
            written.append((c, old, new, state))
            records.append(record)

        def commit() -> None:
            for c, old, new, state in written:
                if new is not old:
                    c.location.parameter.copy_(new)
                c.state = state

        return records, commit

    def gradients(
        self, due: Iterable[Constrained], step: int, scale: torch.Tensor | None
    ) -> list[Record]:
        """Rules of stage "gradients": their terms are added, scaled like the loss."""
        records: list[Record] = []
        able = []
        for c in due:
            gradient = c.location.parameter.grad
            if gradient is None:
                records.append({"step": step, "name": c.name, "skipped": "no gradient"})
                continue
            if gradient.is_sparse:
                raise AdapterError(f"{c.name} has a sparse gradient, which a penalty would fill")
            able.append(c)
        ready = []
        for c, term, state, record in self._acted(able, step):
            if term is not None:
                ready.append((c, term, state))
            records.append(record)
        for c, term, state in ready:
            _add(c, term, state, step, scale)
            c.state = state
        return records

    def vectors(self, due: Sequence[Constrained], step: int) -> tuple[list[Record], list[Any]]:
        """Rules of stage "gradients" before a closure: (records, weights that are ready)."""
        records, ready = [], []
        for c, term, state, record in self._acted(due, step):
            if term is not None:
                ready.append((c, state))
            records.append(record)
        for c, state in ready:
            c.state = state
        return records, [c for c, _ in ready]

    def forward(self, due: Iterable[Constrained], step: int) -> tuple[list[Record], Commit]:
        """Rules of stage "forward": (records, what lets the vectors advance)."""
        records, ready = [], []
        for c, term, state, record in self._acted(list(due), step):
            if term is not None:
                ready.append((c, state))
            records.append(record)

        def commit() -> None:
            for c, state in ready:
                if c.in_use is not None:
                    c.in_use.geometry = _sized(c)
                    c.in_use.take(state, c.location.parameter)

        return records, commit

    def _acted(
        self, due: Sequence[Constrained], step: int
    ) -> Iterator[tuple[Constrained, torch.Tensor | None, Any, Record]]:
        """(weight, its term or None if skipped, new state, record)."""
        act = _update(step)
        for c in due:
            parameter, geometry = c.location.parameter, c.geometry
            if parameter.requires_grad and geometry is c.fitting:
                plain = c.stage != "gradients" or _in_place(c, geometry)
                fast = advanced(c, parameter, geometry, _state(c), step) if plain else None
                if fast is not None:
                    state, figures = fast
                    yield c, parameter, state, {"step": step, "name": c.name, **figures}
                    continue
            weight = parameter.detach()
            term, state, record = self._one(c, weight, step, act)
            yield c, None if "skipped" in record else term, state, record

    def _one(
        self, c: Constrained, weight: torch.Tensor, step: int, update: Update
    ) -> tuple[torch.Tensor, Any, Record]:
        """(the array that the rule gives, its state, a record); the weight itself if skipped."""
        record: Record = {"step": step, "name": c.name}
        reason = self._why_not(c, weight, step)
        if not reason:
            try:
                new, state, figures = update(c)
                if c.stage != "weights" and weight.device.type == "cpu":
                    # Where it costs no wait for a device; else the loss will tell.
                    _check_finite(figures)
                return new, state, record | figures
            except NonFiniteError:
                reason = self._not_finite(c, weight, step)
            except SpecopsError as error:
                raise type(error)(f"{c.name} at step {step}: {error}") from error
            except Exception as error:
                error.add_note(f"while {c.rule!r} acted on {c.name} at step {step}")
                raise
        return weight, c.state, record | {"skipped": reason}

    def _why_not(self, c: Constrained, weight: torch.Tensor, step: int) -> str:
        """A reason to leave a weight alone this time, or an error."""
        if not c.location.parameter.requires_grad:
            return "frozen (requires_grad=False)"
        if c.stage != "weights" and _needs_size(c):
            return "its layer has seen no input yet"
        if c.stage == "weights" and not _refuses_nan(c) and not _finite(weight):
            return self._not_finite(c, weight, step)
        geometry = c.geometry
        if geometry is c.fitting:
            return ""
        try:
            if isinstance(geometry, Conv):
                geometry.sizes(tuple(weight.shape))
            else:
                geometry.check(tuple(weight.shape))
            c.fitting = geometry
        except GeometryError as error:
            if not c.assignment.lenient:
                raise type(error)(f"{c.name} at step {step}: {error}") from error
            self._misfit(c, error)
            return str(error)
        return ""

    def _not_finite(self, c: Constrained, weight: torch.Tensor, step: int) -> str:
        message = (
            f"{c.name} holds NaN or infinity at step {step} (shape {tuple(weight.shape)}): "
            f"look for a diverged step or an overflow in half precision"
        )
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"{message}. The rules wrote to no weight at this step; "
                f'attach(..., on_nonfinite="warn") goes on without this one'
            )
        if self.on_nonfinite == "warn":
            warnings.warn(f"{message}; it was left as it is", NonFiniteWarning, stacklevel=2)
        return "not finite"


def check_ran(constrained: Sequence[Constrained]) -> None:
    """Raise if a weight is trained although its forward rule never saw a forward pass."""
    for c in constrained:
        if c.in_use is None or c.in_use.ran:
            continue
        gradient = c.location.parameter.grad
        if gradient is None or c.has_seen(gradient):
            continue
        if bool(gradient.any()):
            raise AdapterError(
                f"{c.name} has a gradient, but the forward of its layer was not called since "
                f"the last step: something else uses the weight, and {c.rule!r} did not act on "
                f'it. Exclude it with ("{c.name}", None), or constrain it after the step'
            )


def stepped(constrained: Sequence[Constrained]) -> None:
    """Remember the gradients that have been used, and wait for the next forward passes."""
    for c in constrained:
        if c.in_use is not None:
            c.see(c.location.parameter.grad)
            c.in_use.ran = False


def _update(step: int) -> Update:
    def update(c: Constrained) -> Any:
        weight, state, geometry = c.location.parameter.detach(), _state(c), _sized(c)
        if not state:
            state = c.rule.init(weight, geometry, c.name)
        if c.stage == "gradients" and _in_place(c, c.geometry):
            state, figures = c.rule.advance(weight, geometry, state, step=step, name=c.name)
            return weight, state, figures
        return c.rule.update(weight, geometry, state, step=step, name=c.name)

    return update


def _sized(c: Constrained) -> Geometry:
    """The geometry now, or the latest that had a size: circular layers may see several."""
    geometry = c.geometry
    if _has_size(geometry) or c.in_use is None:
        return geometry
    return c.in_use.geometry


def _has_size(geometry: Geometry) -> bool:
    return isinstance(geometry, Dense) or geometry.grid is not None


def _needs_size(c: Constrained) -> bool:
    return c.rule.needs_input_size() and not _has_size(_sized(c))


def _add(c: Constrained, term: torch.Tensor, state: Any, step: int, scale: Any) -> None:
    gradient = c.location.parameter.grad
    assert gradient is not None
    geometry = c.geometry
    if not _in_place(c, geometry):
        gradient.add_(term if scale is None else term * scale.to(term.device))
        return
    strength, follow = c.rule.strength_at(step, c.name, geometry), c.rule.tracked(geometry)
    on_host = gradient.is_cpu and (scale is None or scale.is_cpu)
    # A dyad for each block of rows, which the gradient takes in place.
    vectors = follow.directions(state)
    pairs = list(zip(vectors[::2], vectors[1::2], follow.measured(state), strict=True))
    parts = (gradient,) if len(pairs) == 1 else gradient.split([len(u) for u, _, _ in pairs])
    for part, (u, v, sigma) in zip(parts, pairs, strict=True):
        rows = part.view(u.shape[0], -1)
        if on_host:
            factor = float(strength) * sigma.item() * (1.0 if scale is None else scale.item())
            rows.addr_(u, v, alpha=factor)
        else:
            factor = strength * sigma
            rows.addr_(u * (factor if scale is None else factor * scale.to(u.device)), v)


def _in_place(c: Constrained, geometry: Geometry) -> bool:
    """Whether the term of a penalty need not be made: it is λσuvᴴ, and the vectors fit."""
    gradient = c.location.parameter.grad
    if gradient is None or gradient.dtype not in _PLAIN or not gradient.is_contiguous():
        return False
    return c.rule.formula == "penalty" and c.blocks(geometry) > 0


def _state(c: Constrained) -> dict[str, torch.Tensor]:
    if c.in_use is not None and c.in_use.forgotten:
        return {}
    return (c.state if c.in_use is None else c.in_use.state) or {}


def _refuses_nan(c: Constrained) -> bool:
    """Whether the rule itself refuses a weight of which any entry is not finite."""
    return bool(c.rule.refuses_nonfinite(c.geometry))


def _finite(weight: torch.Tensor) -> bool:
    # The sum is one pass; where it overflows, look closer.
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


def _check_finite(figures: dict[str, Any]) -> None:
    norm = figures.get("norm")
    if isinstance(norm, torch.Tensor) and norm.ndim:
        finite = bool(torch.isfinite(norm).all())
    else:
        finite = norm is None or math.isfinite(norm)
    if not finite:
        raise NonFiniteError("its norm is not finite")
