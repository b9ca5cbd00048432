"""`attach`: a plan that acts on a dict of arrays at every step of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specops import arrays
from specops.errors import AdapterError
from specops.geometry import Geometry
from specops.training.attachment import BaseAttachment
from specops.training.constrained import Constrained
from specops.training.firing import NonFinitePolicy
from specops.training.history import Record
from specops.training.others import warn_of_others
from specops.training.plan import Plan
from specops.training.weight import Weight
from specops.typing import Array
from specops_cupy.arrays import Entry, check_library, entries, flatten, matched, rebuild


class Attachment(BaseAttachment[Constrained[Entry]]):
    """A plan at work on a dict of arrays. Made by `attach`; see there.

    Attributes
    ----------
    steps : int
        Calls of `step` since attaching (or since the state that was loaded).
    """

    stages = ("weights", "gradients", "forward")

    def __init__(
        self,
        optimizer: None,
        model: Mapping[str, Any],
        plan: Plan,
        geometries: Mapping[str, Geometry] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(plan, geometries, **options)
        if optimizer is not None:
            raise AdapterError(
                f"arrays have no optimizer whose steps could be followed, got "
                f"{type(optimizer).__name__}: pass None, and call attachment.step() after each "
                f"update of the arrays"
            )
        self._model: Mapping[str, Any] | None = model
        self._entries: list[Entry] = []
        self._described: list[tuple[Weight, Sequence[str]]] = []
        self.look()

    def parameters(self) -> list[Entry]:
        """Every entry of the dict."""
        return self._entries

    def look(self) -> None:
        """List the arrays anew: they may have been replaced, added or removed."""
        if self._model is None:
            super().look()
            return
        leaves = flatten(self._model)
        check_library(leaves)
        self._entries = entries(leaves)
        described = [(entry.weight, entry.aliases) for entry in self._entries]
        if described != self._described:
            self.assign()
            self._described = described
        for c in self._constrained:
            c.parameter.array = leaves[c.name]

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
            A gradient of no array, of another shape or dtype, or read-only; all are left as they
            were.
        NonFiniteError
            As in `step`.
        """
        self.look()
        of_stage = [c for c in self._constrained if c.stage == "gradients"]
        self._penalise(matched(gradients, self._entries, of_stage))

    def add(self, gradient: Array, term: Array) -> Array:
        """Add a rule's term to a gradient, in place."""
        gradient[...] = gradient + arrays.namespace(gradient).astype(term, gradient.dtype)
        return gradient

    def normalized(self) -> dict[str, Any]:
        """The arrays that a forward pass is to use, in a dict like the model.

        Those under a forward rule are new arrays; all others are the model's own, not copies.
        Calling it changes neither arrays nor vectors, which advance in `step`; an array that
        was written to from outside (a checkpoint, an average) is measured anew.
        """
        used = self.weights()
        aliases = {name: c.name for c in self._constrained for name in c.parameter.aliases}
        assert self._model is not None
        return rebuild(self._model, used | {name: used[first] for name, first in aliases.items()})

    def detach(self, *, fold: bool = False) -> None:
        """Stop acting and let go of the arrays; see `BaseAttachment.detach`."""
        super().detach(fold=fold)
        self._model, self._entries, self._described = None, [], []


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
        As in `specops.attach`.
    geometries : dict of str to Dense or Conv
        Which map each array is, by patterns of names. It is never guessed: what is not named
        here is left alone, or an error where the plan names it.
    on_nonfinite : "raise", "skip" or "warn"
        What to do about an array that holds NaN or infinity. It is left as it was in any case;
        "raise" leaves all others as they were, too.
    history : int
        Records kept.
    log : callable or SummaryWriter, optional
        As in `Attachment.log_to`.

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

    Warns
    -----
    CautionWarning
        Another attachment acts on one of the arrays in the same stage.

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
    attachment = Attachment(
        optimizer,
        model,
        Plan.of(rule_or_plan, every),
        geometries,
        on_nonfinite=on_nonfinite,
        history=history,
        log=log,
    )
    warn_of_others(attachment)
    return attachment
