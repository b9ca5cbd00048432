"""Circular convolutions: leading singular triplets, from singular vectors of blocks and waves."""

from __future__ import annotations

import math

import numpy as np

from specops import arrays
from specops.arrays.solvers import svd
from specops.maps.symbol import Symbol
from specops.spectra.torus import block_values
from specops.typing import Array, Namespace


def torus_triplets(xp: Namespace, kernel: Array, symbol: Symbol, k: int) -> tuple[Array, ...]:
    r"""(u, s, v) for the `k` largest values of a circular convolution, whose weight is concrete.

    A singular vector of the block at θ belongs to the wave :math:`e^{i\theta q}` on the coarse
    grid, times :math:`\sqrt 2` and its real or imaginary part where the kernel is real and −θ is
    another frequency.

    Parameters
    ----------
    xp : namespace
        The kernel's array namespace.
    kernel : array, shape (groups, rows, columns, \*taps)
        The kernel as `Conv.kernel` gives it.
    symbol : Symbol
        The symbol on the grid of the convolution.
    k : int
        How many values; at most as many as all blocks have together, without the
        ``symbol.zero_values``.
    """
    on_host = arrays.on_host(kernel)
    if on_host is not None:
        found = _triplets(np, on_host, symbol, k)
        return tuple(arrays.from_host(np.ascontiguousarray(part), kernel) for part in found)
    return _triplets(xp, kernel, symbol, k)


def _triplets(xp: Namespace, kernel: Array, symbol: Symbol, k: int) -> tuple[Array, ...]:
    sizes, coefficients = symbol.sizes, symbol.coefficients(xp, kernel)
    block, mirrored, wave, odd = _waves(symbol)
    values = block_values(xp, coefficients, symbol)
    # Indexed by wave, group and position within a block.
    every = xp.reshape(xp.take(values, arrays.constant(block, values), axis=0), (-1,))
    known = arrays.to_numpy(arrays.stop_gradient(every))
    best = np.argsort(-known, kind="stable")[:k]
    waves, groups, places = np.unravel_index(best, (len(block), sizes.groups, values.shape[-1]))

    pairs, at = np.unique(block[waves] * sizes.groups + groups, return_inverse=True)
    u, vh = _vectors(xp, coefficients, symbol, pairs)
    one = at * values.shape[-1] + places
    left, right = (_rows(xp, z, one) for z in (xp.matrix_transpose(u), vh))
    flip = arrays.constant(mirrored[waves][:, None], left)
    left = xp.where(flip, arrays.conjugate(xp, left), left)
    right = xp.where(flip, right, arrays.conjugate(xp, right))

    coarse, fine, phases = _positions(symbol)
    left = _on_grid(left[:, :, None], wave[waves], coarse, symbol)
    right = xp.reshape(right, (k, symbol.phases, sizes.columns))
    # The vectors are zero at phases that no tap reads.
    seen = arrays.constant((phases >= 0).astype(float), right)
    right = xp.take(right, arrays.constant(np.maximum(phases, 0), right), axis=1)
    right = xp.matrix_transpose(right) * xp.astype(seen, right.dtype)
    right = _on_grid(right, wave[waves], fine, symbol)
    if not arrays.is_complex(kernel):
        alone = _is_own_mirror(wave[waves], symbol.coarse)[:, None, None]
        lengths = arrays.constant(np.where(alone, 1.0, math.sqrt(2.0)), kernel)
        imaginary = arrays.constant(odd[waves][:, None, None], kernel)
        left, right = (lengths * xp.where(imaginary, xp.imag(z), xp.real(z)) for z in (left, right))
    u, v = (_in_group(xp, z, groups, sizes.groups) for z in (left, right))
    return u, xp.take(every, arrays.constant(best, every), axis=0), v


def _vectors(
    xp: Namespace, coefficients: Array, symbol: Symbol, pairs: np.ndarray
) -> tuple[Array, Array]:
    """u and vᴴ of chosen blocks, indexed over frequencies and groups. Real blocks get real vectors,
    in the complex dtype."""
    groups = symbol.sizes.groups
    frequencies, group = np.divmod(pairs, groups)
    own = xp.reshape(symbol.blocks(xp, coefficients, frequencies), (-1, *symbol.block_shape))
    own = xp.take(own, arrays.constant(np.arange(len(pairs)) * groups + group, own), axis=0)
    periods = tuple(axis.period for axis in symbol.axes)
    real = _is_own_mirror(symbol.frequencies[frequencies], periods) & symbol.conjugate_pairs
    parts = []
    for which, part in ((np.flatnonzero(real), xp.real), (np.flatnonzero(~real), None)):
        if len(which):
            some = xp.take(own, arrays.constant(which, own), axis=0)
            u, _, vh = svd(xp, some if part is None else part(some))
            parts.append((xp.astype(u, own.dtype), xp.astype(vh, own.dtype)))
    back = arrays.constant(np.argsort(np.argsort(~real, kind="stable")), own)
    u, vh = (xp.take(xp.concat(z, axis=0), back, axis=0) for z in zip(*parts, strict=True))
    return u, vh


def _waves(symbol: Symbol) -> tuple[np.ndarray, ...]:
    """For each frequency of the coarse grid: (the index of the block that its vectors come from,
    whether they are conjugated, the frequency of its wave (axes,), whether the wave is the
    imaginary part)."""
    grid = np.indices(symbol.coarse).reshape(len(symbol.coarse), -1)
    odd = np.zeros(grid.shape[1], bool)
    if symbol.conjugate_pairs:
        sides = np.array(symbol.coarse)[:, None]
        mirror = np.ravel_multi_index(tuple(-grid % sides), symbol.coarse)
        odd = np.arange(len(mirror)) > mirror
        grid = np.where(odd, -grid % sides, grid)
    periods = tuple(axis.period for axis in symbol.axes)
    own = np.ravel_multi_index(tuple(grid % np.array(periods)[:, None]), periods)
    index = np.full(math.prod(periods), -1)
    index[np.ravel_multi_index(tuple(symbol.frequencies.T), periods)] = np.arange(
        len(symbol.frequencies)
    )
    other = np.ravel_multi_index(tuple(-grid % np.array(periods)[:, None]), periods)
    mirrored = index[own] < 0
    return np.where(mirrored, index[other], index[own]), mirrored, grid.T, odd


def _is_own_mirror(frequencies: np.ndarray, periods: tuple[int, ...]) -> np.ndarray:
    return np.asarray((2 * frequencies % np.array(periods) == 0).all(axis=1))


def _positions(symbol: Symbol) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (axes, points) of the points of the coarse and of the fine grid, in turns of a
    wave, and the phases of the fine points: −1 where none is read."""
    sizes = symbol.sizes
    assert sizes.lower is not None
    coarse = np.indices(symbol.coarse).reshape(len(symbol.coarse), -1)
    fine = np.indices(symbol.fine).reshape(len(symbol.fine), -1)
    phases, places = np.zeros(fine.shape[1], int), []
    for t, axis in enumerate(symbol.axes):
        # Output p reads entry s·p + d·a − lower.
        seen = (fine[t] + sizes.lower[t]) % symbol.fine[t]
        turn, phase = np.divmod(seen, sizes.stride[t])
        index = np.searchsorted(axis.read_phases, phase)
        index = np.minimum(index, axis.phases - 1)
        known = np.array(axis.read_phases)[index] == phase
        phases = np.where((phases < 0) | ~known, -1, phases * axis.phases + index)
        places.append(turn - np.array(axis.firsts)[index])
    return coarse, np.stack(places), phases


def _on_grid(vectors: Array, waves: np.ndarray, places: np.ndarray, symbol: Symbol) -> Array:
    """Vectors (k, channels, 1 or points) times their waves: (k, channels, points), unit length."""
    sides = np.array(symbol.coarse)
    turns = sum(np.outer(waves[:, t], places[t]) % sides[t] / sides[t] for t in range(len(sides)))
    waved = np.exp(2j * np.pi * turns) / math.sqrt(math.prod(symbol.coarse))
    return vectors * arrays.constant(waved, vectors, complex=True)[:, None, :]


def _in_group(xp: Namespace, vectors: Array, groups: np.ndarray, count: int) -> Array:
    """Vectors (k, channels, points) of one group each, as columns (all channels · points, k)."""
    one_hot = xp.astype(arrays.constant(np.eye(count)[groups], vectors), vectors.dtype)
    spread = one_hot[:, :, None, None] * vectors[:, None, :, :]
    return xp.matrix_transpose(xp.reshape(spread, (vectors.shape[0], -1)))


def _rows(xp: Namespace, stack: Array, which: np.ndarray) -> Array:
    """Rows of stacked matrices, indexed through the whole stack."""
    flat = xp.reshape(stack, (-1, stack.shape[-1]))
    return xp.take(flat, arrays.constant(which, flat), axis=0)
