"""The hooks that adapters implement: the whole surface between specops and a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import pluggy

from specops.geometry import Geometry
from specops.training.plan import Plan
from specops.training.protocol import Attachment
from specops.training.report import Report

PROJECT = "specops"
Reader = TypeVar("Reader")
"""`specops.checkpoints.Checkpoint`, which belongs to a higher floor than this module."""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class AdapterStatus:
    """What `specops.plugins.statuses` lists about one adapter.

    Attributes
    ----------
    name : str
        The framework's name.
    available : bool
        Whether the adapter works here.
    detail : str
        The framework's version, or why the adapter is not available.
    supports : str
        What it can do, in a few words: "weights, gradients, forward; checkpoints".
    """

    name: str
    available: bool
    detail: str = ""
    supports: str = ""


@runtime_checkable
class Adapter(Protocol):
    """What a plugin returns for a model it knows."""

    name: str

    def attach(
        self,
        optimizer: Any,
        model: Any,
        plan: Plan,
        *,
        geometries: Mapping[str, Geometry] | None,
        **options: Any,
    ) -> Attachment:
        """Make the plan act after every step of the optimizer; return the attachment."""

    def project(
        self, model: Any, plan: Plan, *, geometries: Mapping[str, Geometry] | None, **options: Any
    ) -> Report:
        """Apply the plan once; return the report."""


class Specs:
    """Signatures of the hooks. Implementations must not import a framework until called."""

    @hookspec(firstresult=True)
    def specops_adapter(self, model: Any, optimizer: Any) -> Adapter | None:
        """Return an adapter if this model (and optimizer, or None) is of your framework."""

    @hookspec
    def specops_adapter_status(self) -> AdapterStatus:  # type: ignore[empty-body]
        """Say whether your adapter could be used here, and if not, why."""

    @hookspec(firstresult=True)
    def specops_open_checkpoint(
        self, path: Path, open_file: Callable[[Path], Reader]
    ) -> Reader | None:
        """Return a reader if the file or folder is of your format, judged by its first bytes.

        `open_file` opens another file by whichever reader knows it: for a folder of files. An
        implementation may leave that argument out.

        Raise `CheckpointError` if it is, but cannot be read.
        """
