"""`ConvSizes`: every number of a convolution with its kernel, and the torus that contains it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


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
    def apart(self) -> bool:
        """Whether no two outputs share an input: patches that do not overlap, 1×1 kernels."""
        return all(s >= span for s, span in zip(self.stride, self.spans, strict=True))

    @property
    def repeats_a_matrix(self) -> bool:
        """Whether no two outputs share an input, and one output reads inputs for all taps.

        The operator then consists of copies of the kernel as a matrix, and of parts at the edges.
        """
        if self.fine is None:
            return set(self.kernel) == {1}
        if not self.apart:
            return False
        if self.circular:
            return self.stride_divides or set(self.kernel) == {1}
        assert self.coarse is not None
        assert self.lower is not None
        given = zip(self.fine, self.coarse, self.lower, self.stride, self.spans, strict=True)
        return all(
            # The first output whose window begins inside the grid also has its end inside.
            -(-lower // s) <= min(m - 1, (n + lower - span) // s)
            for n, m, lower, s, span in given
        )

    @property
    def uses(self) -> tuple[tuple[int, ...], ...]:
        """How many outputs read each tap inside the grid, along each axis."""
        assert self.fine is not None
        assert self.coarse is not None
        assert self.lower is not None
        if self.circular:
            return tuple((m,) * k for m, k in zip(self.coarse, self.kernel, strict=True))
        uses = []
        for n, m, lower, k, s, d in zip(
            self.fine, self.coarse, self.lower, self.kernel, self.stride, self.dilation, strict=True
        ):
            # Output p reads entry s·p + d·a − lower.
            first = (max(0, -((d * a - lower) // s)) for a in range(k))
            last = (min(m - 1, (n - 1 + lower - d * a) // s) for a in range(k))
            uses.append(tuple(max(0, b - a + 1) for a, b in zip(first, last, strict=True)))
        return tuple(uses)

    @property
    def read(self) -> tuple[tuple[int, ...], ...]:
        """The taps along each axis that some output reads inside the grid."""
        if self.fine is None or self.circular:
            return tuple(tuple(range(k)) for k in self.kernel)
        return tuple(tuple(a for a, n in enumerate(axis) if n) for axis in self.uses)

    @property
    def reads_all(self) -> bool:
        """Whether every tap is read inside the grid by some output."""
        return tuple(map(len, self.read)) == self.kernel

    @property
    def wraps(self) -> bool:
        """Whether the kernel reaches around its circular grid, so that taps may share an entry."""
        if self.fine is None or not self.circular:
            return False
        return any(span > n for span, n in zip(self.spans, self.fine, strict=True))

    @property
    def stride_divides(self) -> bool:
        """Whether the stride divides the fine grid."""
        assert self.fine is not None
        return not any(n % s for n, s in zip(self.fine, self.stride, strict=True))

    def with_dividing_strides(self) -> ConvSizes:
        """A circular convolution whose strides divide the grid, which contains this one's rows.

        Strides that do not divide become 1; of a convolution without a grid size, all do.
        """
        if self.fine is None:
            return replace(self, stride=(1,) * len(self.stride))
        stride = tuple(1 if n % s else s for n, s in zip(self.fine, self.stride, strict=True))
        coarse = tuple(n // s for n, s in zip(self.fine, stride, strict=True))
        return replace(self, stride=stride, coarse=coarse)

    def enclosing_torus(self) -> tuple[int, ...]:
        """The grid of a circular convolution that contains this one as a submatrix.

        For a circular boundary it is the grid itself. For a zero boundary, reads that wrap around
        must fall on padding, so that N ≥ n − (the first index read), N ≥ (the last index read) + 1
        and N/s ≥ outputs. Taps that are never read do not count.
        """
        assert self.fine is not None
        assert self.coarse is not None
        assert self.lower is not None
        if self.circular:
            return self.fine
        torus = []
        for n, m, lower, s, d, taps in zip(
            self.fine, self.coarse, self.lower, self.stride, self.dilation, self.read, strict=True
        ):
            least = max(n, m * s)
            if taps:
                least = max(least, n + lower - d * taps[0], (m - 1) * s + d * taps[-1] - lower + 1)
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
