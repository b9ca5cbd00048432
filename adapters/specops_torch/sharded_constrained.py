"""One sharded weight under a rule."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.geometry import Geometry
from specops.tracking import TrackedBlocks
from specops.training.plan import Assignment
from specops_torch.constrained import Constrained
from specops_torch.fast_paths import DTYPES
from specops_torch.location import Location
from specops_torch.products import outer
from specops_torch.replicated import ReplicatedLocation, settle_replicas
from specops_torch.sharded import ShardedLocation, settle
from specops_torch.shared_constrained import SharedConstrained


def constrained_at(location: Location, assignment: Assignment) -> Constrained:
    """The object that keeps a weight; for replicas only rules on weights are worth sharing."""
    if isinstance(location, ShardedLocation):
        return ShardedConstrained(location, assignment)
    stage = None if assignment.rule is None else assignment.rule.stage
    if stage == "weights" and isinstance(location, ReplicatedLocation):
        return SharedConstrained(location, assignment)
    return Constrained(location, assignment)


def settle_all(constrained: Sequence[Constrained], groups: dict[Any, Any], replicas: Any) -> None:
    """Learn which part of each new weight every rank holds; all ranks have to call this."""
    settle(constrained, groups)
    settle_replicas([c for c in constrained if isinstance(c, SharedConstrained)], replicas)


class ShardedConstrained(SharedConstrained):
    """A weight that no rank holds as a whole, except while it owns it.

    Layers under a forward rule find their states in the first forward pass, which gathers the
    weight anyway.
    """

    @property
    def location(self) -> ShardedLocation:
        """Where the weight is."""
        assert isinstance(self.parameter, ShardedLocation)
        return self.parameter

    def resume(self, parameter: Any, assignment: Assignment) -> None:
        """Go on; if another tensor is in its place, measure it in its next forward pass."""
        super().resume(parameter, assignment)
        self.location.held = parameter.held
        if self.in_use is not None and self.in_use.is_replaced(parameter.held):
            self.in_use.wait_for(parameter.held)
            self._watch_gradient()

    def refuse_sharded(self, model: nn.Module) -> None:
        """Nothing to refuse: it was sharded from the beginning."""

    def steps_by_products(self, step: int) -> Any:
        """As before, but for penalties only if each rank can make its term from the vectors."""
        if self.in_use is not None and self.in_use.forgotten:
            return None
        if self.stage == "gradients" and not self.adds_in_place(self.geometry):
            return None
        return super().steps_by_products(step)

    def adds_in_place(self, geometry: Geometry) -> bool:
        """Whether each rank makes its part of a penalty's term from the vectors."""
        if self.location.whole is not None:
            return False
        gradient, follow = self.location.parameter.grad, self.rule.tracked(geometry)
        if gradient is None or gradient.dtype not in DTYPES:
            return False
        return self.rule.formula == "penalty" and isinstance(follow, TrackedBlocks)

    def add_term(self, step: int, term: Any, state: Any, scale: torch.Tensor | None) -> None:
        """Add `term`, this rank's part, to the gradient; None: make the term from the vectors."""
        parameter: Any = self.location.parameter
        gradient = parameter.grad
        if gradient.placements != parameter.placements:
            # The gradient of a replicated weight may be a partial sum on each rank.
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        own: torch.Tensor = gradient.to_local()
        if term is None:
            geometry, follow = self.geometry, self.rule.tracked(self.geometry)
            assert isinstance(follow, TrackedBlocks)
            strength = self.gradient_rule.strength_at(step, self.name, geometry)
            factors = [strength * sigma for sigma in follow.measured(state)]
            term = outer(self.location, follow.geometry, follow.directions(state), factors)
        own.add_((term if scale is None else term * scale.to(term.device)).to(own.dtype))

    def prepare(self) -> None:
        """Let every layer that holds the weight use the one that the rule gives.

        Raises
        ------
        AdapterError
            Layers see only a part of the weight in forward passes, too.
        """
        self._refuse_parts()
        in_use = self.make_in_use()
        in_use.wait_for(self.location.parameter)
        self.read_through(in_use)
        self._watch_gradient()

    def used(self, step: int = 1) -> torch.Tensor:
        """The weight as its layers use it; under a forward rule it is gathered, by a collective."""
        x = self.location
        if self.in_use is None or not self.answering:
            return x.read() if x.whole is not None else x.parameter
        return self.in_use.of_whole(x.gathered() if x.whole is None else x.whole)

    def _watch_gradient(self) -> None:
        """Note when `fully_shard` has reduced the gradient: before that it shows none."""
        in_use = self.in_use
        if in_use is None or self.forward_rule.trained_scale() is None:
            return

        # A weak reference: torch keeps hooks where the garbage collector cannot see the cycle.
        known = weakref.ref(in_use)

        def reduced(_: Any) -> None:
            held = known()
            if held is not None:
                held.reduced = True

        hook = self.location.parameter.register_post_accumulate_grad_hook(reduced)
        self.handles.append(hook)

    def _refuse_parts(self) -> None:
        x = self.location
        kinds = [type(p).__name__ for p in x.held.placements]
        if kinds in (["Shard"], ["Replicate", "Shard"]) and x.is_brought_together:
            return
        raise AdapterError(
            f"it is sharded during forward passes too (placements "
            f"{x.held.placements}), and {self.rule!r} needs the whole there: use a rule on "
            f"weights or gradients for it (ClipSpectralNorm, SpectralNormPenalty), exclude it "
            f'with ("{self.name}", None), or shard it by fully_shard alone'
        )
