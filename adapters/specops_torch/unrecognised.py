"""Parameters that hide the matrices that they belong to: refused by name, with a remedy."""

from __future__ import annotations

from typing import Any

from torch import nn

from specops.errors import AdapterError
from specops_torch.pieces import is_sharded


def refuse_unrecognised(model: nn.Module) -> None:
    """Raise if parameters are parts of matrices whose whole is not known here.

    Raises
    ------
    AdapterError
        They are sharded by FSDP1, DeepSpeed's ZeRO-3 or Megatron's tensor parallelism.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise AdapterError(
                f"{path or 'the model'} is wrapped in FSDP1, which hides the shapes of its "
                f"parameters: use fully_shard or DDP (attaching before wrapping does not help)"
            )
    for name, parameter in model.named_parameters():
        reason = _hidden(parameter)
        if reason:
            raise AdapterError(f"{name} {reason}")


def refuse_sharded(name: str, parameter: Any) -> None:
    """Raise if a parameter has become a part of a matrix since it was attached."""
    if is_sharded(parameter):
        raise AdapterError(
            f"{name} is sharded (DTensor) since it was attached: shard first, then make the "
            f"optimizer, then attach (here: detach, or make the attachment anew)"
        )


def _hidden(parameter: Any) -> str:
    if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_shape"):
        return (
            f"is partitioned by DeepSpeed (ZeRO-3), where a parameter is no matrix between steps "
            f"(shape {tuple(parameter.shape)} of {tuple(parameter.ds_shape)}): use ZeRO-2, or "
            f"fully_shard"
        )
    if getattr(parameter, "tensor_model_parallel", False) and not is_sharded(parameter):
        return (
            "is a shard of Megatron's tensor parallelism, of which the whole matrix is not known "
            "here: make it a DTensor (torch.distributed.tensor.parallel), or train without"
        )
    return ""
