"""How far apart outputs are, relative to inputs, over pairs of samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.geometry.arguments import integer
from specops.measures.rows import row_norms, rows
from specops.typing import Array

_PAIRS_AT_ONCE = 256
"""Pairs whose differences are in memory at a time: a choice, as much as 256 samples take."""


def lipschitz_ratios(
    x: Array,
    fx: Array,
    *,
    other: tuple[Array, Array] | None = None,
    labels: Any = None,
    pairs: int = 2000,
    seed: int = 0,
) -> Array:
    r"""How far apart outputs are, relative to inputs, over pairs: an empirical Lipschitz constant.

    .. math:: \frac{\|f(x_i) - f(x_j)\|_2}{\|x_i - x_j\|_2}

    Each ratio is a lower bound of the Lipschitz constant. Their histogram and its 95th percentile
    tell how the function behaves between samples, not how it behaves in the worst case.

    Parameters
    ----------
    x, fx : array (n, ...)
        Inputs, and the outputs f(x). Axes after the first are flattened.
    other : (array (m, ...), array (m, ...)), optional
        Inputs y and outputs f(y) of a second set, such as generated samples: pairs are then
        :math:`(x_i, y_j)`, one of each set. None: pairs of two samples of the first.
    labels : array (n,), or pair of arrays (n,) and (m,) with `other`; optional
        Classes: pairs are then of one class. Of each random pair the class is drawn first,
        uniformly, as for a conditional generator.
    pairs : int
        How many random pairs to take; all pairs are taken if there are no more.
    seed : int
        Seed of the choice, which is the same on every backend.

    Returns
    -------
    array (pairs,)
        Fewer where inputs are equal: such pairs have no ratio.

    Raises
    ------
    ValueError
        There is no pair, because there are fewer than two samples or none of the same class; or
        the shapes or numbers of samples, or the numbers of labels, do not fit.

    References
    ----------
    Sanyal, Torr & Dokania 2020, section 5.3: figure 5 (real and generated samples), figures 12
    (of one class), 13 and 14 (one set).

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[4.0]])
    >>> np.sort(lipschitz_ratios(x, x ** 2)).tolist()
    [1.0, 2.0, 3.0]
    >>> np.sort(lipschitz_ratios(x, x ** 2, other=(y, y ** 2))).tolist()
    [4.0, 5.0, 6.0]
    >>> lipschitz_ratios(x, x ** 2, labels=["odd", "even", "odd"]).tolist()
    [2.0]
    """
    pairs = integer(pairs, "pairs", least=1)
    y, fy = (x, fx) if other is None else other
    counts = int(x.shape[0]), int(y.shape[0])
    fits = x.shape[1:] == y.shape[1:] and fx.shape[1:] == fy.shape[1:]
    if (int(fx.shape[0]), int(fy.shape[0])) != counts or not fits:
        found = [tuple(a.shape) for a in ((x, fx) if other is None else (x, fx, y, fy))]
        raise ValueError(
            f"inputs and outputs must be those of the same samples, of equal shapes: got {found}"
        )
    rng = np.random.Generator(np.random.Philox(key=[seed, counts[0]]))
    if labels is None:
        groups = [(np.arange(counts[0]), np.arange(counts[1]))]
    else:
        groups = _classes(labels, other is None, counts)
    first, second = _pairs(rng, groups, pairs, within=other is None)
    if not len(first):
        kind = "" if labels is None else " of one class"
        raise ValueError(f"no pairs: expected two or more samples{kind}, got {counts} of x, other")
    xp = arrays.namespace(x)
    near = _distances(x, y, first, second)
    far = _distances(fx, fy, first, second)
    kept = np.flatnonzero(arrays.to_numpy(near) != 0)  # keeps NaN, which should show
    chosen = arrays.constant(kept, near)
    return xp.take(far, chosen) / xp.take(near, chosen)


def _distances(x: Array, y: Array, first: np.ndarray, second: np.ndarray) -> Array:
    """Distances of pairs, in slices: not all differences have to fit into memory at once."""
    xp = arrays.namespace(x)
    a, b = map(rows, (x, y))
    parts = []
    for at in range(0, len(first), _PAIRS_AT_ONCE):
        i = arrays.constant(first[at : at + _PAIRS_AT_ONCE], a)
        j = arrays.constant(second[at : at + _PAIRS_AT_ONCE], b)
        parts.append(row_norms(xp.take(a, i, axis=0) - xp.take(b, j, axis=0)))
    return xp.concat(parts)


def _classes(
    labels: Any, within: bool, counts: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The members of every class that has a pair, in both sets."""
    given = (labels, labels) if within else tuple(labels)
    if len(given) != 2:
        raise ValueError(f"labels must be of both sets, (of x, of other): got {len(given)}")
    x, y = (arrays.to_numpy(v) if arrays.is_array(v) else np.asarray(v) for v in given)
    if (x.shape, y.shape) != ((counts[0],), (counts[1],)):
        raise ValueError(f"expected a label for each of {counts} samples, got {x.shape}, {y.shape}")
    members = [(np.flatnonzero(x == c), np.flatnonzero(y == c)) for c in np.unique(x)]
    return [(a, b) for a, b in members if len(b) > within]


def _pairs(
    rng: np.random.Generator,
    groups: list[tuple[np.ndarray, np.ndarray]],
    pairs: int,
    *,
    within: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of members of one group: all, or `pairs` random ones of random groups."""
    totals = [len(a) * (len(a) - 1) // 2 if within else len(a) * len(b) for a, b in groups]
    if not sum(totals):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    every = pairs >= sum(totals)
    drawn = np.zeros(pairs, np.int64) if len(groups) < 2 else rng.integers(0, len(groups), pairs)
    shares = np.bincount(drawn, minlength=len(groups))
    chosen = []
    for (a, b), share in zip(groups, shares, strict=True):
        if every:
            i, j = np.triu_indices(len(a), 1) if within else np.indices((len(a), len(b)))
        else:
            i = rng.integers(0, len(a), share)
            apart = rng.integers(1, len(a), share) if within else rng.integers(0, len(b), share)
            j = (i + apart) % len(a) if within else apart
        chosen.append((a[i].ravel(), b[j].ravel()))
    first, second = zip(*chosen, strict=True)
    return np.concatenate(first), np.concatenate(second)
