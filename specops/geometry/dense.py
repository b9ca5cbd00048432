"""`Dense`: an array read as a matrix, a stack of matrices, or matrices laid side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import array_api_compat as compat

from specops.errors import GeometryError
from specops.geometry.arguments import integer, integers
from specops.typing import Array


@dataclass(frozen=True)
class Dense:
    """The matrix whose rows are the output axes and whose columns are the input axes.

    ``y = W x`` with ``W`` of shape (prod(out), prod(in)), one such matrix for each index of
    the batch axes. Axes are flattened in the order in which they are given.

    Parameters
    ----------
    out_axes : tuple of int
        Axes of the array that index outputs. ``(0,)`` suits torch's ``Linear``; flax, haiku
        and keras kernels ``[in, out]`` want ``(-1,)``.
    in_axes : tuple of int or None
        Axes that index inputs; None: all that are neither output nor batch.
    batch_axes : tuple of int
        Axes that index independent matrices (heads, experts).
    splits : tuple of int or None
        Sizes along the flattened output axis of blocks that are maps of their own (a fused
        query-key-value projection). Results then come as a tuple, one entry per block.
    repeats : int
        How many times `splits` follow one another along that axis: a block is then what is at
        its place in each of them. GPT-NeoX stores query, key and value head by head:
        ``Dense(splits=(width,) * 3, repeats=heads)``.

    Raises
    ------
    GeometryError
        If an argument is not made of integers, an axis is named twice, no output axis is
        left, there are repeats of no splits, or (on use) the array does not have these axes or
        sizes.

    Notes
    -----
    ``Dense()`` on a convolution kernel of layout "OI*" is the papers' "reshaped" matrix. Its
    norm is *not* the convolution's: see `Conv`.

    Examples
    --------
    >>> Dense().describe()
    'dense'
    >>> Dense(splits=(64, 64, 64)).describe()
    'dense, 3 blocks'
    >>> Dense(splits=(64, 64, 64), repeats=12).describe()
    'dense, 3 blocks in 12 turns'
    """

    out_axes: tuple[int, ...] = (0,)
    in_axes: tuple[int, ...] | None = None
    batch_axes: tuple[int, ...] = ()
    splits: tuple[int, ...] | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        fix = object.__setattr__
        fix(self, "out_axes", integers(self.out_axes, "out_axes"))
        fix(self, "batch_axes", integers(self.batch_axes, "batch_axes"))
        if self.in_axes is not None:
            fix(self, "in_axes", integers(self.in_axes, "in_axes"))
        if self.splits is not None:
            fix(self, "splits", integers(self.splits, "splits", least=1))
        fix(self, "repeats", integer(self.repeats, "repeats", least=1))
        if not self.out_axes:
            raise GeometryError("out_axes is empty: a matrix needs an output axis")
        if self.in_axes is not None and not self.in_axes:
            raise GeometryError("in_axes is empty: a matrix needs an input axis")
        if self.splits is not None and not self.splits:
            raise GeometryError("splits is empty: pass None for a single block")
        if self.repeats > 1 and self.splits is None:
            raise GeometryError(f"repeats={self.repeats} of what? Give the splits that repeat")
        named = self.out_axes + (self.in_axes or ()) + self.batch_axes
        if len(set(named)) != len(named):
            raise GeometryError(f"an axis is named twice in {self}")

    def describe(self) -> str:
        """The geometry in a few words."""
        text = "dense"
        if self.batch_axes:
            text += ", stacked"
        if self.splits:
            text += f", {len(self.splits)} blocks"
        if self.repeats > 1:
            text += f" in {self.repeats} turns"
        return text

    @property
    def has_size(self) -> bool:
        """True: a matrix has no other sizes than its own."""
        return True

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `GeometryError` if an array of this shape does not have this geometry."""
        _check(self, tuple(shape))

    def axes(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """(batch, out, in) as non-negative axes of an array with so many."""
        return _axes(self, (1,) * ndim)

    def blocks(self, w: Array) -> tuple[Array, ...]:
        """The matrices, one array of shape (*batch, rows, columns) per block of `splits`."""
        self.check(w.shape)
        xp = compat.array_namespace(w)
        batch, out, inn = _axes(self, tuple(w.shape))
        order = batch + out + inn
        if order != tuple(range(w.ndim)):
            w = xp.permute_dims(w, order)
        sizes = w.shape
        lead = sizes[: len(batch)]
        rows = math.prod(sizes[len(batch) : len(batch) + len(out)])
        matrix = xp.reshape(w, (*lead, rows, math.prod(sizes[len(batch) + len(out) :])))
        if self.splits is None:
            return (matrix,)
        ends = [sum(self.splits[: i + 1]) for i in range(len(self.splits))]
        if self.repeats > 1:
            matrix = xp.reshape(matrix, (*lead, self.repeats, ends[-1], matrix.shape[-1]))
        blocks = tuple(
            matrix[..., end - size : end, :] for end, size in zip(ends, self.splits, strict=True)
        )
        if self.repeats == 1:
            return blocks
        return tuple(xp.reshape(b, (*lead, -1, b.shape[-1])) for b in blocks)

    def matrix_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each block of an array of this shape."""
        _, out, inn = _axes(self, tuple(shape))
        rows, columns = (math.prod([shape[a] for a in axes]) for axes in (out, inn))
        return tuple((size * self.repeats, columns) for size in self.splits or (rows,))

    def assemble(self, blocks: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
        """The array of this shape whose `blocks` these are: the inverse of `blocks`."""
        xp = compat.array_namespace(blocks[0])
        if self.repeats > 1:
            blocks = tuple(
                xp.reshape(b, (*b.shape[:-2], self.repeats, -1, b.shape[-1])) for b in blocks
            )
        matrix = blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=-2)
        order = sum(_axes(self, tuple(shape)), ())
        w = xp.reshape(matrix, tuple(shape[a] for a in order))
        if order == tuple(range(len(shape))):
            return w
        return xp.permute_dims(w, tuple(order.index(a) for a in range(len(shape))))

    def transpose(self, ndim: int) -> Dense:
        """The geometry under which the same array stands for the transposed matrix."""
        if self.splits is not None:
            raise GeometryError("the transpose of split blocks is not a Dense geometry")
        batch, out, inn = self.axes(ndim)
        return Dense(out_axes=inn, in_axes=out, batch_axes=batch)


@lru_cache(maxsize=1024)
def _check(geometry: Dense, shape: tuple[int, ...]) -> None:
    _, out, _ = _axes(geometry, shape)
    if 0 in shape:
        raise GeometryError(f"the weight is empty: shape {shape}")
    rows = math.prod([shape[a] for a in out])
    total = sum(geometry.splits or (rows,)) * geometry.repeats
    if total != rows:
        times = f" in {geometry.repeats} turns" if geometry.repeats > 1 else ""
        raise GeometryError(
            f"splits={geometry.splits} add up to {total}{times}, but the output axes of "
            f"shape {shape} have {rows} entries"
        )


@lru_cache(maxsize=1024)
def _axes(geometry: Dense, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """(batch, out, in) as non-negative axes that cover the array."""
    ndim = len(shape)

    def positive(axes: tuple[int, ...], name: str) -> tuple[int, ...]:
        for a in axes:
            if not -ndim <= a < ndim:
                raise GeometryError(
                    f"{name}={axes} does not fit an array with {ndim} axes (shape {shape})"
                )
        return tuple(a % ndim for a in axes)

    batch = positive(geometry.batch_axes, "batch_axes")
    out = positive(geometry.out_axes, "out_axes")
    if geometry.in_axes is None:
        inn = tuple(a for a in range(ndim) if a not in batch + out)
    else:
        inn = positive(geometry.in_axes, "in_axes")
    if sorted(batch + out + inn) != list(range(ndim)) or not inn:
        raise GeometryError(
            f"{geometry} does not name every axis of an array of shape {shape} exactly once as "
            f"output, input or batch: a matrix needs at least one output and one input axis"
        )
    return batch, out, inn
