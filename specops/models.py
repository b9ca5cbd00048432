"""`attach` and `project`: the two verbs for whole models, handed to the model's adapter."""

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
        Whose steps to follow; None: call ``attachment.step()`` after each step yourself.
    model : model
        Of any framework that an installed adapter knows.
    rule_or_plan : rule or Plan
        A bare rule acts on every weight it can and reports what it skipped.
    every : int, optional
        Act at every so many steps; default: the plan's own interval.
    geometries : dict of str to Dense or Conv, optional
        Patterns of parameter names, and the map those parameters stand for, where the
        inferred one is missing or wrong.
    **options
        Of the adapter: see `specops_torch.attach`.

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
        Of most of the model's matrices no map is known, so that the plan leaves them alone; or
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

    Every rule of the plan acts, whatever its interval; the weights that forward rules give are
    written into the parameters.

    Parameters
    ----------
    model, rule_or_plan, geometries
        As `attach`. Convolutions whose input size is not known (no `geometries`) are constrained
        for every size, or left alone with a warning by rules that need one.
    **options
        Of the adapter.

    Returns
    -------
    Report
        Of the weights afterwards.

    Raises
    ------
    AdapterError
        No installed adapter knows the model, or a rule acts on gradients: there are none.
    PlanError
        The plan does not fit the model.
    NonFiniteError
        A weight holds NaN or infinity; all are left as they were then.

    Notes
    -----
    Running statistics of batch normalisation behind a weight that changed are of the old one, and
    evaluation uses them: estimate them anew (torch warns, and names
    ``torch.optim.swa_utils.update_bn(loader, model)``).
    """
    adapter = find_adapter(model)
    return adapter.project(model, Plan.of(rule_or_plan), geometries=geometries, **options)
