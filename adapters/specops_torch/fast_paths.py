"""Vectors of one matrix on the CPU, advanced without a look at what else a weight could be.

`specops.tracking` asks at every step of which library, device, geometry and precision a weight
is, which takes longer than the step itself for a small layer. ``ENABLED = False`` advances
everything by the rules.
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
"""Of weights that are computed with as they are stored, here and in place."""
transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether torch.func is at work, under which what is computed from a tensor has no memory."""


def advanced(
    rule: Any,
    name: str,
    raw: torch.Tensor,
    geometry: Geometry,
    state: Mapping[str, torch.Tensor],
    step: int,
) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
    """(the state after the rule's steps, its figures); None where the rule must do it.

    Of a weight that is one matrix.
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
