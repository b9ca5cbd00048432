"""Geometries of the arrays in a module, by looking at its layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from specops.errors import AdapterError
from specops.geometry import Geometry
from specops.training.role import Role
from specops_jax.fused import taken_apart

_LIBRARIES = {"flax.linen": "linen", "flax.nnx": "nnx", "equinox": "equinox", "haiku": "haiku"}


class Geometries(dict[str, Geometry]):
    """Geometries by the names of parameters, as `geometries_of` finds them.

    Attributes
    ----------
    reasons : dict of str to str
        Why other arrays have none.
    opt_in : dict of str to str
        Why some are constrained only by rules that name them.
    remarks : dict of str to str
        Notes for the user on some geometries, such as that several maps are treated as one.
    skipped : dict of str to str
        Why rules leave some alone even where a pattern names them: biases of several axes.
    shapes : dict of str to tuple of int
        Of the arrays that were looked at.
    given : set of str
        Names and patterns that a user's own dict has added, by ``|``.
    """

    def __init__(self, roles: dict[str, Role] | None = None) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self.opt_in: dict[str, str] = {}
        self.remarks: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.given: set[str] = set()
        for name, role in taken_apart(roles or {}).items():
            if role.geometry is not None:
                self[name] = role.geometry
                self.shapes[name] = role.shape
            if role.obstacle:
                self.reasons[name] = role.obstacle
            if role.opt_in:
                self.opt_in[name] = role.opt_in
            if role.skipped:
                self.skipped[name] = role.skipped
            if role.remark and role.geometry is not None:
                self.remarks[name] = role.remark

    def __or__(self, other: Mapping[str, Geometry]) -> Geometries:  # type: ignore[override]
        """Both together; for an array that is in both, the other one counts."""
        result = Geometries()
        result |= self
        result |= other
        return result

    def __ior__(self, other: Mapping[str, Geometry]) -> Geometries:  # type: ignore[override]
        """As ``|``, in place."""
        if other is self:
            return self
        looked = other if isinstance(other, Geometries) else None
        for name in {*other, *(looked.reasons if looked is not None else ())}:
            for known in (self, *self._notes()):
                known.pop(name, None)
            self.given.discard(name)
        self.update(other)
        if looked is None:
            self.given.update(other)
            return self
        for own, others in zip(self._notes(), looked._notes(), strict=True):
            own.update(others)
        self.given.update(looked.given)
        return self

    def __ror__(self, other: Mapping[str, Geometry]) -> Geometries:  # type: ignore[override]
        """A plain dict together with these, which take precedence."""
        return (Geometries() | other) | self

    def _notes(self) -> tuple[dict[str, Any], ...]:
        """What is known of arrays besides their geometry, each by name."""
        return self.reasons, self.opt_in, self.remarks, self.skipped, self.shapes


def geometries_of(module: Any, *inputs: Any, **kwargs: Any) -> Geometries:
    """The geometry of every weight of a module, from its layers' attributes.

    Parameters
    ----------
    module : flax.linen.Module, flax.nnx.Module, equinox.Module or haiku.Transformed
        Equinox modules and nnx modules may be given without inputs: convolutions then stand for
        every input size.
    *inputs, **kwargs
        What the module is called with (one sample for equinox): arrays or
        `jax.ShapeDtypeStruct`; traced, not computed.

    Returns
    -------
    Geometries
        A dict by the names that `specops_jax.init` and its like give the parameters.

    Raises
    ------
    AdapterError
        A module of no known library, or missing inputs.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn
    >>> geometries_of(nn.Dense(3), jnp.ones((1, 2)))
    {'kernel': Dense(out_axes=(-1,), in_axes=None, batch_axes=(), splits=None, repeats=1)}
    """
    for library in _loaded():
        if library.knows(module):
            return Geometries(library.roles(module, inputs, kwargs))
    raise AdapterError(
        f"expected a module of flax, equinox or haiku (hk.transform(...)), got "
        f"{type(module).__module__}.{type(module).__name__}: for other pytrees pass "
        f"geometries={{name: Dense(...) or Conv(...)}}"
    )


def inspect_leaves(params: Any) -> Geometries:
    """The geometries of modules that are part of the tree of parameters, without input sizes."""
    found: dict[str, Role] = {}
    for library in _loaded():
        if hasattr(library, "roles_within"):
            found |= library.roles_within(params)
    return Geometries(found)


def _loaded() -> Iterator[Any]:
    # If a library was never imported, there cannot be a module of it.
    for needed, name in _LIBRARIES.items():
        if needed in sys.modules:
            yield import_module(f"specops_jax.libraries.{name}")
