"""Half-spaces that contain the ball of a layer's own operator, by pairs of vectors of its size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from specops import arrays
from specops.arrays import host
from specops.errors import StateError
from specops.linalg.block_krylov import krylov_triplets
from specops.linalg.nonnegative_qp import nonnegative_qp
from specops.maps.explicit import ExplicitMap
from specops.projections.kernels.states import state_of, unit_rows
from specops.typing import Array, State

MOST_AT_ONCE = 64
"""Most cuts that one evaluation of a kernel gives: a choice, like the number that is active at the
end."""
KRYLOV_FROM = 256
"""For a larger smaller side, leading triplets come from a block Krylov space: at 1024² this takes
0.1 s, against 0.33 s by eigenvectors; at 512² 0.02 against 0.05 s."""
_WIDTH, _DEPTH = 16, 10
"""The width and depth of that space: a kernel of 64² channels on 4² points took 8 rounds and 1.5 s
at 0.9·σ₁. With a depth of 6 norms are too low by 0.3 %, and certificates that use them are
wrong."""
_KEYS = ("group", "left", "right", "weight")


@dataclass(frozen=True)
class LayerCuts:
    """N cuts ⟨X, E⟩ = Re(uᴴ A(X) v) ≤ ‖A(X)‖ with non-negative weights.

    Attributes
    ----------
    group : int array, shape (N,)
    left, right : arrays, shape (N, outputs) and (N, inputs)
        Unit vectors u and v.
    weight : float array, shape (N,)
    normal : array, shape (N, entries)
        E in the kernel of the group.
    """

    group: np.ndarray
    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray
    normal: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def of(
        cls,
        layer: ExplicitMap,
        group: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        weight: np.ndarray,
    ) -> LayerCuts:
        """Cuts from their vectors, with the normals computed."""
        return cls(group, left, right, weight, layer.normals(left, right))

    @classmethod
    def none(cls, layer: ExplicitMap, dtype: np.dtype) -> LayerCuts:
        """No cut at all."""
        left, right = (np.zeros((0, n), dtype) for n in layer.shape)
        return cls.of(layer, np.zeros(0, np.int64), left, right, np.zeros(0))

    def joined(self, other: LayerCuts) -> LayerCuts:
        """These cuts followed by the others."""
        pairs = ((getattr(self, key), getattr(other, key)) for key in (*_KEYS, "normal"))
        return LayerCuts(*(np.concatenate(pair) for pair in pairs))

    def taken(self, index: np.ndarray) -> LayerCuts:
        """The cuts at these indices."""
        return LayerCuts(*(getattr(self, key)[index] for key in (*_KEYS, "normal")))

    def inner(self, kernel: np.ndarray) -> np.ndarray:
        """⟨X, E⟩ of each cut."""
        own = kernel.reshape(len(kernel), -1)[self.group]
        return np.asarray(np.sum(self.normal.conj() * own, axis=1).real)

    def solved(self, kernel: np.ndarray, limit: float) -> LayerCuts:
        """The cuts that are active at the point nearest to K, with their multipliers."""
        gram = (self.normal.conj() @ self.normal.T).real
        gram = gram * (self.group[:, None] == self.group[None, :])
        weight = nonnegative_qp(gram, self.inner(kernel) - limit, self.weight)
        return replace(self, weight=weight).taken(np.flatnonzero(weight > 0))

    def combined(self, like: np.ndarray) -> np.ndarray:
        """Σ weight·E, a kernel."""
        total = (np.eye(len(like))[:, self.group] * self.weight) @ self.normal
        return np.asarray(total.reshape(like.shape))

    def matrices(self, layer: ExplicitMap) -> np.ndarray:
        """Σ weight·u vᴴ, (groups, outputs, inputs)."""
        total = np.zeros((layer.sizes.groups, *layer.shape), self.left.dtype)
        for group in np.unique(self.group):
            own = self.group == group
            weighted = self.weight[own, None] * self.left[own]
            total[group] = weighted.T @ self.right[own].conj()
        return total

    def state(self, like: Array) -> State:
        """As arrays of the library and device of `like`."""
        return state_of({key: getattr(self, key) for key in _KEYS}, like)

    @staticmethod
    def made(state: State) -> bool:
        """Whether `state` was made by such cuts, of whatever layer."""
        return set(state) == set(_KEYS) and all(arrays.is_array(x) for x in state.values())

    @classmethod
    def from_state(cls, state: State, layer: ExplicitMap, dtype: np.dtype) -> LayerCuts:
        """The cuts that `state` saved; raises StateError if they are of another geometry."""
        if not cls.made(state):
            raise StateError(f"the state must hold arrays {', '.join(_KEYS)}, got {sorted(state)}")
        group, left, right, weight = (arrays.to_numpy(state[key]) for key in _KEYS)
        (outputs, inputs), count = layer.shape, weight.shape
        shapes = (group.shape, left.shape, right.shape)
        if len(count) != 1 or shapes != (count, (*count, outputs), (*count, inputs)):
            raise StateError(
                f"the state belongs to another kernel or grid than an operator of {outputs}×"
                f"{inputs} entries: pass state=None to start afresh"
            )
        inside = bool(((group >= 0) & (group < layer.sizes.groups)).all())
        real = dtype.kind == "c" or left.dtype.kind == right.dtype.kind == "f"
        if not inside or not real or not all(np.isfinite(x).all() for x in (left, right, weight)):
            raise StateError("the state is damaged: pass state=None to start afresh")
        left, right = (unit_rows(x.astype(dtype)) for x in (left, right))
        weight = np.maximum(weight.astype(float), 0.0)
        return cls.of(layer, group.astype(np.int64), left, right, weight)


def above(
    layer: ExplicitMap, matrices: np.ndarray, limit: float, *, exact: bool
) -> tuple[float, LayerCuts, bool]:
    """(σ₁, cuts by the largest singular values above the limit, whether both are exact).

    The weights are the values; there are at most `MOST_AT_ONCE` cuts. Unless `exact` is asked for,
    σ₁ of large matrices is a lower bound, and some values may be missing.
    """
    sure = exact or min(layer.shape) <= KRYLOV_FROM
    if sure:
        values, vectors = np.linalg.eigh(host.gram(matrices))
        largest = float(np.sqrt(max(values.max(), 0.0)))
        group, position = np.nonzero(values > limit**2)
        left, right, sigma = _pairs(matrices, vectors, group, position)
    else:
        group, left, sigma, right = _leading(layer, matrices, limit)
        largest = float(sigma.max())
    chosen = np.argsort(-sigma, kind="stable")[:MOST_AT_ONCE]
    chosen = chosen[sigma[chosen] > limit]
    cuts = LayerCuts.of(layer, group[chosen], left[chosen], right[chosen], sigma[chosen])
    return largest, cuts, sure


def _leading(
    layer: ExplicitMap, matrices: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(group, u, σ, v) of the leading triplets of each group, rows per triplet."""
    noise = arrays.start_vector("layer", _WIDTH * layer.shape[1]).reshape(-1, _WIDTH)
    parts = []
    for index, matrix in enumerate(matrices):
        u, sigma, v = krylov_triplets(matrix, noise, _DEPTH)
        kept = max(1, int((sigma > limit).sum()))
        parts.append((np.full(kept, index), u.T[:kept], sigma[:kept], unit_rows(v.T[:kept])))
    group, left, sigma, right = (np.concatenate(p) for p in zip(*parts, strict=True))
    return group, left, sigma, right


def excess(
    layer: ExplicitMap, matrices: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(matrices with clipped singular values, the part removed, the excess of each value)."""
    values, vectors = np.linalg.eigh(host.gram(matrices))
    sigma = np.sqrt(np.maximum(values, 0.0))
    over = np.maximum(sigma - limit, 0.0)
    kept = (
        vectors * (over / np.where(over > 0, sigma, 1.0))[:, None, :]
    ) @ vectors.conj().swapaxes(-1, -2)
    wide = layer.shape[0] <= layer.shape[1]
    taken = kept @ matrices if wide else matrices @ kept
    return matrices - taken, taken, over


def _pairs(
    matrices: np.ndarray, vectors: np.ndarray, group: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, v, σ) from eigenvectors of the smaller Gram matrices."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    own = vectors[group, :, position]
    size = matrices.shape[-1] if wide else matrices.shape[-2]
    other = np.zeros((len(own), size), matrices.dtype)
    for g in np.unique(group):
        chosen = group == g
        if wide:
            other[chosen] = (own[chosen].conj() @ matrices[g]).conj()
        else:
            other[chosen] = own[chosen] @ matrices[g].T
    sigma = np.linalg.norm(other, axis=1)
    other = other / np.where(sigma > 0, sigma, 1.0)[:, None]
    return (own, other, sigma) if wide else (other, own, sigma)
