"""Writers of logs from other libraries, handed to `attach`."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Linear(8, 3)
    with SummaryWriter(str(tmp_path)) as writer:
        attachment = specops.attach(None, model, specops.ClipSpectralNorm(0.1), log=writer)
        attachment.step()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("specops/weight/norm_after")
    assert (event.step, event.value) == (1, pytest.approx(0.1, rel=1e-5))
