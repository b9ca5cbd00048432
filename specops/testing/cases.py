"""The types by which an adapter's author describes the adapter to the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from specops.geometry import Geometry
from specops.rules.base import Stage, check_stages
from specops.training.report import Report


@dataclass(frozen=True)
class Capabilities:
    """What an adapter claims to support; tests of other things are skipped, with the reason.

    Attributes
    ----------
    stages : tuple of "weights", "gradients", "forward"
        Stages of the rules that the adapter acts on. Rules of another stage must be refused.
    supports_jit : bool
        Whether rules run under `AdapterSuite.jit`.
    checkpoints : bool
        Whether `Training.save` and `Training.restore` work.
    in_place : bool
        Whether training, `Training.set_weight` and ``specops.project`` change the model that
        they were given, and not a copy (JAX).
    registered : bool
        Whether the plugin is installed. False for a run on a stand-in which the plugin itself
        would not claim; the checks of the plugin are then skipped.
    nonfinite_within : int
        Number of steps within which NaN in a weight raises: 1 at the step itself, 2 where the
        check stays on the device and is read at the next firing.
    convolutions : bool
        Whether the framework has convolutions; `AdapterSuite.model` then has one.
    differentiates : bool
        Whether the framework differentiates forward passes by itself, forward rules included. False
        where users write their gradients: those of raw weights are then not looked at.
    refuses_nonfinite : type of exception, optional
        What the framework itself raises in a step where a weight holds NaN, before a rule could
        look at it. It need not name the layer.
    """

    stages: tuple[Stage, ...] = ("weights", "gradients", "forward")
    supports_jit: bool = False
    checkpoints: bool = True
    in_place: bool = True
    registered: bool = True
    nonfinite_within: int = 1
    convolutions: bool = True
    differentiates: bool = True
    refuses_nonfinite: type[Exception] | None = None

    def __post_init__(self) -> None:
        check_stages(self.stages)


@dataclass(frozen=True)
class LayerCase:
    """One layer, and how its framework applies it.

    Attributes
    ----------
    label : str
        The test's id.
    model : Any
        A model that holds just this layer.
    weight : str
        The weight's name in the report.
    input_shape : tuple of int
        The shape of one sample as the layer takes it, without a batch axis.
    apply : callable
        The framework's own forward pass on a batch of inputs; it takes and returns NumPy arrays.
        The layer may have a bias, which the kit subtracts.
    geometry : Dense or Conv, optional
        What a user would declare in ``geometries=`` for a layer whose geometry cannot be inferred
        (fused projections, bare arrays). With None the adapter has to infer it.
    """

    label: str
    model: Any
    weight: str
    input_shape: tuple[int, ...]
    apply: Callable[[np.ndarray], np.ndarray]
    geometry: Geometry | None = None


@runtime_checkable
class Training(Protocol):
    """A model, an optimizer and a plan at work on fixed data: what `AdapterSuite.start` returns.

    Names of weights are those of the report.
    """

    def step(self) -> None:
        """Take one optimizer step on the fixed data."""

    def weights(self) -> dict[str, np.ndarray]:
        """Every raw parameter, as copies."""

    def outputs(self) -> np.ndarray:
        """The model's forward pass on the fixed batch, with forward rules in effect."""

    def report(self) -> Report:
        """The report of the attachment."""

    def history(self) -> list[dict[str, Any]]:
        """The records of the attachment, oldest first: step, name and figures."""

    def save(self) -> Any:
        """Everything that a checkpoint holds: model, optimizer and rules. A snapshot."""

    def restore(self, saved: Any) -> None:
        """Load what `save` returned into this training."""

    def set_weight(self, name: str, values: np.ndarray) -> None:
        """Overwrite a raw parameter, as a user might."""

    def enforce(self) -> None:
        """Let every rule on weights act now, as ``Attachment.enforce``."""

    def detach(self) -> None:
        """Remove the rules; `step` goes on without them."""

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        """The geometries of the constrained weights, with input sizes known after one step."""
