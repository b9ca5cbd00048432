"""An attachment as a part of a distributed checkpoint."""

from __future__ import annotations

import io
from typing import Any

import torch

from specops_torch.attachment import Attachment


class Stateful:
    """An attachment in a form that `torch.distributed.checkpoint` can save and load.

    All ranks hold the same state, which is stored once, so that it can be loaded on any number of
    them, into a fresh attachment of the same plan. Load the model first.

    Parameters
    ----------
    attachment : Attachment
        The attachment whose state is saved and loaded.

    Examples
    --------
    With ``dcp`` for `torch.distributed.checkpoint`::

        parts = {"model": model.state_dict(), "specops": specops_torch.Stateful(attachment)}
        dcp.save(parts, checkpoint_id=folder)
        dcp.load(parts, checkpoint_id=folder)
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def state_dict(self) -> dict[str, Any]:
        """The state as one entry, whose form does not depend on the rules' states."""
        buffer = io.BytesIO()
        torch.save(self._attachment.state_dict(), buffer)
        return {"attachment": buffer.getvalue()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        buffer = io.BytesIO(state["attachment"])
        self._attachment.load_state_dict(torch.load(buffer, weights_only=True))
