"""`Update`: what is known about a low-rank update of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Make = Callable[[Tensors], np.ndarray | tuple[np.ndarray, np.ndarray]]
UPDATE: Final = " (update)"
"""The suffix that makes a layer's name the name of its update."""

DORA: Final = "; DoRA scales its sum with the base weight anew"


@dataclass(frozen=True)
class Update:
    """A low-rank update of a weight.

    Attributes
    ----------
    layer, name : str
        The names of the layer to whose weight it is added, and of the update itself.
    shape : tuple of int
        (outputs, inputs, *taps); (outputs, inputs · taps) where the file does not have the taps.
    sources : tuple of str
        Names of the tensors that it is computed from.
    how : str
        How it is computed, in words.
    make : callable
        Takes the tensors by name and returns the update, or its two factors.
    bases : tuple of str
        Names that the weight may have in the same file.
    turned : bool
        Whether the weight is stored transposed, as embeddings and flax's kernels are.
    lengths : str
        The tensor with DoRA's lengths, to which the sum is scaled; "" for others.
    obstacle : str
        Why it cannot be added; "" if it can.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    how: str
    make: Make
    bases: tuple[str, ...] = ()
    turned: bool = False
    lengths: str = ""
    obstacle: str = ""
