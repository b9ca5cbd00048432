"""Circular convolutions: all singular values, or the largest one, from the symbol's blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.arrays import host, workers
from specops.arrays.solvers import svd, svdvals
from specops.linalg.golub_kahan import largest_singular_triplet
from specops.maps.matrix import MatrixOperator
from specops.maps.symbol import Symbol
from specops.typing import Array, Namespace

_RANKING_STEPS = {True: 8, False: 24}
"""Power steps to rank the blocks, for blocks that are cheap to solve (True) and for others, which
are worth a better ranking. A choice that affects time only: no ranking changes the norm."""
_FEW_SHIFTS = 32
"""With at most so many shifts (5² taps, say) one complex product makes the blocks, instead of two
real ones and a copy, which save half the multiplications. A choice."""
_KEPT_GRAM_BYTES = 2**28
"""Gram matrices of at most so many bytes are kept from the estimates for the certificates, not
formed twice: a choice of memory, 256 MiB."""
_DIRECT_BELOW = 160
"""Below this smaller side of a block, all eigenvalues of its Gram matrix are computed; from it on,
Lanczos finds the largest. A choice that affects time only: both are exact."""


def torus_values(xp: Namespace, kernel: Array, symbol: Symbol) -> Array:
    """All singular values on the symbol's torus, descending."""
    on_host = arrays.on_host(kernel)
    if on_host is not None:
        per_block = block_values(np, symbol.coefficients(np, on_host), symbol)
        values = np.repeat(per_block, symbol.counts, axis=0).ravel()
        values.sort()
        zeros = np.zeros(symbol.zero_values, values.dtype)
        return arrays.from_host(np.concatenate([values[::-1], zeros]), kernel)
    per_block = block_values(xp, symbol.coefficients(xp, kernel), symbol)
    repeated = xp.take(per_block, arrays.constant(symbol.multiplicities, per_block), axis=0)
    values = xp.reshape(repeated, (-1,))
    if symbol.zero_values:
        values = xp.concat([values, arrays.zeros((symbol.zero_values,), like=values)])
    return xp.sort(values, descending=True)


def block_values(xp: Namespace, coefficients: Array, symbol: Symbol) -> Array:
    """Singular values of each block, (frequencies, groups, values), descending."""
    if not arrays.by_workers(coefficients):
        return svdvals(xp, symbol.blocks(xp, coefficients))

    def work(chunk: slice) -> np.ndarray:
        return host.stack_svdvals(host_blocks(coefficients, symbol, chunk))

    parts = workers.map_chunks(work, len(symbol.frequencies), block_bytes(coefficients))
    return np.concatenate(parts).astype(coefficients.real.dtype, copy=False)


@dataclass(frozen=True)
class Leading:
    """The block with the largest singular value, and where it is."""

    norm: Array
    frequency: Array
    """Index into `Symbol.frequencies`, shape (1,)."""
    group: Array
    """Shape (1,)."""


def leading_block(xp: Namespace, kernel: Array, symbol: Symbol) -> Leading:
    """Find the largest singular value on the symbol's torus."""
    groups = symbol.sizes.groups
    on_host = arrays.on_host(kernel)
    if on_host is not None:
        norm, index = _HostSearch(symbol.coefficients(np, on_host), symbol).run()
        where = np.array([index // groups]), np.array([index % groups])
        value = arrays.from_host(np.asarray(norm, dtype=on_host.real.dtype), kernel)
        return Leading(value, *(arrays.constant(i, kernel) for i in where))
    norms = svdvals(xp, symbol.blocks(xp, symbol.coefficients(xp, kernel)))[..., 0]
    flat = arrays.argmax(xp, norms)
    return Leading(xp.max(norms), flat // groups, flat % groups)


def leading_norm(
    coefficients: np.ndarray, symbol: Symbol, margin: float = 0.0, expected: float | None = None
) -> tuple[float, np.ndarray]:
    """(σ₁ of coefficients on the host, the blocks that may exceed σ₁·(1 − margin)).

    The latter are indices (count, 2) over frequency and group. If σ₁ is near the `expected` value,
    the search costs only a certificate of that value and a few blocks.
    """
    search = _HostSearch(coefficients, symbol, margin)
    norm, _ = search.run(expected)
    return norm, np.stack(np.divmod(search.near, symbol.sizes.groups), axis=-1)


def ranked_blocks(coefficients: np.ndarray, symbol: Symbol) -> np.ndarray:
    """Indices of blocks over frequencies and groups, by decreasing estimates of their norms."""
    return np.argsort(-_estimates(coefficients, symbol), kind="stable")


def likely_block(xp: Namespace, kernel: Array, symbol: Symbol) -> Leading:
    """`leading_block`, or a likely one by cheaper estimates in single precision, to start from.

    The kernel's entries have to be near 1.
    """
    on_host = arrays.on_host(kernel)
    if on_host is None:
        return leading_block(xp, kernel, symbol)
    single = on_host.astype(np.complex64 if np.iscomplexobj(on_host) else np.float32)
    squares = _estimates(symbol.coefficients(np, single), symbol)
    best = np.argmax(squares, keepdims=True)
    norm = np.sqrt(squares[best], dtype=on_host.real.dtype).reshape(())
    where = np.divmod(best, symbol.sizes.groups)
    return Leading(arrays.from_host(norm, kernel), *(arrays.constant(i, kernel) for i in where))


def _estimates(coefficients: np.ndarray, symbol: Symbol) -> np.ndarray:
    """Lower bounds of the squared norm of every block."""
    with workers.one_blas_thread():
        return _HostSearch(coefficients, symbol).estimates()


def leading_vectors(
    xp: Namespace, kernel: Array, symbol: Symbol, leading: Leading
) -> tuple[Array, Array, Array, Array]:
    """(u, vᴴ, cos, sin) of the leading block: singular vectors, and cos θ·b and sin θ·b."""
    block, cos, sin = leading_matrix(xp, kernel, symbol, leading)
    u, _, vh = svd(xp, block)
    return u[:, 0], vh[0, :], cos, sin


def leading_matrix(
    xp: Namespace, kernel: Array, symbol: Symbol, leading: Leading
) -> tuple[Array, Array, Array]:
    """(the leading block, cos θ·b, sin θ·b)."""
    angles = xp.take(arrays.constant(symbol.angles, kernel), leading.frequency, axis=0)[0, :]
    cos, sin = xp.cos(angles), xp.sin(angles)
    coefficients = xp.reshape(
        symbol.coefficients(xp, kernel), (len(symbol.angles[0]), symbol.sizes.groups, -1)
    )
    own = xp.take(coefficients, leading.group, axis=1)[:, 0, :]
    if arrays.is_complex(own):
        block = arrays.complex_of(xp, cos, sin) @ own
    else:
        block = arrays.complex_of(xp, cos @ own, sin @ own)
    return xp.reshape(block, symbol.block_shape), cos, sin


def host_blocks(coefficients: np.ndarray, symbol: Symbol, chunk: slice | np.ndarray) -> np.ndarray:
    """`Symbol.blocks` on the host; with few shifts by one complex product."""
    if symbol.angles.shape[1] > _FEW_SHIFTS:
        return np.asarray(symbol.blocks(np, coefficients, chunk))
    double = coefficients.real.dtype == np.float64
    kind = np.complex128 if double else np.complex64
    phases = np.exp(1j * symbol.angles[chunk]).astype(kind)
    blocks: np.ndarray = phases @ coefficients.astype(kind, copy=False)
    return blocks.reshape(-1, symbol.sizes.groups, *symbol.block_shape)


def block_bytes(coefficients: np.ndarray) -> int:
    return int(coefficients.shape[1]) * (16 if coefficients.real.dtype == np.float64 else 8)


def map_blocks(
    xp: Namespace,
    symbol: Symbol,
    coefficients: Array,
    work: Callable[[Array, Any], Any],
    chosen: np.ndarray | None = None,
) -> list[Any]:
    """``work(blocks, which)`` over all frequencies, or those `chosen`: in chunks on the host, on
    devices all at once. `which` is a slice of the frequencies, or their indices."""
    count = len(symbol.frequencies) if chosen is None else len(chosen)
    if arrays.by_workers(coefficients):

        def on_host(chunk: slice) -> Any:
            which = chunk if chosen is None else chosen[chunk]
            return work(host_blocks(coefficients, symbol, which), which)

        return workers.map_chunks(on_host, count, block_bytes(coefficients))
    whole = slice(0, count) if chosen is None else chosen
    return [work(symbol.blocks(xp, coefficients, whole), whole)]


class _HostSearch:
    """σ₁ over all blocks: estimate each, solve the most promising, rule the others out.

    Power iteration on the Gram matrices ranks the blocks, the first is solved exactly, and a
    Cholesky factor of σ²I − G certifies each other block below it. Blocks without that
    certificate are solved in turn until none is left.
    """

    def __init__(self, coefficients: np.ndarray, symbol: Symbol, margin: float = 0.0) -> None:
        self.symbol = symbol
        self.margin = margin
        self.near = np.zeros(0, int)
        self.coefficients = coefficients
        self.small = min(symbol.block_shape)
        self.count = len(symbol.angles) * symbol.sizes.groups
        self.block_bytes = block_bytes(self.coefficients)
        self.kept: dict[int, np.ndarray] | None = {}
        if self.count * self.small**2 * self.coefficients.real.itemsize * 2 > _KEPT_GRAM_BYTES:
            self.kept = None

    def run(self, expected: float | None = None) -> tuple[float, int]:
        """(σ₁, index of its block over frequencies and groups)."""
        with workers.one_blas_thread():
            if expected is not None:
                self.near = self._above(expected * (1.0 - self.margin))
                if len(self.near):
                    best = int(self.near[0])
                    return self._best(self._solve(best), best, self.near[1:])
            return self._search()

    def estimates(self) -> np.ndarray:
        """Lower bounds of the squared norm of every block."""
        return np.concatenate(self._chunks(self._estimate))

    def _search(self) -> tuple[float, int]:
        estimates = self.estimates()
        best = int(np.argmax(estimates))
        sigma = self._solve(best)
        self.near = np.union1d(self._above(sigma * (1.0 - self.margin)), best)
        doubtful = self.near[self.near != best]
        return self._best(sigma, best, doubtful[np.argsort(-estimates[doubtful], kind="stable")])

    def _above(self, sigma: float) -> np.ndarray:
        """Indices of blocks whose norm may exceed σ."""
        return np.flatnonzero(
            np.concatenate(self._chunks(lambda chunk: self._exceeds(chunk, sigma)))
        )

    def _best(self, sigma: float, best: int, doubtful: np.ndarray) -> tuple[float, int]:
        """The largest of σ and the norms of the doubtful blocks, and its block."""
        for candidate in map(int, doubtful):
            if host.exceeds(self._gram(candidate), sigma):
                value = self._solve(candidate)
                if value > sigma:
                    sigma, best = value, candidate
        return sigma, best

    def _chunks(self, work: Callable[[slice], np.ndarray]) -> list[np.ndarray]:
        return workers.map_chunks(work, len(self.symbol.angles), self.block_bytes)

    def _grams(self, chunk: slice) -> np.ndarray:
        if self.kept is not None and chunk.start in self.kept:
            return self.kept[chunk.start]
        blocks = host_blocks(self.coefficients, self.symbol, chunk)
        grams = host.gram(blocks).reshape(-1, self.small, self.small)
        if self.kept is not None:
            self.kept[chunk.start] = grams
        return grams

    def _estimate(self, chunk: slice) -> np.ndarray:
        grams = self._grams(chunk)
        start = arrays.start_vector("torus", 2 * self.small).astype(grams.real.dtype)
        v = np.broadcast_to(start.view(grams.dtype)[:, None], (len(grams), self.small, 1))
        norm = np.ones((len(grams), 1, 1), grams.real.dtype)
        for _ in range(_RANKING_STEPS[self.small < _DIRECT_BELOW]):
            v = grams @ (v / norm)
            norm = np.linalg.norm(v, axis=-2, keepdims=True)
            norm[norm == 0] = 1
        return np.asarray(norm.ravel())

    def _exceeds(self, chunk: slice, sigma: float) -> np.ndarray:
        return host.exceeds(self._grams(chunk), sigma)

    def _gram(self, index: int) -> np.ndarray:
        return host.gram(self._block(index))

    def _block(self, index: int) -> np.ndarray:
        frequency, group = divmod(index, self.symbol.sizes.groups)
        blocks = host_blocks(self.coefficients, self.symbol, slice(frequency, frequency + 1))
        return np.asarray(blocks[0, group])

    def _solve(self, index: int) -> float:
        block = self._block(index).astype(np.complex128)
        if self.small < _DIRECT_BELOW:
            return float(np.sqrt(max(np.linalg.eigvalsh(host.gram(block))[-1], 0.0)))
        start = arrays.start_vector("block", 2 * block.shape[1]).view(np.complex128)
        _, sigma, _ = largest_singular_triplet(np, MatrixOperator(block), start)
        return float(sigma)
