"""Noticing that a tensor was written to, or its gradient reset."""

from __future__ import annotations

import torch
from torch import nn

from specops_torch.fast_paths import transformed

_SAMPLED = 12
"""About how many entries of a parameter are sampled to notice writes that torch does not count."""


_AT_ONCE = 2**20
"""Entries that are cast to double at a time: a whole weight could take four times its memory."""


def written(raw: torch.Tensor) -> tuple[int, int]:
    """Numbers that change when a parameter is written to, cast or moved."""
    if type(raw) is not nn.Parameter and hasattr(raw, "device_mesh"):
        with torch.no_grad():
            # Optimizers write to the DTensor, checkpoints to its local tensor.
            return raw._version, raw.to_local()._version
    return 0 if raw.is_inference() else raw._version, raw.data_ptr()


def sample(raw: torch.Tensor) -> bytes | None:
    """Some entries from all over a parameter on the CPU, which cost less than a pass over it.

    None in double precision, for which `torch.autograd.gradcheck` changes single entries that a
    sample would miss.
    """
    if type(raw) is not nn.Parameter or not raw.is_cpu or raw.dtype != torch.float32:
        return None
    if not raw.is_contiguous() or transformed():
        return None
    entries = raw.detach().numpy().reshape(-1)
    # With an odd stride the sample covers several columns even if their number is even.
    found: bytes = entries[:: len(entries) // _SAMPLED | 1].tobytes()
    return found


def fingerprint(raw: torch.Tensor) -> tuple[float, ...]:
    """Sums that change with any entry, and are the same for a copy."""
    with torch.no_grad():
        x = raw.detach()
        parts = (torch.view_as_real(x) if x.is_complex() else x).reshape(-1).split(_AT_ONCE)
        sums = torch.zeros(3, dtype=torch.float64, device=x.device)
        for index, part in enumerate(parts):
            part = part.double()
            first = 1 + index * _AT_ONCE
            ramp = torch.arange(first, first + len(part), dtype=part.dtype, device=x.device)
            sums += torch.stack([part.sum(), part.dot(part), part.dot(ramp)])
        return tuple(sums.tolist())


def is_reset(parameter: torch.Tensor) -> bool:
    """Whether its gradient is None or zeros; a sharded gradient counts only if None."""
    gradient = parameter.grad
    if gradient is None or hasattr(gradient, "device_mesh"):
        return gradient is None
    # One entry usually decides: to look at all of them takes as long as a forward pass.
    return not (gradient[(0,) * gradient.ndim] or gradient.any())
