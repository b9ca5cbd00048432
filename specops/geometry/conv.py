"""`Conv`: an array read as the kernel of a convolution on a grid of given size."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import array_api_compat as compat

from specops.errors import GeometryError
from specops.geometry.arguments import every_axis, integer, integers, per_axis
from specops.geometry.dense import Dense
from specops.geometry.sizes import ConvSizes
from specops.typing import Array

Padding = Literal["same", "valid"] | int | tuple[int, ...] | tuple[tuple[int, int], ...]

# For each layout two answers: is the channel axis that counts all groups ("full") that of the
# outputs, and do the spatial axes come last?
_LAYOUTS = {"OI*": (True, True), "IO*": (False, True), "*IO": (True, False), "*OI": (False, False)}
_REFUSED_BOUNDARIES = ("reflect", "replicate", "symmetric", "edge")


@dataclass(frozen=True)
class Conv:
    """The linear operator of a convolution layer: all channels, on a grid of given size.

    ``y[o, p] = Σ_{i, a} K[o, i, a] · x[i, s·p + d·a − lower]`` (cross-correlation, as every
    framework defines its convolution layers), with x outside the grid read as zero or, for
    ``boundary="circular"``, wrapped around. ``transposed=True`` is the transpose of that map.

    Parameters
    ----------
    input_shape : int, tuple of int or None
        Spatial size of the layer's own input, also when transposed. None stands for the
        supremum over all sizes (bounds and projections only).
    stride, dilation : int or tuple of int
        One number for all spatial axes, or one for each.
    groups : int
        Number of independent groups of channels.
    transposed : bool
        Whether the layer is a transposed convolution.
    output_padding : int or tuple of int
        As in torch; for transposed convolutions only.
    padding : "same", "valid", int, tuple of int or tuple of pairs
        "same" as XLA defines it (⌈n/s⌉ outputs), ints as in torch (both sides of an axis),
        or one (lower, upper) pair per axis. A circular boundary accepts every padding that
        gives n/s outputs: its offset permutes the outputs and leaves singular values alone.
    boundary : "zeros" or "circular"
        What lies outside the grid.
    layout : "OI*", "IO*", "*IO" or "*OI"
        Order of the kernel's axes, ``*`` being the spatial ones: (out, in/groups, *kernel) of
        torch and equinox; (in, out/groups, *kernel) of torch's transposed layers;
        (*kernel, in/groups, out) of flax, haiku and keras; (*kernel, out/groups, in) of the
        transposed layers of haiku and keras, and of flax with ``transpose_kernel=True``. Those
        of equinox, and of flax without it, keep their library's order and do not flip the kernel:
        they are mirror images of this map, their padding the other way round.

    Raises
    ------
    GeometryError
        For arguments of the wrong kind, number or sign, a boundary that is not a convolution
        on a torus, and (on use) an array that does not fit.

    Examples
    --------
    >>> Conv((32, 32)).describe()
    'conv 32×32, zeros'
    >>> Conv((16, 16), stride=2, boundary="circular").describe()
    'conv 16×16, circular, stride 2'
    """

    input_shape: int | tuple[int, ...] | None
    _: KW_ONLY
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0
    padding: Padding = "same"
    boundary: Literal["zeros", "circular"] = "zeros"
    layout: Literal["OI*", "IO*", "*IO", "*OI"] = "OI*"

    def __post_init__(self) -> None:
        fix = object.__setattr__
        shape = self.input_shape
        if shape is not None:
            shape = integers(shape, "input_shape", least=1)
        if shape == ():
            raise GeometryError("input_shape is empty: name the size of each spatial axis")
        ndim = None if shape is None else len(shape)
        if self.layout not in tuple(_LAYOUTS):
            raise GeometryError(f"layout must be one of {', '.join(_LAYOUTS)}, got {self.layout!r}")
        if self.boundary in _REFUSED_BOUNDARIES:
            raise GeometryError(
                f"boundary={self.boundary!r} is not supported: the operator of a layer padded "
                f'that way is no convolution on a torus. Use padding "zeros" or "circular" in '
                f"the layer, or exclude it from the plan"
            )
        if self.boundary not in ("zeros", "circular"):
            raise GeometryError(f'boundary must be "zeros" or "circular", got {self.boundary!r}')
        if not isinstance(self.transposed, bool):
            raise GeometryError(f"transposed must be True or False, got {self.transposed!r}")
        fix(self, "input_shape", shape)
        fix(self, "stride", per_axis(self.stride, ndim, "stride", least=1))
        fix(self, "dilation", per_axis(self.dilation, ndim, "dilation", least=1))
        fix(self, "groups", integer(self.groups, "groups", least=1))
        fix(self, "output_padding", per_axis(self.output_padding, ndim, "output_padding", least=0))
        if not self.transposed and any(integers(self.output_padding, "output_padding")):
            raise GeometryError("output_padding only applies to transposed convolutions")
        fix(self, "padding", _check_padding(self.padding, ndim))

    def describe(self) -> str:
        """The geometry in a few words."""
        name = "transposed conv" if self.transposed else "conv"
        size = "any size" if self.grid is None else "×".join(map(str, self.grid))
        parts = [f"{name} {size}", self.boundary]
        for label, value, plain in [("stride", self.stride, 1), ("dilation", self.dilation, 1)]:
            values = set(integers(value, label))
            if values != {plain}:
                shown = values.pop() if len(values) == 1 else value
                parts.append(f"{label} {shown}")
        if self.groups > 1:
            parts.append(f"{self.groups} groups")
        return ", ".join(parts)

    @property
    def grid(self) -> tuple[int, ...] | None:
        """`input_shape`, as a tuple or None."""
        assert not isinstance(self.input_shape, int)
        return self.input_shape

    @property
    def channel_axes(self) -> tuple[int, int]:
        """The axes of the output and of the input channels in an array of this layout."""
        full_is_out, spatial_last = _LAYOUTS[self.layout]
        full, part = (0, 1) if spatial_last else (-1, -2)
        return (full, part) if full_is_out else (part, full)

    @property
    def spatial_last(self) -> bool:
        """Whether the spatial axes come after those of the channels."""
        return _LAYOUTS[self.layout][1]

    @property
    def has_size(self) -> bool:
        """Whether the input size is known, so that it is one operator, not one for each size."""
        return self.grid is not None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `GeometryError` if a kernel of this shape does not have this geometry."""
        self.sizes(tuple(shape))

    def sizes(self, shape: tuple[int, ...]) -> ConvSizes:
        """The sizes with a kernel of this shape; `GeometryError` if the two do not fit."""
        ndim = len(shape) - 2
        if ndim < 1 or (self.grid is not None and ndim != len(self.grid)):
            expected = "at least 3" if self.grid is None else len(self.grid) + 2
            raise GeometryError(
                f"a kernel of shape {shape} has {len(shape)} axes, but {self.describe()} needs "
                f"{expected}: output channels, input channels and the spatial axes"
            )
        if 0 in shape:
            raise GeometryError(f"the kernel is empty: shape {shape}")
        full_is_out, spatial_last = _LAYOUTS[self.layout]
        full, part = (shape[0], shape[1]) if spatial_last else (shape[-1], shape[-2])
        kernel = shape[2:] if spatial_last else shape[:-2]
        if full % self.groups:
            raise GeometryError(
                f"groups={self.groups} does not divide the {full} "
                f"{'output' if full_is_out else 'input'} channels of shape {shape}"
            )
        stride = every_axis(self.stride, ndim, "stride")
        dilation = every_axis(self.dilation, ndim, "dilation")
        extra = every_axis(self.output_padding, ndim, "output_padding")
        rows, columns = full // self.groups, part
        if full_is_out == self.transposed:
            rows, columns = columns, rows
        fine, coarse, lower = self._grids(kernel, stride, dilation, extra)
        return ConvSizes(
            self.groups,
            rows,
            columns,
            tuple(kernel),
            stride,
            dilation,
            self.boundary == "circular",
            fine,
            coarse,
            lower,
        )

    def has_exact_spectrum(self, shape: tuple[int, ...]) -> bool:
        """Whether the operator is block diagonal in Fourier space, which gives all its values."""
        sizes = self.sizes(shape)
        return sizes.circular and sizes.fine is not None and sizes.stride_divides

    def repeated_matrix(self, shape: tuple[int, ...]) -> Dense | None:
        """The matrix of which the operator consists of copies; None if it does not.

        It does for 1×1 kernels and for patches that do not overlap. Norms and nearest weights are
        then those of the matrix, but not what depends on the multiplicity of singular values.
        """
        if self.groups > 1 or not self.sizes(shape).repeats_a_matrix:
            return None
        return Dense(out_axes=(self.channel_axes[self.transposed],))

    def kernel(self, w: Array) -> Array:
        """`w` as (groups, rows, columns, *kernel); rows are the channels of the coarse grid."""
        xp = compat.array_namespace(w)
        full_is_out, spatial_last = _LAYOUTS[self.layout]
        if not spatial_last:
            w = xp.permute_dims(w, (w.ndim - 1, w.ndim - 2, *range(w.ndim - 2)))
        w = xp.reshape(w, (self.groups, w.shape[0] // self.groups, *w.shape[1:]))
        return xp.permute_dims(w, _swap(w.ndim)) if full_is_out == self.transposed else w

    def weight(self, kernel: Array) -> Array:
        """The array whose `kernel` this is."""
        xp = compat.array_namespace(kernel)
        full_is_out, spatial_last = _LAYOUTS[self.layout]
        if full_is_out == self.transposed:
            kernel = xp.permute_dims(kernel, _swap(kernel.ndim))
        w = xp.reshape(kernel, (kernel.shape[0] * kernel.shape[1], *kernel.shape[2:]))
        if spatial_last:
            return w
        return xp.permute_dims(w, (*range(2, w.ndim), 1, 0))

    def transpose(self) -> Conv:
        """The geometry under which the same array stands for the transposed operator.

        Defined only if it does not depend on the kernel: circular, or without an input size.
        """
        if self.grid is not None and self.boundary != "circular":
            raise GeometryError("the transpose of a zero-padded Conv needs the kernel's sizes")
        shape = self.grid
        if shape is not None:
            stride = every_axis(self.stride, len(shape), "stride")
            pairs = list(zip(shape, stride, strict=True))
            if not self.transposed and any(n % s for n, s in pairs):
                raise GeometryError(f"stride {stride} does not divide the grid {shape}")
            shape = tuple(n * s if self.transposed else n // s for n, s in pairs)
        swapped = {"OI*": "IO*", "IO*": "OI*", "*IO": "*OI", "*OI": "*IO"}[self.layout]
        return Conv(
            shape,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            transposed=not self.transposed,
            boundary=self.boundary,
            layout=swapped,  # type: ignore[arg-type]
        )

    def covering(self, grid: tuple[int, ...] | None) -> Conv:
        """The geometry whose norm bounds that of this layer on another input size as well.

        It has the larger of the two sizes along each axis if the operators of smaller inputs are
        parts of it. They are not on a torus, nor where "same" padding begins at another offset:
        there it is the geometry of every size.
        """
        if self.grid is None or grid is None or self.boundary == "circular":
            return self if grid == self.grid else replace(self, input_shape=None)
        stride = every_axis(self.stride, len(grid), "stride")
        apart = any((m - n) % s for m, n, s in zip(grid, self.grid, stride, strict=True))
        if apart and self.padding == "same" and not self.transposed:
            return replace(self, input_shape=None)
        larger = tuple(max(m, n) for m, n in zip(grid, self.grid, strict=True))
        return replace(self, input_shape=larger)

    def _grids(
        self,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        extra: tuple[int, ...],
    ) -> tuple[tuple[int, ...] | None, ...]:
        """(fine grid, coarse grid, lower padding) of the convolution that this is or transposes."""
        if self.grid is None:
            return None, None, None
        fine, coarse, lower = [], [], []
        for t, (n, k, s, d) in enumerate(zip(self.grid, kernel, stride, dilation, strict=True)):
            span = d * (k - 1) + 1
            low, high = self._pads(t, n, span, s)
            if self.transposed:
                f, m = self._transposed_size(n, span, s, low + high, extra[t]), n
            else:
                f, m = n, (n + low + high - span) // s + 1
            if m < 1 or f < 1:
                raise GeometryError(
                    f"a kernel of {span} entries along axis {t} leaves no output on a grid of "
                    f"{n} with padding {self.padding!r}"
                )
            outputs, expected = (f, n * s) if self.transposed else (m, -(-n // s))
            if self.boundary == "circular" and outputs != expected:
                divided = not self.transposed and n % s and span - s <= low + high < span
                remedy = f", or sizes that the stride {s} divides" if divided else ""
                raise GeometryError(
                    f"padding={self.padding!r} gives {outputs} outputs along axis {t}; a "
                    f'circular convolution has {expected}. Use padding="same"{remedy}'
                )
            fine.append(f)
            coarse.append(m)
            lower.append(low)
        return tuple(fine), tuple(coarse), tuple(lower)

    def _pads(self, axis: int, n: int, span: int, s: int) -> tuple[int, int]:
        if self.padding == "valid":
            return 0, 0
        if self.padding == "same":
            outputs = n if self.transposed else -(-n // s)
            fine = n * s if self.transposed else n
            total = (outputs - 1) * s + span - fine
            total = max(total, 0)
            return total // 2, total - total // 2
        entry = self.padding if isinstance(self.padding, int) else self.padding[axis]
        return entry if isinstance(entry, tuple) else (entry, entry)

    def _transposed_size(self, n: int, span: int, s: int, pads: int, extra: int) -> int:
        if self.padding == "same":
            return n * s + extra
        if self.padding == "valid":
            return (n - 1) * s + max(span, s) + extra
        return (n - 1) * s + span - pads + extra


def _check_padding(padding: Any, ndim: int | None) -> Padding:
    if isinstance(padding, str):
        lowered = padding.lower()
        if lowered not in ("same", "valid"):
            raise GeometryError(
                f'padding must be "same", "valid", an int, ints or pairs, got {padding!r}'
            )
        return lowered  # type: ignore[return-value]
    if isinstance(padding, list | tuple) and padding and isinstance(padding[0], list | tuple):
        pairs = tuple(integers(p, "padding", least=0) for p in padding)
        if any(len(p) != 2 for p in pairs) or ndim not in (None, len(pairs)):
            raise GeometryError(
                f"padding={padding!r} needs one (lower, upper) pair for each spatial axis"
            )
        return pairs  # type: ignore[return-value]
    return per_axis(padding, ndim, "padding", least=0)


def _swap(ndim: int) -> tuple[int, ...]:
    return (0, 2, 1, *range(3, ndim))
