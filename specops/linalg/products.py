"""A matrix times a few vectors, from either side.

torch computes these products with one thread on the CPU, at a third of the speed of memory. As
a stack of products with blocks of rows they use all threads.
"""

from __future__ import annotations

import sys
from typing import Any

from specops import backend, host

Array = Any
SPLIT_FROM = 2**16
"""Entries of a matrix from which threads pay."""


def matvec(a: Array, x: Array) -> Array:
    """Ax."""
    return images(a, x[None, :])[0, :] if _blocks(a) is not None else backend.matmul(a, x)


def images(a: Array, x: Array) -> Array:
    """The rows of x as Ax, again as rows."""
    blocks = _blocks(a)
    if blocks is None:
        return backend.matmul(x, backend.namespace(a).matrix_transpose(a))
    count, rows, columns = blocks.shape
    found = x.expand(count, len(x), columns) @ blocks.mT
    return found.transpose(0, 1).reshape(len(x), count * rows)


def coimages(a: Array, x: Array) -> Array:
    """The rows of x as Aᵀx, again as rows, without conjugation."""
    blocks = _blocks(a)
    if blocks is None:
        return backend.matmul(x, a)
    count, rows, _ = blocks.shape
    return (x.reshape(len(x), count, rows).transpose(0, 1) @ blocks).sum(0)


def _blocks(a: Array) -> Array | None:
    """The matrix as a stack of blocks of rows, where its products are better taken so."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(a, torch.Tensor) or not host.holds(a):
        return None
    if a.numel() < SPLIT_FROM or not a.is_contiguous():
        return None
    threads = torch.get_num_threads()
    count = next((c for c in (2 * threads, threads) if threads > 1 and len(a) % c == 0), 0)
    return a.view(count, -1, a.shape[1]) if count else None
