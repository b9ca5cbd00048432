"""Whether steps still reach an attachment: hooks are lost when optimizers are copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from specops.errors import HookLostWarning
from specops.warned import warn
from specops_torch.constrained import Constrained

_UNSEEN = 10
"""How often every weight has to change without a step until hooks count as lost: swapping an
average in and out for an evaluation changes each of them twice."""


class Liveness:
    """How often each constrained tensor had been written to when a step was last seen."""

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}

    def seen(self, constrained: Iterable[Constrained]) -> None:
        """Note the weights as they are after a step, or after a change by the attachment itself."""
        self._versions = _versions(constrained)

    def check(self, constrained: Iterable[Constrained], step: int, *, hooked: bool) -> None:
        """Warn if all weights have changed without a step, or no hook is left to bring one."""
        if not hooked:
            warn(
                f"no step reaches this attachment, the last was step {step}: it was copied with "
                f"its optimizer, and copies of optimizers lose their hooks. Detach it, attach "
                f"to the copy, and load this one's state_dict()",
                HookLostWarning,
            )
            return
        now = _versions(constrained)
        unseen = [now[key] - old for key, old in self._versions.items() if key in now]
        if not unseen or min(unseen) < _UNSEEN:
            return
        warn(
            f"the weights changed {min(unseen)} times since step {step}, the last that this "
            f"attachment saw: optimizers lose their hooks when they are pickled or copied. "
            f"Attach to the optimizer that steps, and load this one's state_dict()",
            HookLostWarning,
        )


def _versions(constrained: Iterable[Constrained]) -> dict[int, int]:
    held = (c.location.module._parameters.get(c.location.attribute) for c in constrained)
    return {id(p): p._version for p in held if _counts(p)}


def _counts(p: Any) -> bool:
    """Whether a parameter is trained and counts what is written to it."""
    return p is not None and p.requires_grad and not p.is_inference()
