"""What authors of adapters import: one module, and nothing else of specops."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from specops import authors, errors
from specops.training.attachment import BaseAttachment
from specops.training.protocol import Attachment

ROOT = Path(__file__).parents[2]
NAMES = {
    *("Adapter", "AdapterStatus", "hookimpl", "manager"),
    *("Assignment", "Geometry", "Plan", "Rule", "Weight", "override_geometries"),
    *("ForwardRule", "GradientRule", "WeightRule"),
    *("Attachment", "BaseAdapter", "BaseAttachment", "Constrained", "Outcome", "Parameter"),
    *("History", "NonFinitePolicy", "Record", "Report", "ReportRow", "plan_rows"),
    *("AdapterError", "GeometryError", "NonFiniteError", "PlanError", "SpecopsError"),
    *("CheckpointError", "StateError", "UnsupportedArrayError", "UnsupportedGeometryError"),
    *("CautionWarning", "HookLostWarning", "NonFiniteWarning"),
}
EXAMPLES = [
    ROOT / "examples" / "adapter_sklearn.py",
    *sorted((ROOT / "examples" / "adapter_keras" / "specops_keras").glob("*.py")),
    ROOT / "tests" / "kit" / "adapter.py",
]


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_its_names() -> None:
    assert set(authors.__all__) == NAMES
    assert list(authors.__all__) == sorted(authors.__all__)
    assert all(hasattr(authors, name) for name in NAMES)
    # All errors, as the adapters' README says; of warnings those that adapters give.
    assert {name for name in errors.__all__ if name.endswith("Error")} <= NAMES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_public_names_only(path: Path) -> None:
    inner = {m for m in imported(path) if m.partition(".")[0] == "specops"}
    assert inner <= {"specops", "specops.authors"}


def test_examples_import_something() -> None:
    assert "specops.authors" in set.union(*map(imported, EXAMPLES))


def test_what_is_shared_is_what_is_promised() -> None:
    promised = {n for n in vars(Attachment) if not n.startswith("_")} | {"plan", "steps"}
    own = {n for n in vars(BaseAttachment) if not n.startswith("_")} | {"plan", "steps"}
    assert promised <= own
