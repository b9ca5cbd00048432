"""Several leading singular triplets of a matrix at once, from one block Krylov space."""

from __future__ import annotations

import numpy as np


def krylov_triplets(
    a: np.ndarray, start: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, Σ, V) of A on the span of S, (AᴴA)S, ..., (AᴴA)^depth S, values descending.

    Each value is at most the singular value of A of its rank. Orthogonalised twice, block by
    block.

    Parameters
    ----------
    a : array, shape (m, n)
        A NumPy array.
    start : array, shape (n, width)
        S, of full rank; (depth + 1)·width ≤ min(m, n).
    depth : int
        Products with AᴴA.

    References
    ----------
    Golub & Underwood 1977; Musco & Musco 2015.
    """
    width, adjoint = start.shape[1], a.conj().T
    basis = np.empty((a.shape[1], width * (depth + 1)), np.result_type(a, start))
    basis[:, :width] = np.linalg.qr(start)[0]
    for end in range(width, basis.shape[1], width):
        before = basis[:, :end]
        block = adjoint @ (a @ before[:, end - width :])
        for _ in range(2):
            block = np.linalg.qr(block - before @ (before.conj().T @ block))[0]
        basis[:, end : end + width] = block
    # In an exhausted space the rest was noise, which after normalisation lies in the space again.
    basis = np.linalg.qr(basis)[0]
    u, s, qh = np.linalg.svd(a @ basis, full_matrices=False)
    return u, s, basis @ qh.conj().T
