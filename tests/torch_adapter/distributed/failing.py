"""Two ranks: what goes wrong on one of them is told on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import specops
from specops import ClipSpectralNorm, SpectralNormPenalty, errors
from tests.torch_adapter.distributed.models import dense, fsdp, raises, same, step, whole


def schedules_that_fail(_: Path) -> None:
    """On one rank or on both, at firings that products with vectors would decide."""

    def breaking(at: int, name: str, geometry: Any) -> float:
        if at == 2 and name == "2.weight" and dist.get_rank() in ranks:
            raise ValueError("no bound")
        return 20.0

    for rule in (ClipSpectralNorm(breaking), SpectralNormPenalty(breaking, norm="reshaped")):
        for ranks in ((1,), (0, 1)):
            model = fsdp(dense())
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            attachment = specops.attach(optimizer, model, rule)
            step(model, optimizer)
            before = whole(model)
            if dist.get_rank() in ranks:
                with raises(ValueError, "no bound") as caught:
                    attachment.before_step()
                    attachment.step()
                assert "acted on 2.weight at step 2" in caught.value.__notes__[0]
            else:
                with raises(errors.AdapterError, "2.weight at step 2", "another rank"):
                    attachment.before_step()
                    attachment.step()
            same(whole(model), before, 0.0)
            attachment.detach()


def numbers_that_another_rank_holds(_: Path) -> None:
    """A rank whose own part is finite does not say what the other part holds."""
    model = fsdp(dense())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    attachment = specops.attach(optimizer, model, SpectralNormPenalty(0.1, norm="reshaped"))
    step(model, optimizer)
    if dist.get_rank() == 1:
        model[2].weight.detach().to_local()[0, 0] = float("nan")
    with raises(errors.NonFiniteError, "2.weight holds NaN", "step 2"):
        attachment.before_step()


CASES = (schedules_that_fail, numbers_that_another_rank_holds)
