"""Half-spaces that contain the operator ball, each of which constrains many singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.linalg.nonnegative_qp import nonnegative_qp
from specops.projections.kernels.states import state_of
from specops.projections.kernels.support import Support
from specops.typing import Array, State


@dataclass(frozen=True)
class HalfSpaces:
    """N half-spaces ⟨X, E⟩ ≤ c·ν that contain the ball of every c, with non-negative weights.

    Attributes
    ----------
    direction : array, shape (N, shifts, entries)
        E = A*Z in the coordinates of the support, float64 or complex128.
    nuclear : float array, shape (N,)
        ν ≥ ‖Z‖_*.
    weight : float array, shape (N,)
    """

    direction: np.ndarray
    nuclear: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def none(cls, like: np.ndarray) -> HalfSpaces:
        """No half-space at all, for kernels of this shape and dtype."""
        return cls(np.zeros((0, *like.shape), like.dtype), np.zeros(0), np.zeros(0))

    @property
    def _flat(self) -> np.ndarray:
        return self.direction.reshape(len(self), math.prod(self.direction.shape[1:]))

    def joined(self, planes: Sequence[tuple[np.ndarray, float]]) -> HalfSpaces:
        """These half-spaces, and further (E, ν) without weight."""
        directions, nuclear = zip(*planes, strict=True)
        return HalfSpaces(
            np.concatenate([self.direction, np.stack(directions)]),
            np.append(self.nuclear, nuclear),
            np.append(self.weight, np.zeros(len(planes))),
        )

    def inner(self, support: Support, x: np.ndarray) -> np.ndarray:
        """⟨X, E⟩/ν for each half-space, a lower bound of ‖A(X)‖."""
        del support
        values = (self._flat.conj() @ x.reshape(-1)).real
        return np.asarray(values / np.where(self.nuclear > 0, self.nuclear, np.inf))

    def nearest(self, kernel: np.ndarray, limit: float) -> tuple[HalfSpaces, float, np.ndarray]:
        """(the active half-spaces, ½‖K − X‖², X), X being the nearest point that is in all."""
        flat = self._flat
        gram = (flat.conj() @ flat.T).real
        linear = (flat.conj() @ kernel.reshape(-1)).real - limit * self.nuclear
        weight = nonnegative_qp(gram, linear, self.weight)
        dual = float(linear @ weight - 0.5 * weight @ gram @ weight)
        x = kernel - (weight @ flat).reshape(kernel.shape)
        kept = weight > 0
        return HalfSpaces(self.direction[kept], self.nuclear[kept], weight[kept]), dual, x

    def state(self, support: Support, like: Array) -> State:
        """The weighted sum, which bounds the distance from below as well as all of them do."""
        values = {
            "direction": np.tensordot(self.weight, self.direction, 1),
            "nuclear": np.asarray(self.weight @ self.nuclear),
            "taps": support.signature,
        }
        return state_of(values, like)

    @staticmethod
    def made(state: State) -> bool:
        """Whether `state` has the entries of one that a half-space saved."""
        return set(state) == {"direction", "nuclear", "taps"}

    @classmethod
    def from_state(cls, state: State, support: Support, kernel: np.ndarray) -> HalfSpaces:
        """The half-space that `state` saved; raises StateError if it is of another geometry."""
        if not cls.made(state):
            raise StateError(f"the state must hold direction, nuclear, taps, got {sorted(state)}")
        if not all(arrays.is_array(value) for value in state.values()):
            raise StateError("the state must hold arrays")
        direction, nuclear, taps = (
            arrays.to_numpy(state[key]) for key in ("direction", "nuclear", "taps")
        )
        if not np.array_equal(taps, support.signature) or direction.shape != kernel.shape:
            raise StateError(
                f"the state belongs to another kernel or grid than a torus of "
                f"{support.symbol.fine}: pass state=None to start afresh"
            )
        real = kernel.dtype.kind == "f" and direction.dtype.kind != "f"
        if nuclear.shape or not np.isfinite(direction).all() or not np.isfinite(nuclear) or real:
            raise StateError("the state is damaged: pass state=None to start afresh")
        one = np.ones(1)
        return cls(direction.astype(kernel.dtype)[None], abs(float(nuclear)) * one, one)
