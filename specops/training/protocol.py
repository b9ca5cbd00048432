"""What `specops.attach` returns, whatever the framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from specops.geometry import Geometry
from specops.training.history import Record
from specops.training.plan import Plan
from specops.training.report import Report


@runtime_checkable
class Attachment(Protocol):
    """A plan at work on a model.

    Attributes
    ----------
    plan : Plan
        Which rules act on which weights, and when.
    steps : int
        Successful steps of the optimizer since attaching, or since the state that was loaded.
    """

    plan: Plan
    steps: int

    @property
    def is_attached(self) -> bool:
        """Whether steps reach the rules by themselves."""

    @property
    def history(self) -> list[Record]:
        """The latest firings, oldest first: step, name and the rule's figures as floats."""

    def log_to(self, listener: Any) -> None:
        """Hand each firing's figures to a callable or a TensorBoard ``SummaryWriter``."""

    def step(self) -> None:
        """Count one step and let the rules that are due act, where nothing calls this by itself."""

    def enforce(self) -> None:
        """Let every rule on weights act now, certified: after the last step, before an export."""

    def weights(self) -> dict[str, Any]:
        """The constrained weights as their layers use them, by name."""

    def geometries(self) -> dict[str, Geometry]:
        """The map that each of `weights` is, at the sizes that convolutions have seen."""

    def report(self, *, measure: bool = True) -> Report:
        """Every parameter of the model: constrained by what, or left alone and why."""

    def state_dict(self) -> dict[str, Any]:
        """Steps, sizes and rule states by parameter name: what a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; names must be those constrained here."""

    def detach(self, *, fold: bool = False) -> None:
        """Stop acting; with `fold`, write the weights of forward rules into the model."""
