"""A firing of rules on weights of which every rank holds a part.

Rules with `by_products` are first tried by products with the weights, which are sums over the
ranks. A firing that needs a whole weight is done by the rank that owns it. All ranks decide and
fail together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from specops.errors import AdapterError, SpecopsError
from specops.geometry import Dense
from specops.training.firing import NOT_FINITE, Firing, NonFinitePolicy
from specops.training.outcome import Outcome
from specops_torch.collectives import about, highest
from specops_torch.constrained import Constrained
from specops_torch.owners import Found, shared
from specops_torch.products import multiplied
from specops_torch.replicated import check_sizes
from specops_torch.sharded import agree_on_sizes
from specops_torch.sharded_constrained import ShardedConstrained
from specops_torch.shared_constrained import SharedConstrained
from specops_torch.stale_statistics import relative_change

Measure = Callable[[Constrained], dict[str, Any]]
_DONE, _UNDONE, _FAILED = range(3)


class ShardedFiring(Firing[Constrained]):
    """Fires rules on weights, sharded ones included.

    Parameters
    ----------
    on_nonfinite : "raise", "skip" or "warn"
        What to do about a weight that holds NaN or infinity.
    wants_moves : callable
        Returns whether anybody needs to know how far weights were moved.
    """

    def __init__(self, on_nonfinite: NonFinitePolicy, wants_moves: Callable[[], bool]) -> None:
        super().__init__(on_nonfinite)
        self._wants_moves = wants_moves

    def compute(
        self, due: Iterable[Constrained], step: int, *, certain: bool = False
    ) -> list[Outcome[Constrained]]:
        """Let rules act, without writing anything; with `certain`, certified where they can."""
        due = list(due)
        sharded = [c for c in due if isinstance(c, SharedConstrained)]
        if not sharded:
            return super().compute(due, step, certain=certain)
        check_sizes(sharded)
        agree_on_sizes([c.location for c in sharded if _follows_size(c)])
        active = [c for c in sharded if not c.waits]
        rest = active if certain else _by_products(active, step)
        found = {c.name: o for c, o in zip(rest, self._owned(rest, step, certain), strict=True)}
        for c in due:
            if c.name not in found:
                (found[c.name],) = super().compute([c], step, certain=certain)
        return [found[c.name] for c in due]

    def _shape(self, c: Constrained, weight: Any) -> tuple[int, ...]:
        return tuple(c.location.parameter.shape)

    def _holds(self, c: Constrained, weight: Any) -> str:
        found = super()._holds(c, weight)
        is_known = found == NOT_FINITE or tuple(weight.shape) == self._shape(c, weight)
        return found if is_known else f"{NOT_FINITE}, or {found},"

    def _owned(
        self, due: Sequence[SharedConstrained], step: int, certain: bool
    ) -> list[Outcome[Constrained]]:
        def work(at: int) -> Found:
            c = due[at]
            (outcome,) = super(ShardedFiring, self).compute([c], step, certain=certain)
            value = outcome.array
            if c.stage == "forward" or value is outcome.weight:
                value = None
            moved = None
            if outcome.changes_weight and value is not None and self._wants_moves():
                moved = relative_change(outcome.weight, value)
            acted = outcome.array is not None
            told = (acted, value is not None, outcome.state, outcome.record, c.misfit, moved)
            return Found(value, told)

        if not due:
            return []
        results = shared(
            [c.location for c in due], work, values=[c.stage != "forward" for c in due]
        )
        return [_outcome(c, found) for c, found in zip(due, results, strict=True)]


def measured(constrained: Sequence[Constrained], measure: Measure) -> dict[str, dict[str, Any]]:
    """The measurements of each weight, by name; a sharded weight is measured by its owner."""
    sharded = [c for c in constrained if isinstance(c, ShardedConstrained)]
    agree_on_sizes([c.location for c in sharded])
    told = shared(
        [c.location for c in sharded],
        lambda at: Found(None, measure(sharded[at])),
        values=[False] * len(sharded),
    )
    found = {c.name: one.told for c, one in zip(sharded, told, strict=True)}
    return {c.name: found.get(c.name) or measure(c) for c in constrained}


def _follows_size(c: SharedConstrained) -> bool:
    """Whether its rule is about a convolution's operator, which depends on the input size."""
    return not isinstance(c.rule.view(c.geometry), Dense)


def _outcome(c: SharedConstrained, found: Found) -> Outcome[Constrained]:
    """This rank's part of what the owner found."""
    acted, changed, state, record, c.misfit, c.moved = found.told
    local = c.location.local
    array = (found.value if changed else local) if acted else None
    return Outcome(c, local, array, state, record)


def _by_products(due: Sequence[SharedConstrained], step: int) -> list[SharedConstrained]:
    """Advance the weights for which products suffice, and return the others.

    One collective for each round of products, and one in which the ranks agree.
    """
    by_group: dict[int, list[SharedConstrained]] = {}
    for c in due:
        by_group.setdefault(id(c.location.known.group), []).append(c)
    undone = [name for group in by_group.values() for name in _one_group(group, step)]
    return [c for c in due if c.name in undone]


def _one_group(due: Sequence[SharedConstrained], step: int) -> list[str]:
    """`_by_products` for the weights of one group of ranks; names of those that it leaves."""
    running = _begun(due, step)
    undone = [c.name for c in due if running[c.name] is None]
    tried = [c for c in due if running[c.name] is not None]
    if not tried:
        return undone
    errors = _run(tried, running)
    for c, verdict in zip(tried, _agreed(tried, errors, step), strict=True):
        if verdict == _UNDONE:
            c.advanced = None
            undone.append(c.name)
    return undone


def _begun(due: Sequence[SharedConstrained], step: int) -> dict[str, Any]:
    """What `steps_by_products` gives, by name; one more collective where rules have schedules,
    which may raise on some ranks only."""
    running: dict[str, Any] = {}
    errors: dict[str, Exception] = {}
    for c in due:
        try:
            running[c.name] = c.steps_by_products(step)
        except Exception as error:
            errors[c.name] = error
    if any(callable(value) for c in due for value in vars(c.rule).values()):
        _agreed(due, errors, step)
    for c in due:
        if c.name in errors:
            raise _named(c, errors, step)
    return running


def _agreed(due: Sequence[SharedConstrained], errors: dict[str, Exception], step: int) -> list[int]:
    """The worst end of each weight on any rank; raises on all of them if one has failed."""
    mine = [_FAILED if c.name in errors else _UNDONE if c.advanced is None else _DONE for c in due]
    layout = due[0].location.known
    with about([c.name for c in due]):
        agreed = highest(mine, layout.group, layout.device)
    if _FAILED in agreed:
        for c in due:
            c.advanced = None
        raise _named(due[agreed.index(_FAILED)], errors, step)
    return agreed


def _run(tried: Sequence[SharedConstrained], running: Mapping[str, Any]) -> dict[str, Exception]:
    """Run the generators together, by one collective for each round; the errors on this rank."""
    errors: dict[str, Exception] = {}
    asking: dict[str, tuple[SharedConstrained, Any, Any]] = {}

    def go_on(c: SharedConstrained, steps: Any, answer: Any) -> None:
        """Run the generator until it asks for the next products, or is done."""
        try:
            asking[c.name] = c, steps, steps.send(answer)
        except StopIteration as stopped:
            c.advanced = stopped.value
        except Exception as error:
            errors[c.name] = error

    for c in tried:
        go_on(c, running[c.name], None)
    while asking:
        round_, asked = list(asking.values()), [(c.location, w) for c, _, w in asking.values()]
        asking.clear()
        answers, failures = multiplied(asked)
        for (c, steps, _), answer, failure in zip(round_, answers, failures, strict=True):
            if failure is not None:
                errors.setdefault(c.name, failure)
            go_on(c, steps, answer)
    return errors


def _named(c: SharedConstrained, errors: dict[str, Exception], step: int) -> Exception:
    """The error for a weight that failed on some rank, in as much detail as this rank knows."""
    error = errors.get(c.name)
    if error is None:
        return AdapterError(f"{c.name} at step {step}: {c.rule!r} failed on another rank")
    if isinstance(error, SpecopsError):
        named = type(error)(f"{c.name} at step {step}: {error}")
        named.__cause__ = error
        return named
    error.add_note(f"while {c.rule!r} acted on {c.name} at step {step}")
    return error
