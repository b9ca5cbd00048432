"""`attach`: a plan that acts on a dict of arrays at every step of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from specops.errors import AdapterError, GeometryError
from specops.geometry import Geometry
from specops.training.assigned import check_saved
from specops.training.history import History
from specops.training.plan import Assignment, Plan, Weight, override_geometries
from specops.training.report import Report, plan_rows
from specops.typing import Array
from specops_cupy.arrays import check_library, describe, flatten, rebuild
from specops_cupy.assigning import assign, matched
from specops_cupy.constrained import Constrained
from specops_cupy.firing import (
    Firing,
    Record,
    add_terms,
    check_writeable,
    keep_states,
    write_weights,
)

NonFinitePolicy = Literal["raise", "skip", "warn"]


class Attachment:
    """A plan at work on a dict of arrays. Made by `attach`; see there.

    Attributes
    ----------
    steps : int
        Calls of `step` since attaching (or since the state that was loaded).
    """

    def __init__(
        self,
        optimizer: None,
        model: Mapping[str, Any],
        plan: Plan,
        geometries: Mapping[str, Geometry] | None = None,
        *,
        on_nonfinite: NonFinitePolicy = "raise",
        history: int = 10_000,
        log: Any = None,
    ) -> None:
        if on_nonfinite not in ("raise", "skip", "warn"):
            raise ValueError(
                f'on_nonfinite must be "raise", "skip" or "warn", got {on_nonfinite!r}'
            )
        if optimizer is not None:
            raise AdapterError(
                f"arrays have no optimizer whose steps could be followed, got "
                f"{type(optimizer).__name__}: pass None, and call attachment.step() after each "
                f"update of the arrays"
            )
        self.plan = plan
        self.steps = 0
        self._firing = Firing(on_nonfinite, self._misfit)
        self._history = History(history)
        if log is not None:
            self._history.tell(log)
        self._model: Mapping[str, Any] | None = model
        self._geometries = dict(geometries or {})
        self._described: list[Weight] = []
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._assignments: list[Assignment] = []
        self._constrained: list[Constrained] = []
        self._look()

    def __repr__(self) -> str:
        status = "attached" if self.is_attached else "detached"
        return f"<Attachment: {len(self._constrained)} arrays, step {self.steps}, {status}>"

    @property
    def is_attached(self) -> bool:
        """Whether `detach` was not called yet."""
        return self._model is not None

    @property
    def history(self) -> list[Record]:
        """The latest firings, oldest first: step, name and the rule's figures as floats."""
        return self._history.records()

    def log_to(self, listener: Any) -> None:
        """Hand each firing's figures to a callable or a TensorBoard ``SummaryWriter``.

        Figures then leave their device at every firing.
        """
        self._history.tell(listener)

    def before_step(self, gradients: Mapping[str, Any]) -> None:
        """Let rules of stage "gradients" add to gradients in place, before an update.

        Parameters
        ----------
        gradients : dict of arrays
            By the names of the arrays, nested as they are or joined by dots. Arrays without a
            gradient are left out.

        Raises
        ------
        AdapterError
            A gradient of no array, of another shape, or read-only; all are left as they were.
        NonFiniteError
            As `step`.
        """
        self._look()
        step = self.steps + 1
        given = matched(gradients, self._of("gradients"), self._described, self._aliases)
        due = [c for c in self._of("gradients") if self.plan.fires(step, c.assignment.every)]
        without = [c.name for c in due if c.name not in given]
        outcomes = self._firing.compute([c for c in due if c.name in given], step)
        add_terms(outcomes, given)
        for name in without:
            self._history.add({"step": step, "name": name, "skipped": "no gradient"})
        self._record(outcomes)

    def step(self) -> None:
        """Count one update of the arrays and let the rules that are due act.

        Rules of stage "weights" write into the arrays; the vectors of forward rules advance.
        All is computed before the first array is written, so an error leaves every array as it
        was.

        Raises
        ------
        NonFiniteError
            An array holds NaN or infinity, and the policy is to raise.
        AdapterError
            Detached, or an array that can not be written to.
        """
        self._look()
        self.steps += 1
        step = self.steps
        for c in self._of("forward"):
            c.drifting = True
        weights = [c for c in self._of("weights") if self.plan.fires(step, c.assignment.every)]
        # A forward rule acts in every forward pass, so its vectors never stop.
        vectors = [
            c for c in self._of("forward") if (step - self.plan.start) % c.assignment.every == 0
        ]
        written = self._firing.compute(weights, step)
        advanced = self._firing.compute(vectors, step)
        write_weights(written)
        keep_states(advanced)
        self._record([*written, *advanced])

    def enforce(self) -> None:
        """Let every rule on weights act now, certified: after the last step, before an export."""
        self._look()
        outcomes = self._firing.compute(self._of("weights"), max(self.steps, 1), certain=True)
        write_weights(outcomes)
        self._record(outcomes)

    def normalized(self) -> dict[str, Any]:
        """The arrays that a forward pass is to use, in a dict like the model.

        Those under a forward rule are new arrays; all others are the model's own, not copies.
        Calling it changes neither arrays nor vectors, which advance in `step`; an array that
        was written to from outside (a checkpoint, an average) is measured anew.
        """
        model = self._look()
        replaced: dict[str, Array] = {}
        for c in self._of("forward"):
            used = c.used(self.steps + 1)
            replaced |= dict.fromkeys((c.name, *self._aliases.get(c.name, ())), used)
        return rebuild(model, replaced)

    def report(self, *, measure: bool = True) -> Report:
        """Every entry of the dict: constrained by what, or left alone and why.

        With `measure`, constrained arrays show their operator norm as it is now (of forward
        rules: of the array in use): exact for matrices and circular convolutions, a certified
        upper bound for zero-padded ones. After `detach`, nothing is measured.
        """
        current = {}
        if self.is_attached:
            self._look()
            current = {c.name: c for c in self._constrained}
        rows = []
        for row in plan_rows(self._assignments):
            constrained = current.get(row.name)
            if constrained is not None and measure and row.rule:
                row = replace(row, **constrained.norm(self.steps + 1))
            rows.append(row)
        return Report(tuple(rows))

    def state_dict(self) -> dict[str, Any]:
        """Steps and rule states by name: what a resumed run needs beside the arrays."""
        self._look()
        return {
            "version": 1,
            "steps": self.steps,
            "weights": {c.name: c.state_dict() for c in self._constrained},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; names must be those constrained here.

        Restore the arrays first. States that went through the host (``numpy.savez``) go back to
        the device of their array.

        Raises
        ------
        AdapterError
            Another version, other names, or vectors of other shapes; nothing is changed then.
        """
        self._look()
        check_saved(state, [c.name for c in self._constrained])
        for c in self._constrained:
            c.check_state(state["weights"][c.name])
        self.steps = int(state["steps"])
        for c in self._constrained:
            c.load_state_dict(state["weights"][c.name])

    def detach(self, *, fold: bool = False) -> None:
        """Stop acting and let go of the arrays.

        Parameters
        ----------
        fold : bool
            Write the arrays that forward rules let a forward pass use into the dict's: they
            then compute the same without specops. Otherwise all arrays stay as they are.
        """
        if fold:
            self._look()
            used = [(c, c.used(self.steps + 1)) for c in self._of("forward")]
            for c, _ in used:
                check_writeable(c.name, c.array)
            for c, array in used:
                c.array[...] = array
        self._model = None
        self._constrained = []
        self._described = []

    def _look(self) -> Mapping[str, Any]:
        """The dict as it is now: its arrays may have been replaced, added or taken away."""
        model = self._model
        if model is None:
            raise AdapterError("this attachment is detached and does nothing: attach again")
        leaves = flatten(model)
        check_library(leaves)
        described, aliases = describe(leaves)
        if described != self._described:
            weights = override_geometries(described, self._geometries, aliases=aliases)
            before = {c.name: c for c in self._constrained}
            decided = assign(self.plan, weights, leaves, before)
            self._assignments, self._constrained = decided
            self._described, self._aliases = described, aliases
        for c in self._constrained:
            c.array = leaves[c.name]
        return model

    def _of(self, stage: str) -> list[Constrained]:
        return [c for c in self._constrained if c.stage == stage]

    def _record(self, outcomes: Any) -> None:
        for outcome in outcomes:
            self._history.add(outcome.record)

    def _misfit(self, c: Constrained, error: GeometryError) -> None:
        """The rule has no method for this geometry: "*" skips."""
        for index, assignment in enumerate(self._assignments):
            if assignment.weight.name == c.name:
                self._assignments[index] = replace(assignment, rule=None, reason=str(error))


def attach(
    optimizer: None,
    model: Mapping[str, Any],
    rule_or_plan: Any,
    *,
    every: int | None = None,
    geometries: Mapping[str, Geometry] | None = None,
    on_nonfinite: NonFinitePolicy = "raise",
    history: int = 10_000,
    log: Callable[[Record], Any] | Any = None,
) -> Attachment:
    """Make a rule, or a plan, act on a dict of arrays in a training loop.

    Rules of stage "weights" act in `Attachment.step`, those of stage "gradients" in
    `Attachment.before_step`; forward rules give the arrays of `Attachment.normalized`.

    Parameters
    ----------
    optimizer : None
        There is none to follow: call ``attachment.step()`` after each update yourself.
    model : dict of arrays, possibly nested
        Names are keys joined by dots. Arrays of CuPy, or of another library that can be
        written to in place, as NumPy's; all of one library. The dict is looked at anew in each
        call, so an array may be updated in place or replaced by another of its shape.
    rule_or_plan, every
        As `specops.attach`.
    geometries : dict of str to Dense or Conv
        Which map each array is, by patterns of names. It is never guessed: what is not named
        here is left alone, or an error where the plan names it.
    on_nonfinite : "raise", "skip" or "warn"
        What to do about an array that holds NaN or infinity. It is left as it was in any case;
        "raise" leaves all others as they were, too.
    history : int
        Records kept.
    log : callable or SummaryWriter, optional
        As `Attachment.log_to`.

    Returns
    -------
    Attachment
        Which holds the only state.

    Raises
    ------
    AdapterError
        An optimizer, no dict of arrays, arrays of several libraries, a trainable scale.
    PlanError, GeometryError
        A plan or geometries that do not fit.

    Notes
    -----
    Work is queued on the stream that is CuPy's current one and on each array's own device. A
    firing waits for the device at least once for each array, to see that it is finite.
    Gradients through `Attachment.normalized` are the caller's affair, and trainable scales,
    which need them, are refused.

    Examples
    --------
    >>> import numpy
    >>> import specops
    >>> model = {"layer": {"w": numpy.diag([4.0, 1.0]), "b": numpy.zeros(2)}}
    >>> rule, maps = specops.ClipSpectralNorm(2.0), {"layer.w": specops.Dense()}
    >>> attachment = attach(None, model, rule, geometries=maps)
    >>> attachment.step()
    >>> model["layer"]["w"].round(6)
    array([[2., 0.],
           [0., 1.]])
    """
    return Attachment(
        optimizer,
        model,
        Plan.of(rule_or_plan, every),
        geometries,
        on_nonfinite=on_nonfinite,
        history=history,
        log=log,
    )
