"""The readings of a tensor: one map, several if nothing decides between them, or none."""

from __future__ import annotations

from dataclasses import dataclass

from specops.geometry import Geometry


@dataclass(frozen=True)
class Reading:
    """One map that a tensor may stand for.

    Attributes
    ----------
    geometry : Dense or Conv
    why : str
        The evidence for it.
    shape : tuple of int, optional
        The shape to view the tensor in, if the geometry needs one other than the stored.
    """

    geometry: Geometry
    why: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Assumption:
    """The maps that a tensor is assumed to be, or the reason why it is none.

    Attributes
    ----------
    readings : tuple of Reading
        One reading; several, the likeliest first, if nothing decides between them; none if the
        tensor is not measured.
    skipped : str
        Why it is not measured.
    harmless : bool
        Whether skipping it loses nothing, as for biases and counters.
    """

    readings: tuple[Reading, ...] = ()
    skipped: str = ""
    harmless: bool = True

    @classmethod
    def of(cls, *readings: Reading) -> Assumption:
        """These readings, each map only once."""
        found = {(r.geometry, r.shape): r for r in reversed(readings)}
        return cls(tuple(found[key] for key in reversed(found)))

    @property
    def geometry(self) -> Geometry | None:
        """The geometry of the likeliest reading."""
        return self.readings[0].geometry if self.readings else None

    @property
    def why(self) -> str:
        """The reason for the likeliest reading."""
        return self.readings[0].why if self.readings else ""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape in which the likeliest reading views the tensor."""
        return self.readings[0].shape if self.readings else None
