"""Checks that a resumed training continues exactly as the interrupted one would have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from specops.rules import ClipSpectralNorm, SpectralNormalization, SpectralNormPenalty
from specops.testing.base import BOUND, SuiteBase, advanced, changed, listed, relative
from specops.testing.cases import Training
from specops.training.plan import Plan

# Three is no multiple of the intervals, so that a lost counter shows. By then the vectors of
# forward rules are three steps old; those of a new start would be fresh, which shows, too.
_BEFORE, _AFTER = 3, 4
_RTOL = 1e-4
_RESUMED_ALIKE = 1e-5
_PLANS: Mapping[str, Plan] = {
    "weights": Plan([("*", ClipSpectralNorm(BOUND))], every=2),
    "gradients": Plan([("*", SpectralNormPenalty(0.5, norm="operator"))], every=2),
    "forward": Plan([("*", SpectralNormalization(norm="operator"))], every=5),
}


class CheckpointChecks(SuiteBase):
    """Saving and going on, and restoring into a fresh start and going on, must give the same."""

    @pytest.mark.parametrize("stage", list(_PLANS))
    def test_a_resumed_training_is_the_same(self, stage: Any) -> None:
        """Weights and firings of the steps after the checkpoint agree."""
        if not self.capabilities.checkpoints:
            pytest.skip("the adapter does not claim checkpoints")
        self.needs(stage)
        training = advanced(self.start(self.model(), _PLANS[stage]), _BEFORE)
        saved, at_save, outputs = training.save(), training.weights(), training.outputs()
        advanced(training, _AFTER)
        resumed = self.start(self.model(), _PLANS[stage])
        resumed.restore(saved)
        moved = changed(resumed.weights(), at_save, _RTOL)
        assert not moved, (
            f"right after restore() {listed(moved)} are not as they were saved (relative "
            f"change). Likely cause: save() returned references that later steps changed"
        )
        apart = relative(resumed.outputs(), outputs)
        assert apart <= _RESUMED_ALIKE, (
            f"right after restore() outputs differ by {apart:.3g} (relative) from those at save(), "
            f"though the weights are the same. Likely cause: the rule's state (the vectors of a "
            f"forward rule) is not in the checkpoint"
        )
        advanced(resumed, _AFTER)
        expected, got = _firings(training), _firings(resumed)
        assert got == expected, (
            f"saved after step {_BEFORE}: from then on the uninterrupted training fired at steps "
            f"{expected}, the resumed one at {got}. Likely cause: the count of steps is not in "
            f"the checkpoint"
        )
        moved = changed(resumed.weights(), training.weights(), _RTOL)
        assert not moved, (
            f"{_AFTER} steps after restoring, {listed(moved)} differ from the uninterrupted "
            f"training (relative change). Likely cause: the rule's state, the count of steps or "
            f"the optimizer's state is not in the checkpoint"
        )

    def test_input_sizes_are_in_the_checkpoint(self) -> None:
        """Before its first forward pass a resumed training knows what the other had seen."""
        if not self.capabilities.checkpoints:
            pytest.skip("the adapter does not claim checkpoints")
        self.needs("weights")
        training = advanced(self.start(self.model(), _PLANS["weights"]), 1)
        resumed = self.start(self.model(), _PLANS["weights"])
        resumed.restore(training.save())
        known, found = dict(training.geometries), dict(resumed.geometries)
        assert found == known, (
            f"right after restore() the geometries are {found}, those of the saved training "
            f"{known}. Likely cause: Parameter.sizes() and see() do not carry what was learnt"
        )


def _firings(training: Training) -> list[int]:
    """Steps after the checkpoint that have records."""
    return sorted({r["step"] for r in training.history() if r["step"] > _BEFORE})
