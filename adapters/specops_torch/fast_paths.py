"""A fast path that advances the singular vectors of one matrix on the CPU.

`specops.tracking` looks up the library, device, geometry and precision of a weight at every step,
which takes longer than the step itself for a small layer. With ``ENABLED = False`` the rules
advance everything themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from specops.geometry import Geometry
from specops.tracking import Pairs, packed, stepped_on_host, unpacked

ENABLED = True
DTYPES = (torch.float32, torch.float64)
"""The dtypes of weights with which computations need no cast, here and in place."""
transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a torch.func transform is active, under which tensors have no memory of their own."""


def advanced(
    rule: Any,
    name: str,
    raw: torch.Tensor,
    geometry: Geometry,
    state: Mapping[str, torch.Tensor],
    step: int,
) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
    """(the state after the rule's steps, its figures), for a weight that is one matrix.

    None if the rule itself has to advance the vectors.
    """
    if not ENABLED or not rule.formula or not raw.is_cpu or raw.dtype not in DTYPES:
        return None
    if not raw.is_contiguous() or not state:
        return None
    vectors = unpacked(state, 0)
    if any(x.dtype != raw.dtype or not x.is_cpu for x in vectors):
        return None
    arrays: list[Any] = [x.numpy() for x in vectors]
    if len(arrays[0]) * len(arrays[1]) != raw.numel():
        return None
    matrix = raw.reshape(len(arrays[0]), -1)
    found = stepped_on_host(matrix, Pairs(*arrays), (True, False) * rule.iterations)
    if found is None:
        return None
    pairs, sigma = found
    norm = float(sigma)
    if not math.isfinite(norm):
        return None
    figures = {"norm": norm}
    if rule.formula == "penalty":
        figures["penalty"] = 0.5 * rule.strength_at(step, name, geometry) * norm * norm
    elif rule.formula == "rank limited":
        ratio, flat = rule.arguments(step, name, geometry)["ratio"], matrix.reshape(-1)
        rank = torch.dot(flat, flat).item() / norm**2
        if not math.isfinite(rank):
            return None
        limit = max(1.0, float(ratio) * min(matrix.shape))
        figures |= {"rank_before": rank, "rank_after": min(rank, limit)}
    new = Pairs(*map(torch.from_numpy, pairs))
    return packed(0, new, torch.from_numpy(sigma)), figures
