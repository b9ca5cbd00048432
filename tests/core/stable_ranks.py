"""Stable ranks by explicit matrices, and the cones that kernels are projected onto."""

from __future__ import annotations

import numpy as np

from specops import Conv, Dense
from specops.geometry import Geometry
from specops.maps.prepare import prepare
from specops.maps.unread import with_unread
from specops.projections.kernels import cone as kernel_cone
from specops.projections.kernels.leading_direction import leading_direction
from tests import oracle

DENSE: list[tuple[tuple[int, ...], Geometry]] = [
    ((6, 4), Dense()),
    ((4, 9), Dense()),
    ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    ((5, 3, 4), Dense(out_axes=(-1,), batch_axes=(1,))),
]

CONVS: list[tuple[tuple[int, ...], Geometry]] = [
    ((4, 3, 3, 3), Conv((6, 6), boundary="circular")),
    ((4, 3, 3, 3), Conv((5, 5))),
    ((4, 2, 3, 3), Conv((6, 6), stride=2, groups=2, padding=1)),
    ((3, 4, 4, 4), Conv((4, 4), transposed=True, stride=2, padding=1, layout="IO*")),
    ((5, 2, 3), Conv((3,), boundary="circular", layout="*IO")),
    ((4, 3, 5), Conv((4,), boundary="circular")),
    ((4, 3, 3), Conv((5,), boundary="circular", stride=2)),
    ((3, 2, 3, 3), Conv((2, 2))),
]


def ranks(w: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Stable ranks by the explicit matrix, in double precision."""
    s = oracle.spectrum(w.astype(np.result_type(w, np.float64)), geometry)
    s = s / np.where(s[..., :1] > 0, s[..., :1], 1.0)
    return (s**2).sum(axis=-1)


def weight(shape: tuple[int, ...], dtype: str = "float64", seed: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    return w + 1j * rng.standard_normal(shape) if dtype.startswith("complex") else w


def achieved(w: np.ndarray, share: float, geometry: Geometry) -> float:
    """A target between 1 and the smallest stable rank."""
    return 1.0 + share * (float(ranks(w, geometry).min()) - 1.0)


def least_rank(w: np.ndarray, geometry: Conv) -> float:
    """Of the cone along the leading axis, by the operator that the oracle builds."""
    e, gram = axis_and_gram(w, geometry)
    return 1.0 / float(e @ np.linalg.pinv(gram, rcond=1e-10) @ e)


def axis_and_gram(w: np.ndarray, geometry: Conv) -> tuple[np.ndarray, np.ndarray]:
    """E of the explicit leading pair and the Gram matrix of K ↦ A(K), real coordinates of K."""
    units = np.eye(w.size).reshape(-1, *w.shape)
    if np.iscomplexobj(w):
        units = np.concatenate([units, 1j * units])
    images = np.stack([oracle.conv_matrix(unit, geometry) for unit in units])
    u, _, vh = np.linalg.svd(oracle.conv_matrix(w, geometry))
    e = np.einsum("kij,i,j->k", images, u[:, 0].conj(), vh[0].conj()).real
    flat = images.reshape(len(units), -1)
    return e, (flat.conj() @ flat.T).real


def coordinates(w: np.ndarray) -> np.ndarray:
    flat = w.ravel()
    return np.concatenate([flat.real, flat.imag]) if np.iscomplexobj(w) else flat


def assert_nearest_in_cone(
    w: np.ndarray, x: np.ndarray, e: np.ndarray, gram: np.ndarray, target: float
) -> None:
    """Moreau: x is in the cone, orthogonal to w − x, and no member of the cone has a positive
    product with w − x (the largest product is known in closed form).
    """
    size = np.linalg.norm(w) ** 2
    assert x @ gram @ x <= target * (x @ e) ** 2 * (1 + 1e-9)
    assert x @ e >= 0
    away = w - x
    assert abs(away @ x) <= 1e-9 * size
    inverse = np.linalg.pinv(gram, rcond=1e-10)
    unseen = away - gram @ (inverse @ away)
    assert np.linalg.norm(unseen) <= 1e-9 * np.sqrt(size)
    dual = e @ inverse @ e
    across = away @ inverse @ away - (away @ inverse @ e) ** 2 / dual
    largest = (away @ inverse @ e) / dual + np.sqrt(max(target - 1 / dual, 0) * max(across, 0))
    assert largest <= 1e-7 * np.sqrt(size) / np.sqrt(np.linalg.norm(gram))


def nearest_along(
    w: np.ndarray, geometry: Conv, target: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(nearest kernel of the cone along w's leading axis, that axis, least stable rank)."""
    given = prepare(w, geometry)
    direction, _ = leading_direction(np, geometry.kernel(given.w), geometry.sizes(w.shape))
    found, _, least = kernel_cone.kernel_candidates(given, geometry, direction, np.asarray(target))
    nearest = with_unread(found.weight(found.wanted), w, geometry)
    return nearest, geometry.weight(direction), float(least)


def least_along(w: np.ndarray, geometry: Conv) -> float:
    return nearest_along(w, geometry, 1e9)[2]
