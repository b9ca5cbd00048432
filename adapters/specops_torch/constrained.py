"""One weight of a torch model under a rule: the layers that use it, and how the rule acts."""

from __future__ import annotations

import cmath
import math
import weakref
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError, NonFiniteError
from specops.geometry import Geometry
from specops.training import constrained as training
from specops.training.outcome import Outcome
from specops.training.plan import Assignment
from specops.training.report import measured
from specops_torch.batch_norms import norm_with
from specops_torch.fast_paths import DTYPES, advanced
from specops_torch.fused import row_blocks
from specops_torch.in_use import InUse
from specops_torch.location import Location
from specops_torch.reading import answer_plainly, read_through
from specops_torch.sharded import is_fully_sharded
from specops_torch.sizes import FirstSize
from specops_torch.unrecognised import refuse_sharded
from specops_torch.writes import written


class Constrained(training.Constrained[Location]):
    """One weight under a rule.

    Attributes
    ----------
    in_use : InUse or None
        The weight in use of a forward rule, which then holds the rule's state; else None.
    steps : int
        Steps of this parameter alone, if it has an optimizer that steps during backward.
    answering : list of (module, str)
        Modules whose attribute gives the weight in use, and the attribute's name in each.
    """

    def __init__(self, location: Location, assignment: Assignment) -> None:
        self.in_use: InUse | None = None
        super().__init__(location, assignment)
        self.steps = 0
        self.handles: list[Any] = []
        self.answering: list[tuple[nn.Module, str]] = []
        self._seen: tuple[Any, int] | None = None
        self._since: tuple[int, int] | None = None
        self._fitting: Geometry | None = None
        self._blocks: tuple[Geometry, int] | None = None
        self._whole: Any = location.parameter

    @property
    def location(self) -> Location:
        """Where the weight is."""
        return self.parameter

    @property
    def state(self) -> dict[str, torch.Tensor] | None:
        """The rule's state."""
        return self._state if self.in_use is None else self.in_use.state

    @state.setter
    def state(self, value: dict[str, torch.Tensor] | None) -> None:
        self._state = value

    @property
    def sized(self) -> Geometry:
        """The geometry now, or the latest with a size: circular layers may have seen several."""
        geometry = self.geometry
        if self.in_use is None or geometry.has_size:
            return geometry
        return self.in_use.geometry

    @property
    def has_size(self) -> bool:
        """Whether the operator is one matrix, and not one for each size of an input."""
        return self.sized.has_size

    def is_of(self, parameter: Location, assignment: Assignment) -> bool:
        """Whether the parameter is still this weight, of the same module and map."""
        same = assignment.weight.geometry == self.assignment.weight.geometry
        # When layers move and their names change, the user's map may no longer be declared for it.
        learns = parameter.learns_size and self.location.learns_size
        if self.location.module is not parameter.module or not (same or learns):
            return False
        # Weights may have been tied since, or may be no longer.
        return self.in_use is None or set(self.answering) == set(parameter.holders())

    def resume(self, parameter: Location, assignment: Assignment) -> None:
        """Go on with the parameter as it is listed now; hooks stay."""
        self.assignment = assignment
        self.location.share(parameter.others, parameter.aliases)
        self.rename(self.name)

    def rename(self, name: str) -> None:
        """Go by another name, after layers were inserted or taken out."""
        super().rename(name)
        self.location.weight = replace(self.location.weight, name=name)
        if self.in_use is not None:
            self.in_use.name = name

    def let_go(self) -> None:
        """Release the layers that hold another weight by now, and keep the others."""
        assert self.in_use is not None
        held = set(self.location.holders())
        for place in set(self.answering) - held:
            answer_plainly(*place, self.in_use)
        self.answering = [place for place in self.answering if place in held]
        for place in self.answering:
            read_through(*place, self.in_use)

    def release(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for module, attribute in self.answering:
            assert self.in_use is not None
            answer_plainly(module, attribute, self.in_use)
        self.answering.clear()
        super().release()

    def refuse_sharded(self, model: nn.Module) -> None:
        """Raise if the parameter was sharded after attaching, so that it is a part of a matrix."""
        parameter = self.location.parameter
        if parameter is self._whole:
            return
        refuse_sharded(self.name, parameter)
        if any(map(is_fully_sharded, model.modules())):
            # Outside forward passes `fully_shard` may have gathered it: it looks whole then.
            raise AdapterError(
                f"{self.name} is sharded (fully_shard) since it was attached: shard first, then "
                f"make the optimizer, then attach"
            )
        self._whole = parameter

    # Firing

    def why_not(self, weight: torch.Tensor) -> str:
        """A reason to leave the weight alone this time, or ""; raises if it is not finite."""
        reason = self.location.frozen()
        if reason:
            return reason
        geometry = self.geometry
        known = geometry is self._fitting
        if not known and self.needs_size:
            return training.UNSEEN
        if (
            self.stage == "weights"
            and not self.weight_rule.refuses_nonfinite(geometry)
            and not _finite(weight)
        ):
            raise NonFiniteError
        if not known:
            geometry.check(self.location.parameter.shape)
            self._fitting = geometry
        return ""

    def act(self, weight: torch.Tensor, step: int, *, certain: bool) -> Any:
        """What the rule gives: (array, new state, figures)."""
        if self.stage == "weights":
            return super().act(weight, step, certain=certain)
        if self.in_use is not None and not self.in_use.sharded:
            self._since = written(self.location.parameter)
        geometry, rule = self.geometry, self.rule
        forgotten = self.in_use is not None and self.in_use.forgotten
        state = (None if forgotten else self.state) or {}
        vectors = self.stage == "forward" or self.adds_in_place(geometry)
        if vectors and self.count_blocks(geometry) == 1:
            fast = advanced(rule, self.name, weight, geometry, state, step)
            if fast is not None:
                return weight, *fast
        geometry = self.sized
        if not state:
            state = rule.init(weight, geometry, self.name)
        if vectors and self.stage == "gradients":
            advance = self.gradient_rule.advance
            state, figures = advance(weight, geometry, state, step=step, name=self.name)
            term = weight
        else:
            term, state, figures = rule.update(weight, geometry, state, step=step, name=self.name)
        return term, state, self.checked(figures) if weight.is_cpu else figures

    def checked(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The figures; raises if they are not finite. Called where that needs no device sync."""
        _check_finite(figures)
        return figures

    def keep(self, outcome: Outcome[Any]) -> None:
        """Store what a firing gave."""
        if self.in_use is None:
            super().keep(outcome)
        elif outcome.array is not None:
            self.in_use.geometry = self.sized
            self.in_use.take(outcome.state, self.location.parameter, self._since)

    def adds_in_place(self, geometry: Geometry) -> bool:
        """Whether a penalty's term λσuvᴴ can be added to the gradient in place, from vectors."""
        gradient = self.location.parameter.grad
        if gradient is None or gradient.dtype not in DTYPES or not gradient.is_contiguous():
            return False
        return self.rule.formula == "penalty" and self.count_blocks(geometry) > 0

    def count_blocks(self, geometry: Geometry) -> int:
        """`row_blocks` of the tracked norm."""
        if self._blocks is None or self._blocks[0] is not geometry:
            self._blocks = geometry, row_blocks(self.rule.tracked(geometry))
        return self._blocks[1]

    def see(self, gradient: torch.Tensor | None) -> None:
        """Remember which gradient the latest step had."""
        self._seen = None if gradient is None else (weakref.ref(gradient), gradient._version)

    def has_seen(self, gradient: torch.Tensor) -> bool:
        """Whether the latest step had this gradient, unchanged since.

        A weak reference tells, for a new gradient may have the address of the old one.
        """
        return (
            self._seen is not None
            and self._seen[0]() is gradient
            and self._seen[1] == gradient._version
        )

    # The weight in use

    def prepare(self) -> None:
        """Let every layer that holds the weight use the one that the rule gives."""
        in_use = self.make_in_use()
        # The norm of a convolution's operator needs the size of its first input.
        if not self.needs_size:
            # If the weight is not finite, its first step reports it by the user's policy.
            in_use.measure(self.location.parameter)
        self.read_through(in_use)

    def make_in_use(self) -> InUse:
        """A new weight in use, not measured yet."""
        location = self.location
        lenient = self.assignment.lenient
        self.in_use = InUse(self.rule, self.name, self.geometry, location.recorder, lenient=lenient)
        return self.in_use

    def read_through(self, in_use: InUse) -> None:
        """Let every layer that holds the weight answer with the one in use."""
        location = self.location
        for holder, attribute in location.holders():
            if getattr(holder, "sparse", False) is True:
                raise AdapterError(
                    f"{type(holder).__name__}(sparse=True) has sparse gradients, and a weight that "
                    f"is computed has none: take sparse=False, or a rule after the step"
                )
            read_through(holder, attribute, in_use)
            self.answering.append((holder, attribute))
            if location.recorder is not None and self.rule.needs_input_size():
                self.handles.append(
                    holder.register_forward_pre_hook(FirstSize(in_use), with_kwargs=True)
                )
        # Gradients that exist already do not come from layers under the rule.
        self.see(location.parameter.grad)

    def used(self, step: int = 1) -> torch.Tensor:
        """The weight as its layers use it."""
        raw = self.location.parameter
        if self.in_use is None or not self.answering:
            return raw
        used = self.in_use(raw)
        # A plain tensor: writing to it does not reach the parameter.
        return used if used is raw else used.as_subclass(torch.Tensor)

    def schedule(self, step: int) -> None:
        """Set schedules to their values at the next step, as tensors to avoid recompilation."""
        if self.in_use is None:
            return
        if not self.rule.formula:
            # Without a formula `apply` may depend on the step.
            self.in_use.overrides["step"] = step
        if not self.rule.is_scheduled():
            return
        try:
            arguments = self.forward_rule.arguments(step, self.name, self.geometry)
        except Exception as error:
            error.add_note(f"while {self.rule!r} was scheduled for {self.name} at step {step}")
            raise
        for key, value in arguments.items():
            if key != "step":
                parameter = self.location.parameter
                dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                value = torch.tensor(float(value), dtype=dtype, device=parameter.device)
            self.in_use.overrides[key] = value

    def norm(self, following: Collection[torch.Tensor]) -> dict[str, Any]:
        """What a report says about it, alone and with batch normalisation that follows it."""
        if self.in_use is not None and self.needs_size:
            return {}  # the weight that its layer will use depends on the size
        with torch.no_grad():
            w, geometry = self.used().detach(), self.geometry
        found = measured(w, geometry, self.rule)
        if following and found["norm_is"] != "not finite":
            found["normalized"] = norm_with(self.location.module, w, geometry, following)
        return found

    def note_norms(self) -> None:
        """Nothing: the weight in use sees writes by itself."""

    def _is_written_to(self, w: torch.Tensor) -> bool:
        """False, for the same reason."""
        return False

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the sizes seen."""
        in_use = self.in_use
        drifting = in_use is not None and in_use.has_drifted(self.location.parameter)
        return super().state_dict() | {"steps": self.steps, "drifting": drifting}

    def load_state_dict(self, saved: Any) -> None:
        """Restore `state_dict`."""
        super().load_state_dict(saved)
        self.steps = int(saved.get("steps", 0))
        if self.in_use is not None:
            state, self._state = self._state, None
            self.in_use.geometry = self.geometry
            self.in_use.load(state, self.location.parameter, drifting=self.drifting)


def _finite(weight: torch.Tensor) -> bool:
    if weight.dtype == torch.complex32:  # torch has no sum for it
        weight = torch.view_as_real(weight)
    # The sum takes one pass; if it overflows, all entries are looked at.
    return cmath.isfinite(weight.sum().item()) or bool(torch.isfinite(weight).all())


def _check_finite(figures: dict[str, Any]) -> None:
    norm = figures.get("norm")
    if isinstance(norm, torch.Tensor) and norm.ndim:
        finite = bool(torch.isfinite(norm).all())
    else:
        finite = norm is None or math.isfinite(norm)
    if not finite:
        raise NonFiniteError("its norm is not finite")
