"""`Weight`: one parameter of a model as a plan sees it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from specops.arrays.dtypes import COMPUTE
from specops.errors import GeometryError, UnsupportedGeometryError
from specops.geometry import Conv, Geometry


@dataclass(frozen=True)
class Weight:
    """One parameter of a model, as an adapter describes it to a plan.

    Attributes
    ----------
    name : str
        Path of the parameter in the model.
    shape, dtype : tuple of int, str
        Shape and dtype, for the report.
    geometry : Dense or Conv, optional
        The linear map that the parameter stands for, if there is one.
    skipped : str
        Why no rule can ever apply (a bias, a frozen or tied parameter); empty otherwise.
    obstacle : str
        Why it cannot be constrained although it is a linear map. A rule that names it raises.
    opt_in : str
        Why only a rule that names it applies (an embedding).
    unusable : str
        Why it holds no values to constrain (lazy, meta): an error if any rule is to apply.
    remark : str
        A note for the user about the geometry, such as that it treats several maps as one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    geometry: Geometry | None = None
    skipped: str = ""
    obstacle: str = ""
    opt_in: str = ""
    unusable: str = ""
    remark: str = ""

    @property
    def kind(self) -> str:
        """ "conv", "dense" or "embedding", as patterns ask for them; empty if no map is known."""
        if self.geometry is None:
            return ""
        if self.opt_in:
            return "embedding"
        return "conv" if isinstance(self.geometry, Conv) else "dense"

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        geometry: Geometry | None = None,
        *,
        skipped: str = "",
        obstacle: str = "",
        opt_in: str = "",
        unusable: str = "",
        remark: str = "",
    ) -> Weight:
        """A weight; fewer than two axes, no entries or its dtype may rule it out already."""
        if len(shape) < 2:
            skipped = f"{len(shape)}-d: a bias or scale, no matrix"
        elif 0 in shape:
            skipped = "empty"
        if skipped:
            return cls(name, shape, dtype, skipped=skipped)
        reason = unmeasurable(dtype)
        if reason:
            return cls(name, shape, dtype, obstacle=reason, unusable=unusable)
        return cls(name, shape, dtype, geometry, "", obstacle, opt_in, unusable, remark)


def unmeasurable(dtype: str) -> str:
    """Why arrays of this dtype have no singular values here; empty if they have."""
    if dtype.rpartition(".")[2] in COMPUTE:
        return ""
    return f"dtype {dtype} cannot be measured: keep a float32 weight"


def is_misfit(error: Exception, geometry: Geometry, shape: tuple[int, ...]) -> bool:
    """Whether a rule's error means that the map fits neither the array nor the rule.

    Any other error, even a `GeometryError`, is a mistake that must not be skipped.
    """
    if not isinstance(error, GeometryError):
        return False
    try:
        geometry.check(shape)
    except GeometryError:
        return True
    return isinstance(error, UnsupportedGeometryError)


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern means a name: by wildcards, or as the name itself, which may have any."""
    return name == pattern or fnmatchcase(name, pattern)
