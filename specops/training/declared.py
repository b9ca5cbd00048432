"""Maps that the user declares, in place of those that an adapter finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from specops.errors import GeometryError, PlanError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import every_axis
from specops.tables import some_names
from specops.training.cautions import caution
from specops.training.weight import Weight, is_named, unmeasurable

_FEW = 7
"""Most taps that usual kernels have along an axis."""


def declared(geometries: Any) -> dict[str, Geometry]:
    """The user's maps by patterns of names: `geometries`, checked; None means no maps."""
    if geometries is not None and not isinstance(geometries, Mapping):
        raise GeometryError(
            f"geometries must be a dict of patterns to maps, such as {{'*.weight': Dense()}}, got "
            f"{geometries!r}"
        )
    return dict(geometries or {})


def override_geometries(
    weights: Sequence[Weight],
    geometries: Mapping[str, Geometry] | None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    *,
    again: bool = False,
) -> list[Weight]:
    """Replace inferred geometries by the user's, the first pattern that matches winning.

    `aliases` are further names of a weight (tied tensors), which patterns may match, too. Warns if
    a map contradicts the layer of a kernel, or its shape. Every pattern has to match a weight, if
    only one that is left alone, such as a frozen one; `again`, when all have matched before, those
    without any match are accepted.
    """
    geometries, aliases = declared(geometries), aliases or {}
    unused, vectors = set(geometries), set[str]()
    result = []
    for weight in weights:
        names = (weight.name, *aliases.get(weight.name, ()))
        matching = (p for p in geometries if any(is_named(n, p) for n in names))
        pattern = next(matching, None)
        if pattern is not None and weight.skipped and len(weight.shape) < 2:
            vectors.add(pattern)
        elif pattern is not None:
            unused.discard(pattern)
        if pattern is None or weight.skipped:
            result.append(weight)
            continue
        geometry = geometries[pattern]
        _check_fit(weight, geometry)
        doubt = _contradiction(weight, geometry)
        if doubt:
            caution(f"geometries for {weight.name}, shape {weight.shape}: {doubt}")
        obstacle = unmeasurable(weight.dtype)
        known = None if obstacle else geometry
        weight = replace(weight, geometry=known, obstacle=obstacle, opt_in="", remark="")
        result.append(weight)
    if again:
        unused &= vectors
    if unused:
        raise PlanError(
            f"geometries names {', '.join(map(repr, sorted(unused)))}, which no matrix "
            f"matches: parameters are called {some_names([w.name for w in weights], min(unused))}"
        )
    return result


def _check_fit(weight: Weight, geometry: Any) -> None:
    try:
        if not isinstance(geometry, Conv | Dense):
            raise GeometryError(f"must be Dense(...) or Conv(...), got {geometry!r}")
        geometry.check(weight.shape)
    except GeometryError as error:
        raise GeometryError(f"geometries for {weight.name}: {error}") from None


def _contradiction(weight: Weight, geometry: Geometry) -> str:
    """Why a declared map is likely wrong; empty if nothing says so."""
    if not isinstance(geometry, Conv):
        return ""
    found, axes = weight.geometry, len(weight.shape) - 2
    if not isinstance(found, Conv):
        return _other_layout(weight.shape, geometry)
    ours, theirs = (_of_layer(g, axes) for g in (found, geometry))
    differing = [name for name in ours if ours[name] != theirs[name]]
    if not differing:
        return ""
    said, known = (", ".join(f"{n}={x[n]!r}" for n in differing) for x in (theirs, ours))
    return f"{said} is given, and its layer computes with {known}"


def _of_layer(geometry: Conv, axes: int) -> dict[str, Any]:
    """The options that a layer fixes; input sizes and padding are the user's to choose."""
    return {
        "layout": geometry.layout,
        "transposed": geometry.transposed,
        "groups": geometry.groups,
        "stride": every_axis(geometry.stride, axes, "stride"),
        "dilation": every_axis(geometry.dilation, axes, "dilation"),
    }


def _other_layout(shape: tuple[int, ...], geometry: Conv) -> str:
    """Why the layout with channels at the other end is more likely; empty if it is not."""
    axes = len(shape) - 2
    if axes < 2:
        return ""
    first, last = shape[:axes], shape[-axes:]
    taps, others = (last, first) if geometry.spatial_last else (first, last)
    usual = len(set(others)) == 1 and others[0] % 2 == 1 and others[0] <= _FEW
    if not usual or min(taps) <= _FEW:
        return ""
    sizes = ["×".join(map(str, x)) for x in (taps, others)]
    likely = "*IO" if geometry.spatial_last else "OI*"
    return (
        f"with layout={geometry.layout!r} it is a kernel of {sizes[0]} taps. With channels at the "
        f"other end, layout={likely!r}, it would be one of {sizes[1]} taps"
    )
