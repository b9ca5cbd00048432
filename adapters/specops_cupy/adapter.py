"""`CupyAdapter`: what the CuPy plugin returns to specops."""

from __future__ import annotations

from specops.training.adapter import BaseAdapter
from specops_cupy.attachment import Attachment


class CupyAdapter(BaseAdapter):
    """Attach to, or project, a dict of arrays."""

    name = "cupy"
    attachment = Attachment
