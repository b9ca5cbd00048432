"""What the author of an adapter imports, besides the names of `specops` itself.

`BaseAttachment` says what to write; `examples/adapter_sklearn.py` is the smallest adapter,
`examples/adapter_keras` one with a guide, and `specops.testing.AdapterSuite` checks it.
"""

from specops.errors import (
    AdapterError,
    CautionWarning,
    CheckpointError,
    GeometryError,
    HookLostWarning,
    NonFiniteError,
    NonFiniteWarning,
    PlanError,
    SpecopsError,
    StateError,
    UnsupportedArrayError,
    UnsupportedGeometryError,
)
from specops.geometry import Geometry
from specops.hookspecs import Adapter, AdapterStatus, hookimpl
from specops.plugins import manager
from specops.rules import ForwardRule, GradientRule, Rule, WeightRule
from specops.training.adapter import BaseAdapter
from specops.training.attachment import BaseAttachment
from specops.training.constrained import Constrained
from specops.training.declared import override_geometries
from specops.training.firing import NonFinitePolicy
from specops.training.history import History, Record
from specops.training.outcome import Outcome
from specops.training.parameter import Parameter
from specops.training.plan import Assignment, Plan
from specops.training.protocol import Attachment
from specops.training.report import Report, ReportRow, plan_rows
from specops.training.weight import Weight

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterStatus",
    "Assignment",
    "Attachment",
    "BaseAdapter",
    "BaseAttachment",
    "CautionWarning",
    "CheckpointError",
    "Constrained",
    "ForwardRule",
    "Geometry",
    "GeometryError",
    "GradientRule",
    "History",
    "HookLostWarning",
    "NonFiniteError",
    "NonFinitePolicy",
    "NonFiniteWarning",
    "Outcome",
    "Parameter",
    "Plan",
    "PlanError",
    "Record",
    "Report",
    "ReportRow",
    "Rule",
    "SpecopsError",
    "StateError",
    "UnsupportedArrayError",
    "UnsupportedGeometryError",
    "Weight",
    "WeightRule",
    "hookimpl",
    "manager",
    "override_geometries",
    "plan_rows",
]
