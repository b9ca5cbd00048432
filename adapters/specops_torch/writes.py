"""What tells that a tensor was written to since."""

from __future__ import annotations

import torch
from torch import nn

from specops_torch.fast_paths import transformed

_SAMPLED = 12
"""About as many entries of a parameter tell of writes that torch does not count."""


_AT_ONCE = 2**20
"""Entries that are widened together, as whole weights would be four times their memory."""


def written(raw: torch.Tensor) -> tuple[int, int]:
    """What changes when a parameter is written to, cast or moved."""
    if type(raw) is not nn.Parameter and hasattr(raw, "device_mesh"):
        with torch.no_grad():
            # Optimizers write to the one, checkpoints to the other.
            return raw._version, raw.to_local()._version
    return 0 if raw.is_inference() else raw._version, raw.data_ptr()


def sample(raw: torch.Tensor) -> bytes | None:
    """Entries all over a parameter on the CPU, a pass over which costs more than to ask.

    None in double precision, where differences of single entries are taken
    (`torch.autograd.gradcheck`), which no sample would show.
    """
    if type(raw) is not nn.Parameter or not raw.is_cpu or raw.dtype != torch.float32:
        return None
    if not raw.is_contiguous() or transformed():
        return None
    entries = raw.detach().numpy().reshape(-1)
    # An odd distance meets several columns where their number is even.
    found: bytes = entries[:: len(entries) // _SAMPLED | 1].tobytes()
    return found


def fingerprint(raw: torch.Tensor) -> tuple[float, ...]:
    """Numbers that change with any entry, the same for a copy."""
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
