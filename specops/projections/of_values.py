"""Matrices with the singular vectors of a weight and other singular values."""

from __future__ import annotations

from collections.abc import Callable

from specops.geometry import Dense
from specops.maps.prepare import MatrixBlock, Prepared, matrix_blocks
from specops.typing import Array

Change = Callable[[MatrixBlock], Array | None]


def changed_blocks(given: Prepared, w: Array, change: Change) -> Array:
    """`w` with ``change(block)`` in place of each block of matrices; None keeps the block.

    Matrices that are not finite stay as they were. If nothing changes, the result is `w` itself.
    """
    assert isinstance(given.geometry, Dense)
    blocks = matrix_blocks(given)
    results = [change(block) for block in blocks]
    if all(result is None for result in results):
        return w
    kept = given.geometry.blocks(w)
    matrices = tuple(
        old if new is None else given.xp.where(block.finite[..., None, None], new, old)
        for new, old, block in zip(results, kept, blocks, strict=True)
    )
    return given.geometry.assemble(matrices, tuple(w.shape))
