"""What the torch plugin hands to specops."""

from __future__ import annotations

from specops.training.adapter import BaseAdapter
from specops_torch.attachment import Attachment


class TorchAdapter(BaseAdapter):
    """Attach to, or project, a `torch.nn.Module`."""

    name = "torch"
    attachment = Attachment
