"""`attach` and `project` for whole models: both call the adapter of the model's framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specops.geometry import Geometry
from specops.plugins import find_adapter
from specops.training.others import warn_of_others
from specops.training.plan import Plan
from specops.training.protocol import Attachment
from specops.training.report import Report


def attach(
    optimizer: Any,
    model: Any,
    rule_or_plan: Any,
    *,
    every: int | None = None,
    geometries: Mapping[str, Geometry] | None = None,
    **options: Any,
) -> Attachment:
    """Make a rule, or a plan, act on a model's weights during training.

    Parameters
    ----------
    optimizer : optimizer or None
        The rules act after its steps. With None, call ``attachment.step()`` after each step.
    model : model
        Of any framework that an installed adapter knows.
    rule_or_plan : rule or Plan
        A bare rule acts on every weight it can and reports what it skipped.
    every : int, optional
        Let rules act at every `every`-th step; default: the plan's own interval.
    geometries : dict of str to Dense or Conv, optional
        Patterns of parameter names, and the map those parameters stand for, where the
        inferred one is missing or wrong.
    **options
        Further options of the framework's adapter, such as those of `specops_torch.attach`.

    Returns
    -------
    Attachment
        With ``report()``, ``history``, ``log_to()``, ``weights()``, ``geometries()``, ``step()``,
        ``steps``, ``state_dict()``, ``load_state_dict()``, ``is_attached``, ``enforce()`` and
        ``detach()``; adapters add what is their own.

    Raises
    ------
    AdapterError
        No installed adapter knows the model.
    PlanError
        The plan does not fit the model.

    Warns
    -----
    CautionWarning
        The plan leaves most of the model's matrices alone, because no map is known of them; or
        another attachment acts on one of the weights in the same stage.
    """
    adapter = find_adapter(model, optimizer)
    plan = Plan.of(rule_or_plan, every)
    attachment = adapter.attach(optimizer, model, plan, geometries=geometries, **options)
    warn_of_others(attachment)
    return attachment


def project(
    model: Any,
    rule_or_plan: Any,
    *,
    geometries: Mapping[str, Geometry] | None = None,
    **options: Any,
) -> Report:
    """Apply a rule, or a plan, to a model's weights once, without training.

    Every rule of the plan acts, whatever its interval. A forward rule, which during training
    leaves the parameter as it is, writes the weight that it would have used into the parameter.

    Parameters
    ----------
    model, rule_or_plan, geometries
        As in `attach`. A convolution whose input size `geometries` do not give is constrained for
        every size; a rule that needs a size leaves it alone, with a warning.
    **options
        As in `attach`.

    Returns
    -------
    Report
        What was constrained, what was left alone and why, with the norms afterwards.

    Raises
    ------
    AdapterError
        No installed adapter knows the model, or a rule acts on gradients: there are none.
    PlanError
        The plan does not fit the model.
    NonFiniteError
        A weight holds NaN or infinity. Then no weight is changed.

    Notes
    -----
    Batch normalisation behind a weight that changed keeps the running statistics of the old one,
    and evaluation uses them. Estimate them anew: torch warns where that is due, and names
    ``torch.optim.swa_utils.update_bn(loader, model)``.
    """
    adapter = find_adapter(model)
    return adapter.project(model, Plan.of(rule_or_plan), geometries=geometries, **options)
