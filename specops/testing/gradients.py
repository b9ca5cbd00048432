"""Checks of rules that add to the gradients before the step."""

from __future__ import annotations

import numpy as np

from specops.geometry import Dense
from specops.rules import Monitor, SpectralNormPenalty
from specops.rules.base import measured_as
from specops.testing.base import SuiteBase, advanced, changed, listed
from specops.training.plan import Plan

_RULE = SpectralNormPenalty(10.0, norm="reshaped", iterations=50)


class GradientChecks(SuiteBase):
    """Rules of stage "gradients"."""

    def test_the_penalty_pulls_at_the_leading_direction(self) -> None:
        """One step differs from the plain one against ∂σ/∂W = uvᴴ, for the named weight only."""
        self.needs("gradients")
        start = self.start(self.model(), Monitor())
        initial, plain = start.weights(), self.plain(1).weights()
        for name in self.constrained(start):
            training = advanced(self.start(self.model(), Plan([(name, _RULE)])), 1)
            weights = training.weights()
            moved = changed(weights, plain)
            assert name in moved, (
                f"{name}: {_RULE!r} did not change the step. Likely cause: what update() returns "
                f"is not added to the gradient, or after the optimizer's step"
            )
            moved.pop(name)
            assert not moved, f"a penalty on {name!r} alone also changed {listed(moved)}"
            view = measured_as(training.geometries[name], "reshaped")
            assert isinstance(view, Dense)
            pull = -sum(
                float(np.sum(_leading(block) * step))
                for block, step in zip(
                    view.blocks(initial[name].astype(np.float64)),
                    view.blocks((weights[name] - plain[name]).astype(np.float64)),
                    strict=True,
                )
            )
            assert pull > 0, (
                f"{name}: the penalty moved the weight towards a larger norm. Likely cause: "
                f"what update() returns is subtracted from the gradient instead of added"
            )

    def test_the_penalty_acts_at_its_interval(self) -> None:
        """`every` holds for gradients as well."""
        self.needs("gradients")
        training = self.start(self.model(), Plan([("*", _RULE)], every=2))
        plain = self.plain()
        moved = changed(advanced(training, 1).weights(), advanced(plain, 1).weights())
        assert not moved, f"every=2, but the penalty changed {listed(moved)} at step 1"
        assert changed(advanced(training, 1).weights(), advanced(plain, 1).weights()), (
            "every=2, but the penalty did not act at step 2: the step that comes next is "
            "the one to ask plan.fires about"
        )


def _leading(matrices: np.ndarray) -> np.ndarray:
    """u₁v₁ᴴ of each matrix of a stack."""
    u, _, vh = np.linalg.svd(matrices, full_matrices=False)
    leading: np.ndarray = u[..., :, :1] @ vh[..., :1, :]
    return leading
