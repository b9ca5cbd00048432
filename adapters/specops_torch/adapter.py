"""`attach`, and the adapter that the torch plugin gives to specops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from specops.geometry import Geometry
from specops.training.adapter import BaseAdapter
from specops.training.firing import NonFinitePolicy
from specops.training.history import Record
from specops.training.others import warn_of_others
from specops.training.plan import Plan
from specops_torch.attachment import Attachment


class TorchAdapter(BaseAdapter):
    """Attach to, or project, a `torch.nn.Module`."""

    name = "torch"
    attachment = Attachment


def attach(
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
    rule_or_plan: Any,
    *,
    every: int | None = None,
    geometries: Mapping[str, Geometry] | None = None,
    on_nonfinite: NonFinitePolicy = "raise",
    history: int = 10_000,
    log: Callable[[Record], Any] | Any = None,
    replicas: Any = None,
) -> Attachment:
    """Make a rule, or a plan, act on a torch model around the optimizer's steps.

    Rules of stage "weights" act after a step, those of stage "gradients" before it. Under rules of
    stage "forward" layers answer their attribute with the weight in use, computed whenever it is
    read, while parameters and state_dict stay the plain model's.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or None
        Its step hooks run the rules. With None, call ``attachment.step()`` yourself after each
        step, and ``attachment.before_step()`` before it for rules of stage "gradients", and for
        trainable scales if there are several ranks.
    model : torch.nn.Module
        Its layers determine which map a weight is. Convolutions are watched for the largest input
        they see; one that has not run yet is constrained for every size.
    rule_or_plan, every, geometries
        As in `specops.attach`.
    on_nonfinite : "raise", "skip" or "warn"
        What to do about a weight that holds NaN or infinity. It is left as it was in any case;
        "raise" leaves all others as they were, too.
    history : int
        How many records to keep.
    log : callable or SummaryWriter, optional
        Receives every record, as with `Attachment.log_to`.
    replicas : torch.distributed.ProcessGroup, optional
        The group whose ranks hold the same weights (DistributedDataParallel), which is checked
        here. Rules on weights then share their work among these ranks: each decomposes some
        layers and sends the results, and steps and `enforce` are collectives. By default every
        rank does all the work and waits for no other.

    Returns
    -------
    Attachment
        It holds all of specops' state: neither the model nor the optimizer gets buffers. Pickling
        or copying an optimizer drops its hooks (torch's own behaviour), so attach again after
        loading and hand over ``state_dict()``.

    Raises
    ------
    PlanError, AdapterError, UnsupportedArrayError
        The plan does not fit; parameters are lazy, meta, or parts of matrices whose whole is not
        known (FSDP1, ZeRO-3, Megatron's shards); or `replicas` are no group of equal replicas.

    Warns
    -----
    CautionWarning
        The plan leaves most of the model's matrices alone, because no map is known of them; or
        another attachment acts on one of the weights in the same stage.

    Notes
    -----
    Parameters without gradients, of other optimizers, with fewer than two axes or tied to an
    earlier one are left alone and listed in the report; freezing a layer or adding a parameter
    group later is noticed at the next step. Project before averaging (EMA).

    For sharded parameters (`fully_shard`, DTensors) rules act on the logical matrices. Every rank
    attaches, after sharding, and calls what needs their numbers: steps, `enforce`, `report`.

    Batch normalisation keeps running statistics of the weights that training batches have met.
    If rules have since changed those by more than 1 %, the report calls the statistics stale and
    `Attachment.enforce` warns: before evaluating, estimate them anew by
    ``torch.optim.swa_utils.update_bn(loader, model)``.

    Under a forward rule the layer's class becomes a subclass of itself in which the attribute is a
    property; what is written to the attribute reaches the parameter. Writes to a parameter are
    noticed by the version that torch counts: those through ``parameter.data`` or a NumPy view, and
    any but `load_state_dict` before compiled code runs again, need `Attachment.refresh`; copies
    compute their weights outside of compiled graphs instead. A write from outside in every
    step costs a decomposition of the weight each time. ``model.get_parameter(name)`` refuses what
    is no parameter: take it from ``named_parameters()``.
    """
    attachment = Attachment(
        optimizer,
        model,
        Plan.of(rule_or_plan, every),
        geometries,
        on_nonfinite=on_nonfinite,
        history=history,
        log=log,
        replicas=replicas,
    )
    warn_of_others(attachment)
    return attachment
