"""Which linear map an array stands for: declared, never guessed from its shape."""

from specops.errors import GeometryError
from specops.geometry.conv import Conv
from specops.geometry.dense import Dense
from specops.geometry.sizes import ConvSizes

Geometry = Dense | Conv

__all__ = ["Conv", "ConvSizes", "Dense", "Geometry", "resolve_geometry"]


def resolve_geometry(ndim: int, geometry: Geometry | None) -> Geometry:
    """The geometry itself, or `Dense()` for a matrix that came without one."""
    if geometry is None:
        if ndim == 2:
            return Dense()
        raise GeometryError(
            f"an array with {ndim} axes needs a geometry: Conv(input_shape=...) for a "
            f"convolution kernel, Dense(out_axes=(1,), batch_axes=(0,)) for a stack of matrices, "
            f"or Dense() for the matrix of its first axis against all others"
        )
    if not isinstance(geometry, Dense | Conv):
        raise GeometryError(
            f"geometry must be Dense(...), Conv(...) or None, got {type(geometry).__name__}"
        )
    return geometry
