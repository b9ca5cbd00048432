"""Reading the tensors of a saved model one at a time, in many formats."""

from specops.checkpoints.base import Checkpoint, Entry
from specops.checkpoints.opening import open_checkpoint

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]
