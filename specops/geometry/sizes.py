"""`ConvSizes`: every number of a convolution with its kernel, and the torus that contains it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ConvSizes:
    """The sizes of a convolution with its kernel, as a map from a fine to a coarse grid.

    A transposed convolution has the sizes of the convolution that it transposes.
    """

    groups: int
    rows: int
    columns: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    circular: bool
    fine: tuple[int, ...] | None
    coarse: tuple[int, ...] | None
    lower: tuple[int, ...] | None
    """Entries by which the first output's receptive field starts before the grid."""

    @property
    def spans(self) -> tuple[int, ...]:
        """Extent of the dilated kernel along each axis."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def stride_divides(self) -> bool:
        """Whether the stride divides the fine grid."""
        assert self.fine is not None
        return not any(n % s for n, s in zip(self.fine, self.stride, strict=True))

    def enclosing_torus(self) -> tuple[int, ...]:
        """The grid of a circular convolution that contains this one as a submatrix.

        It is the grid itself for a circular boundary. For a zero boundary the wrapped reads
        must fall on padding: N ≥ n + lower, N ≥ one past the last index read, N/s ≥ outputs.
        """
        assert self.fine is not None
        assert self.coarse is not None
        assert self.lower is not None
        if self.circular:
            return self.fine
        torus = []
        for n, m, lower, s, span in zip(
            self.fine, self.coarse, self.lower, self.stride, self.spans, strict=True
        ):
            least = max(n + lower, (m - 1) * s + span - lower, m * s)
            torus.append(-(-least // s) * s)
        return tuple(torus)

    def matrix_shape(self) -> tuple[int, int]:
        """(coarse, fine) entries of the operator, all channels and groups counted."""
        assert self.fine is not None
        assert self.coarse is not None
        return (
            self.groups * self.rows * math.prod(self.coarse),
            self.groups * self.columns * math.prod(self.fine),
        )
