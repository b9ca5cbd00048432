"""Checks that a layer is the linear map that the adapter says it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from specops.errors import SpecopsError
from specops.geometry import Dense
from specops.rules import Monitor
from specops.spectra import singular_values
from specops.testing.base import SuiteBase, advanced
from specops.testing.oracle import described, explicit_matrix, is_linear, parts_of
from specops.testing.recording import Recorder
from specops.training.plan import Plan

_RTOL = 2e-5


class GeometryChecks(SuiteBase):
    """Every layer against its explicit matrix: its forward pass applied to the unit vectors."""

    def choices(self) -> dict[str, Callable[[], Sequence[str]]]:
        """One value per layer, its label: every test makes the layer anew."""
        return super().choices() | {"layer_label": self._labels}

    def _labels(self) -> list[str]:
        return list(dict.fromkeys(case.label for case in self.layers()))

    def test_layers_are_given(self) -> None:
        """A kit without layers checks no geometry, and labels stand for one layer each."""
        labels = [case.label for case in self.layers()]
        assert labels, "layers() is empty: give a LayerCase for each layer type that you know"
        assert len(set(labels)) == len(labels), f"a label is used twice in {labels}"

    def test_layer_is_the_map_of_its_geometry(self, layer_label: str) -> None:
        """Same shape, same singular values, same norms of rows and of columns."""
        case = next(case for case in self.layers() if case.label == layer_label)
        matrix = explicit_matrix(case)
        assert is_linear(case, matrix, _RTOL), (
            f"{case.label}: apply() is not the map x ↦ Ax + b. Likely cause: it contains an "
            f"activation, or is in a mode with randomness (dropout)"
        )
        weight, geometry = self.examine(case)
        try:
            expected = described(weight, geometry)
            values = singular_values(np.asarray(weight, np.float64), geometry)
        except SpecopsError as error:
            pytest.fail(
                f"{case.label}: the weight {case.weight!r} of shape {weight.shape} does not fit "
                f"the geometry that the adapter found, {geometry!r}, for inputs "
                f"{case.input_shape}: {error}. Likely cause: layout= or the axes are of another "
                f"framework"
            )
        parts = parts_of(matrix, weight, geometry)
        spectra = values if isinstance(values, tuple) else (values,)
        where = f"{case.label}, weight {case.weight!r} of shape {weight.shape}, {geometry!r}"
        got, want = [p.shape for p in parts], [m.shape for m in expected]
        assert got == want, (
            f"{where}: the layer maps {matrix.shape[1]} inputs to {matrix.shape[0]} outputs (as "
            f"blocks: {got}), the geometry describes {want}. Likely cause: {_why(got, want)}"
        )
        for part, model, spectrum in zip(parts, expected, spectra, strict=True):
            _compare(where, part, model, np.asarray(spectrum))

    def test_a_declared_geometry_is_used(self) -> None:
        """The user's geometries= take precedence over those that the adapter finds."""
        self.needs("weights")
        training = advanced(self.start(self.model(), Monitor()), 1)
        kinds, weights, recorder = training.geometries, training.weights(), Recorder()
        dense = (n for n in self.constrained(training) if isinstance(kinds[n], Dense))
        name = next((n for n in dense if weights[n].shape[0] > 1), None)
        if name is None:
            pytest.skip("the model has no matrix of several rows, of which to declare blocks")
        declared = Dense(splits=(1, weights[name].shape[0] - 1))
        plan = Plan([(name, recorder)])
        self.project(self.model(), plan, geometries={name: declared})
        found = recorder.seen[-1][1]
        assert found == declared, (
            f"geometries={{{name!r}: {declared!r}}} was given, and the rule was told {found!r}. "
            f"Likely cause: Parameter.geometry() does not look at `declared`, or the adapter "
            f"drops geometries="
        )


def _compare(where: str, part: np.ndarray, model: np.ndarray, spectrum: np.ndarray) -> None:
    """The layer's block against the geometry's matrix and the singular values of specops."""
    true = np.linalg.svd(part, compute_uv=False)
    scale = max(float(true.max(initial=0.0)), float(np.max(spectrum, initial=0.0)))
    spectrum = np.sort(spectrum.ravel())[::-1]
    # How often 0 occurs depends on the form in which a stack is written as a matrix.
    length = max(len(true), len(spectrum))
    true = np.pad(true, (0, length - len(true)))
    spectrum = np.pad(spectrum, (0, length - len(spectrum)))
    worst = int(np.argmax(np.abs(true - spectrum)))
    assert np.allclose(spectrum, true, rtol=0, atol=_RTOL * scale), (
        f"{where}: singular value {worst + 1} of the layer is {true[worst]:.6g}, of the "
        f"geometry {spectrum[worst]:.6g} (norms {true[0]:.6g} and {spectrum[0]:.6g}). Likely "
        f"cause: stride, dilation, groups, padding or boundary differ from the layer's, or the "
        f"layout is another one"
    )
    for axis, side in ((1, "rows"), (0, "columns")):
        ours, theirs = (np.sort(np.linalg.norm(m, axis=axis)) for m in (part, model))
        assert np.allclose(ours, theirs, rtol=0, atol=_RTOL * scale), (
            f"{where}: the singular values agree, but the norms of the {side} do not: the "
            f"geometry is another map with the same values. Likely cause: inputs and outputs "
            f"are exchanged (out_axes, layout, transposed)"
        )


def _why(got: list[tuple[int, ...]], want: list[tuple[int, ...]]) -> str:
    if [shape[::-1] for shape in got] == want:
        return "inputs and outputs are exchanged (out_axes, layout, transposed)"
    if len(got) != len(want):
        return "splits differ from the layer's fused projections"
    if [columns for _, columns in got] == [columns for _, columns in want]:
        return "stride, padding, dilation, output_padding or transposed differ from the layer's"
    return "layout, groups or input_shape differ from the layer's"
