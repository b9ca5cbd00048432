"""Cases for three ranks, after those for two in the same folder."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from torch import distributed as dist
from torch.distributed.tensor import DeviceMesh

import specops
from specops import ClipSpectralNorm, SpectralNormPenalty
from tests.torch_adapter.distributed.models import Breaking, compare, dense, fsdp, load, raises


def loaded(folder: Path) -> None:
    """A checkpoint of two ranks."""
    load(folder, fsdp)


def uneven(_: Path) -> None:
    """Shards of different sizes, two of them empty."""
    compare(dense, fsdp, ClipSpectralNorm(1.0), 1e-6, rate=0.01)
    compare(dense, fsdp, ClipSpectralNorm(8.0), 1e-6, rate=0.01)
    compare(dense, fsdp, SpectralNormPenalty(0.05, norm="reshaped"), 1e-6, rate=0.01)


def a_rank_stays_away(_: Path) -> None:
    """The other one raises within the time of their group, and names the weights."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if dist.get_rank() == 2:
        return
    model = fsdp(dense(), DeviceMesh.from_group(group, "cpu"))
    attachment = specops.attach(None, model, ClipSpectralNorm(1.0))
    if dist.get_rank() == 0:
        _fails_soon(attachment, 4.0)
    else:
        time.sleep(3.0)


def a_rank_is_killed(_: Path) -> None:
    """While it works on what it owns: the others do not wait for it."""
    attachment = specops.attach(None, fsdp(dense()), Breaking())
    if dist.get_rank() == 2:
        with mock.patch.object(Breaking, "update", side_effect=_killed):
            attachment.step()
    _fails_soon(attachment, 4.0)


def _fails_soon(attachment: Any, seconds: float) -> None:
    began = time.monotonic()
    with raises(RuntimeError) as caught:
        attachment.step()
    assert time.monotonic() - began < seconds
    assert "worked on 0.weight and 4 more together" in caught.value.__notes__[-1]


def _killed(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


RANKS = 3
CASES = (loaded, uneven, a_rank_stays_away, a_rank_is_killed)
ENDS = {"a_rank_is_killed": "ranks [2] never came to an end\n"}
