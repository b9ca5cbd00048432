"""Stale running statistics: batch normalisation that has not seen what rules did to weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specops.training.cautions import caution
from specops_torch.batch_norms import BATCH_NORMS

_STALE = 1e-2
"""Relative change of a weight that statistics may have missed without a warning.

Of the four convolutions of ``examples/train_digits.py``, without training after it: all shrunk by
1e-2, outputs move by 5 %, as much as by estimating the statistics from other batches (4 %), and
accuracy stays; by 1e-1, 51 % and 15 points are lost."""
_GROWTH = 2
"""A change of at most so many times the latest, per batch since, only undoes what steps added.

A rule that acts after every step takes back what the step added, 1e-2 to 8e-2 there: from 1.0 to
1.6 times as much as a step before. No batch has ever seen what it takes back."""
_NAMED = 3
"""How many layers a warning names."""


@dataclass
class _Missed:
    """The change of the preceding weights that statistics had not seen at their last change."""

    change: torch.Tensor
    latest: torch.Tensor
    """The change by the last firing alone."""
    batches: torch.Tensor
    written: int


class Statistics:
    """The changes of weights that the batch normalisations of a model have missed.

    A running average with momentum m keeps (1 − m)ⁿ of its value before the n latest batches, and
    misses so much of a change. Averages that something else has written to since, such as
    `torch.optim.swa_utils.update_bn`, are up to date. No device sync happens until results are
    asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._missed: dict[nn.Module, _Missed] = {}

    def are_kept(self) -> bool:
        """Whether the model has batch normalisations."""
        return any(isinstance(module, BATCH_NORMS) for module in self._model.modules())

    @torch.no_grad()
    def changed(self, changes: Mapping[nn.Module, torch.Tensor]) -> None:
        """Note the relative changes of weights by rules, by layer.

        All that is registered after the first of these layers is taken to follow it. A
        normalisation in evaluation mode while its model trains is a fixed map and misses nothing.
        """
        largest: torch.Tensor | None = None
        for module in self._model.modules():
            if module in changes:
                change = changes[module]
                largest = change if largest is None else largest.to(change).maximum(change)
            elif largest is not None and isinstance(module, BATCH_NORMS):
                frozen = self._model.training and not module.training
                if module.running_var is not None and not frozen:
                    self._add(module, largest)

    def stale(self) -> dict[str, nn.Module]:
        """The normalisations whose statistics are stale, by name."""
        return {
            name: module
            for name, module in self._model.named_modules()
            if module in self._missed and _has_run(module) and self._misses(module) > _STALE
        }

    def caution(self, act: str) -> None:
        """Warn of stale statistics, in one sentence."""
        names = list(self.stale())
        if not names:
            return
        more = len(names) - _NAMED
        listed = ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        caution(
            f"{act}: the running statistics of batch normalisation ({listed}) are of other "
            f"weights than the rules have left. Before evaluating or exporting, estimate them "
            f"anew: torch.optim.swa_utils.update_bn(loader, model)",
        )

    def _misses(self, norm: Any) -> float:
        missed = self._missed[norm]
        return float(missed.change * _remaining(norm, missed)[0])

    def _add(self, norm: Any, change: torch.Tensor) -> None:
        batches = norm.num_batches_tracked
        change = change.to(batches.device)
        missed, total = self._missed.get(norm), change
        if missed is not None:
            remaining, seen = _remaining(norm, missed)
            grown = torch.where(seen > 0, _GROWTH * missed.latest / seen.clamp(min=1), 0.0)
            total = remaining * missed.change + (change - grown).clamp(min=0.0)
        self._missed[norm] = _Missed(total, change, batches.clone(), _written(batches))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """‖after − before‖/‖before‖ in the Frobenius norm."""
    half = before.dtype in (torch.float16, torch.bfloat16)
    old, new = (x.detach().float() if half else x.detach() for x in (before, after))
    norm = torch.linalg.vector_norm(old).clamp(min=torch.finfo(old.dtype).tiny)
    return (torch.linalg.vector_norm(new - old) / norm).float()


def _remaining(norm: Any, missed: _Missed) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of the statistics that is from before the change, and the batches seen since."""
    batches = norm.num_batches_tracked
    then = missed.batches.to(batches.device)
    seen = (batches - then).float()
    mean = norm.momentum is None  # of all batches so far
    share = then / batches.clamp(min=1) if mean else (1.0 - norm.momentum) ** seen
    # Each batch writes to the counter once. More writes mean that something else wrote to it.
    only_batches = seen == _written(batches) - missed.written
    share = torch.where(only_batches, share, 0.0)
    return share, torch.where(only_batches, seen, 0.0)


def _written(counter: torch.Tensor) -> int:
    return 0 if counter.is_inference() else counter._version


def _has_run(norm: Any) -> bool:
    """Whether statistics differ from those of a new layer."""
    return bool(norm.running_mean.any()) or bool((norm.running_var != 1).any())
