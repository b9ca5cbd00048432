"""Errors and warnings, each also a subclass of the built-in one that a caller would expect."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CautionWarning",
    "CheckpointError",
    "GeometryError",
    "HookLostWarning",
    "NonFiniteError",
    "NonFiniteWarning",
    "PlanError",
    "PluginWarning",
    "SpecopsError",
    "StateError",
    "UnsupportedArrayError",
    "UnsupportedGeometryError",
]


class SpecopsError(Exception):
    """Base of every error that specops raises."""


class GeometryError(SpecopsError, ValueError):
    """A geometry's arguments are wrong, or it does not fit the array it is used with."""


class UnsupportedGeometryError(GeometryError):
    """The geometry is well formed, but this function has no method for it."""


class UnsupportedArrayError(SpecopsError, TypeError):
    """The array's kind (dtype, sparsity, laziness, library) cannot be measured."""


class NonFiniteError(SpecopsError, ValueError):
    """The array holds NaN or infinity."""


class StateError(SpecopsError, ValueError):
    """The state to start from belongs to another weight or geometry, or is not finite."""


class PlanError(SpecopsError, ValueError):
    """A plan does not fit the model it is used with."""


class AdapterError(SpecopsError, RuntimeError):
    """No adapter is available, or it cannot do what was asked."""


class CheckpointError(SpecopsError, ValueError):
    """A saved model, or one of its tensors, cannot be read."""


class NonFiniteWarning(RuntimeWarning):
    """Some weights held NaN or infinity; they were left as they were."""


class CautionWarning(UserWarning):
    """A rule acts on a weight as asked, with a consequence that is hardly meant."""


class HookLostWarning(RuntimeWarning):
    """Weights change, but an attachment sees no step of its optimizer."""


class PluginWarning(RuntimeWarning):
    """A third-party plugin failed and was ignored."""
