"""Checks of rules that act in the forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from specops.geometry import Dense, Geometry
from specops.rules import Monitor, SpectralNormalization
from specops.rules.base import measured_as
from specops.testing.base import SuiteBase, advanced, changed, listed, norm_of, relative
from specops.training.plan import Plan

_SCALE = 0.5
_RULE = SpectralNormalization(norm="operator", scale=_SCALE, iterations=20)
_RESHAPED = SpectralNormalization(norm="reshaped", scale=_SCALE, iterations=20)
_STEPS = 3
_RTOL = 0.02
_GRADIENT_RTOL = 2e-3


class ForwardChecks(SuiteBase):
    """Rules of stage "forward": the layer uses another weight, the optimizer trains the raw one."""

    def test_a_forward_pass_changes_nothing(self) -> None:
        """Two passes give the same output, and training goes on as if there had been none."""
        self.needs("forward")
        # With one power step per update vectors have not converged, so that extra ones show.
        rule = SpectralNormalization(norm="operator", scale=_SCALE, iterations=1)
        training, quiet = (advanced(self.start(self.model(), rule), _STEPS) for _ in range(2))
        before = training.weights()
        first, second = training.outputs(), training.outputs()
        assert np.array_equal(first, second), (
            f"two forward passes on the same batch differ by {relative(first, second):.3g} "
            f"(relative). Likely cause: vectors advance in the forward pass; they may only in "
            f"update(), once per optimizer step"
        )
        moved = changed(training.weights(), before, 0.0)
        assert not moved, (
            f"a forward pass changed the raw weights {listed(moved)} (relative change): the "
            f"normalised weight is to be used, not stored"
        )
        moved = changed(advanced(training, 2).weights(), advanced(quiet, 2).weights())
        assert not moved, (
            f"two extra forward passes changed the steps that followed: {listed(moved)} "
            f"(relative change). Likely cause: the rule's state is touched in the forward pass"
        )

    def test_the_weight_in_use_has_the_norm_asked_for(self) -> None:
        """Outputs are those of a plain model with weights s·W/‖W‖."""
        self.needs("forward")
        training = advanced(self.start(self.model(), _RULE), _STEPS)
        geometries, weights = training.geometries, training.weights()
        used = {name: _normalised(weights[name], g) for name, g in geometries.items()}
        expected = self.outputs_with(weights | used)
        got = training.outputs()
        raw = relative(self.outputs_with(weights), got)
        assert relative(got, expected) <= _RTOL, (
            f"outputs differ by {relative(got, expected):.3g} (relative) from those of weights of "
            f"norm {_SCALE}. Likely cause: "
            + (
                "the layers use the raw weights"
                if raw <= _RTOL
                else "the norm is not the operator's, the vectors do not advance, or the scale "
                "is not in effect"
            )
        )

    def test_the_gradient_is_that_of_the_weight_in_use(self) -> None:
        """A step moves the raw weight along (s/σ)·(G − ⟨G, W/σ⟩ uvᴴ).

        G is the gradient of a plain model whose weights are those in use. Both models take one step
        of gradient descent.
        """
        self.needs("forward")
        if not self.capabilities.differentiates:
            pytest.skip("users of the framework write their gradients")
        training = self.start(self.model(), _RESHAPED)
        before = training.weights()
        after = advanced(training, 1).weights()
        views = {
            name: view
            for name, g in training.geometries.items()
            if isinstance(view := measured_as(g, "reshaped"), Dense)
        }
        plain = self.plain()
        for name, view in views.items():
            plain.set_weight(name, _normalised(before[name], view))
        used = plain.weights()
        moved = {n: w - used[n] for n, w in advanced(plain, 1).weights().items()}
        for name, view in views.items():
            got = after[name] - before[name]
            expected = _through_the_norm(before[name], moved[name], view)
            apart = relative(got, expected)
            constant = np.vdot(used[name], before[name]) / np.vdot(before[name], before[name])
            cause = (
                "the norm counts as constant"
                if relative(got, constant * moved[name]) <= _GRADIENT_RTOL
                else "what arrives at the weight in use is passed on as it is"
                if relative(got, moved[name]) <= _GRADIENT_RTOL
                else "it is taken at another weight than the one in use"
            )
            assert apart <= _GRADIENT_RTOL, (
                f"{name}: a step differs by {apart:.3g} (relative) from that along the derivative "
                f"of s·W/‖W‖. Likely cause of the gradient: {cause}"
            )

    def test_the_report_shows_the_norm_in_use(self) -> None:
        """The report shows the norm of the weight in use, not that of the raw weight."""
        self.needs("forward")
        training = advanced(self.start(self.model(), _RULE), _STEPS)
        weights = training.weights()
        for row in training.report().constrained:
            raw = norm_of(weights[row.name], training.geometries[row.name])
            assert row.norm is not None, f"{row.name} is under a rule without a norm"
            # An upper bound for zero padding may be a little larger than the norm.
            most = _SCALE * (1.5 if row.norm_is == "upper bound" else 1 + _RTOL)
            assert _SCALE * (1 - _RTOL) <= row.norm <= most, (
                f"{row.name}: the report says norm {row.norm:.6g} ({row.norm_is}) under a rule "
                f"that makes it {_SCALE}; the raw weight's is {raw:.6g}"
            )

    def test_writes_from_outside_are_noticed(self) -> None:
        """A weight that was scaled (a checkpoint, an average) is normalised to the same."""
        self.needs("forward")
        training = advanced(self.start(self.model(), _RULE), _STEPS)
        before, weights = training.outputs(), training.weights()
        for name in training.geometries:
            training.set_weight(name, weights[name] * np.asarray(4.0, weights[name].dtype))
        apart = relative(training.outputs(), before)
        assert apart <= _RTOL, (
            f"weights four times as large changed the outputs by {apart:.3g} (relative), though "
            f"4W and W have the same direction. Likely cause: a norm is cached; "
            f"rule.apply(weight, ...) has to see the weight of each forward pass"
        )

    def test_weights_loaded_between_firings_are_noticed(self) -> None:
        """Weights of other directions than the vectors' are normalised by their own norms."""
        self.needs("forward")
        self.needs_a_changed_model()
        training = advanced(self.start(self.model(), Plan([("*", _RULE)], every=5)), _STEPS)
        geometries, weights = training.geometries, training.weights()
        loaded = {name: np.flip(weights[name]).copy() for name in geometries}
        for name, values in loaded.items():
            training.set_weight(name, values)
        used = {name: _normalised(loaded[name], g) for name, g in geometries.items()}
        expected = self.outputs_with(weights | used)
        apart = relative(training.outputs(), expected)
        assert apart <= _RTOL, (
            f"after step {_STEPS} of every=5 all weights were replaced, and outputs differ by "
            f"{apart:.3g} (relative) from those of the new weights at norm {_SCALE}. Likely cause: "
            f"the norm is followed along the vectors of the old weights until the next firing"
        )

    def test_detaching_gives_the_plain_model(self) -> None:
        """Layers use the raw weights again."""
        self.needs("forward")
        training = advanced(self.start(self.model(), _RULE), _STEPS)
        weights = training.weights()
        training.detach()
        moved = changed(training.weights(), weights)
        assert not moved, f"detach() changed the raw weights {listed(moved)} (relative change)"
        apart = relative(training.outputs(), self.outputs_with(weights))
        assert apart <= 1e-5, (
            f"after detach() outputs differ by {apart:.3g} (relative) from the plain model's "
            f"with the same weights: the layers still use normalised ones"
        )

    def test_project_leaves_the_weight_in_use(self) -> None:
        """The model that project() was given computes with s·W/‖W‖, without specops."""
        self.needs("forward")
        self.needs_a_changed_model()
        start = self.start(self.model(), Monitor())
        weights = start.weights()
        model = self.model()
        self.project(model, _RESHAPED)
        projected = self.start(model, Monitor()).weights()
        for name, geometry in advanced(start, 1).geometries.items():
            used = _normalised(weights[name], measured_as(geometry, "reshaped"))
            apart = relative(projected[name], used)
            assert apart <= _RTOL, (
                f"{name}: project(model, {_RESHAPED!r}) left a weight that differs by "
                f"{apart:.3g} (relative) from the one that the rule lets layers use. Likely "
                f"cause: detach(fold=True) does not reach BaseAttachment.detach"
            )


def _through_the_norm(weight: np.ndarray, moved: np.ndarray, view: Dense) -> np.ndarray:
    """The move of W that corresponds to a move M of s·W/σ: (s/σ)·(M − ⟨M, W/σ⟩ uvᴴ), by block."""
    pairs = zip(view.blocks(weight.astype(np.float64)), view.blocks(moved), strict=True)
    blocks = []
    for w, m in pairs:
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        sigma = s[..., :1, None]
        along = np.sum(m * w / sigma, (-2, -1), keepdims=True)
        blocks.append(_SCALE / sigma * (m - along * (u[..., :, :1] @ vh[..., :1, :])))
    result: np.ndarray = view.assemble(tuple(blocks), weight.shape)
    return result


def _normalised(weight: np.ndarray, geometry: Geometry) -> np.ndarray:
    """s·W/‖W‖, block by block."""
    if not isinstance(geometry, Dense):
        return (_SCALE / norm_of(weight, geometry) * weight).astype(weight.dtype)
    blocks = geometry.blocks(weight.astype(np.float64))
    scaled = tuple(_SCALE * b / np.linalg.norm(b, 2, (-2, -1), keepdims=True) for b in blocks)
    result: np.ndarray = geometry.assemble(scaled, weight.shape).astype(weight.dtype)
    return result
