"""How an adapter reads and writes one parameter of a model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from specops import arrays
from specops.geometry import Geometry
from specops.training.weight import Weight
from specops.typing import Array

_NO_CONTEXT = nullcontext()


class Parameter(ABC):
    """One parameter of a model; an adapter writes `read` and `write`, and what else it needs.

    Attributes
    ----------
    weight : Weight
        Its description for plans. Set it before you hand the parameter over.
    aliases : sequence of str
        Further names of the same memory (tied weights); patterns may match these, too.
    declared : bool
        Whether the user declared the geometry; it then describes the array in `weight.shape`.
    learns_size : bool
        Whether `geometry` takes on the input size which the layer sees in training.
    """

    weight: Weight
    aliases: Sequence[str] = ()
    declared: bool = False
    learns_size: bool = False

    @abstractmethod
    def read(self) -> Array:
        """The array as it is now, of the geometry's shape, without a gradient."""

    @abstractmethod
    def write(self, value: Array) -> None:
        """Store an array of the shape that `read` gives."""

    def geometry(self) -> Geometry:
        """The map as it is known now: a convolution at the input size that is known by now."""
        geometry = self.weight.geometry
        assert geometry is not None
        return geometry

    def identity(self) -> int | None:
        """A number that two parameters share if they are one memory; None if none is known."""
        return None

    @property
    def place(self) -> Any:
        """What identifies the parameter when a model is listed anew: by default its name."""
        return self.weight.name

    def frozen(self) -> str:
        """Why nothing may act on it at present; empty if something may."""
        return ""

    def check_writable(self) -> None:  # noqa: B027 - most have none
        """Raise, before the first of several is written, if this one cannot be."""

    def context(self) -> AbstractContextManager[None]:
        """The context in which computations with the array have to run, such as a device."""
        return _NO_CONTEXT

    def watch(self) -> None:  # noqa: B027 - most have none
        """Called when a rule begins to act on it: the place for hooks that learn sizes."""

    def unwatch(self) -> None:  # noqa: B027 - most have none
        """Undo `watch`."""

    def sizes(self) -> Any:
        """The sizes that `geometry` has learnt, for a checkpoint; None if it has learnt none."""
        return None

    def see(self, sizes: Any) -> None:  # noqa: B027 - most have none
        """Take over the `sizes` of a checkpoint, if it has any."""

    def saved(self, value: Array) -> Any:
        """One array of a rule's state, for a checkpoint: a copy."""
        return copy.deepcopy(value)

    def restored(self, value: Any) -> Array:
        """A copy, on the parameter's device, of what `saved` gave or of a NumPy array of it."""
        own = self.read()
        if type(value) is type(own) and arrays.device_of(value) == arrays.device_of(own):
            return copy.deepcopy(value)
        complex_ = arrays.is_complex(value)
        return arrays.constant(arrays.to_numpy(value), own, complex=complex_)
