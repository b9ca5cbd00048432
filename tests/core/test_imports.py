"""The core imports no framework and little else, and says what it exports."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specops

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "jax", "jaxlib", "cupy", "flax", "optax", "keras", "tensorflow"}
PUBLIC = {
    "NormalizeIfAbove",
    "ProjectStableRank",
    "SpectralHammer",
    "SpectralNormPenalty",
    "SpectralNormalization",
    "SpectralSoftCap",
    "StableRankNormalization",
    "TrainableScale",
    "balance_norms",
    "ClipAndCut",
    "ClipSpectralNorm",
    "Conv",
    "Dense",
    "Monitor",
    "Plan",
    "attach",
    "inspect",
    "clip_singular_values",
    "condition_number",
    "effective_rank",
    "errors",
    "linear_operator",
    "polar_factor",
    "project",
    "project_schatten_ball",
    "project_spectral_ball",
    "project_stable_rank",
    "singular_values",
    "spectral_norm",
    "spectral_norm_bounds",
    "stable_rank",
    "top_singular_triplets",
}


def imported(statement: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter that runs `statement`."""
    code = (
        f"import json, sys; {statement}; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import specops",
        "import specops.plugins as p; p.statuses()",
        "import specops, specops_torch, specops_jax, specops_cupy",
        "import specops, numpy; specops.singular_values(numpy.eye(3))",
    ],
)
def test_no_framework_is_imported(statement: str) -> None:
    # Whether CuPy has a device is known only to CuPy.
    asked = {"cupy"} if "statuses" in statement else set()
    assert not imported(statement) & (FRAMEWORKS - asked)


def test_import_loads_nothing_but_its_dependencies() -> None:
    everything = "import specops; [getattr(specops, name) for name in specops.__all__]"
    extra = imported(everything) - imported("import numpy, array_api_compat, pluggy")
    outside = {m for m in extra if m not in sys.stdlib_module_names}
    assert outside == {"specops"}


def test_the_core_names_no_framework() -> None:
    for path in (ROOT / "specops").rglob("*.py"):
        if path.parent.name == "arrays" and path.stem in FRAMEWORKS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert top not in FRAMEWORKS, f"{path} imports {name}"
                assert not top.startswith("specops_"), f"{path} imports {name}"


OUTSIDE = ("arrays", "checkpoints", "plots", "testing", "inspection")
"""Packages that may tell libraries apart: the floor for it, readers of files, plots, the kit."""
OF_ONE_LIBRARY = {
    *("detach", "cpu", "to", "mH", "expand", "contiguous", "is_contiguous", "numel", "item"),
    *("clone", "copy_", "add_", "mul_", "addmm_", "requires_grad", "new_zeros", "new_empty"),
    *("unbind", "dim", "numpy", "at", "block_until_ready", "is_cuda", "lax", "functorch"),
}
OURS = {"attachment.detach"}
"""Methods of specops itself that have the name of one of those."""


def told_apart(source: str) -> list[str]:
    """What tells array libraries apart in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node)
        if isinstance(node, ast.Attribute) and (
            text == "sys.modules"
            or text.startswith(("compat.is_", "array_api_compat.is_"))
            or (node.attr in OF_ONE_LIBRARY and text not in OURS)
        ):
            found.append(text)
        if isinstance(node, ast.Call) and text.startswith("isinstance(") and "ndarray" in text:
            found.append(text)
    return found


def test_libraries_are_told_apart_on_one_floor() -> None:
    for text in ("x.detach()", "isinstance(x, np.ndarray)", "sys.modules['torch']"):
        assert told_apart(text)
    for path in (ROOT / "specops").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] not in OUTSIDE:
            assert not told_apart(path.read_text(encoding="utf-8")), path


FLOORS = (
    ("errors", "typing", "tables", "warned"),
    ("arrays",),
    ("geometry",),
    ("maps",),
    ("linalg",),
    ("spectra",),
    ("projections", "tracking"),
    ("rules",),
    ("training", "measures"),
    ("plots", "hookspecs"),
    ("plugins",),
    ("checkpoints", "models"),
    ("authors", "inspection"),
    ("testing",),
    ("cli",),
)


def test_imports_run_downwards() -> None:
    core, stands = ROOT / "specops", {}
    for floor, names in enumerate(FLOORS):
        stands |= dict.fromkeys(names, floor)
    assert set(stands) == {
        p.stem for p in core.iterdir() if p.suffix != ".typed" and not p.name.startswith("_")
    }
    for path in core.rglob("*.py"):
        own = path.relative_to(core).parts[0].removesuffix(".py")
        if own not in stands:
            continue
        text = path.read_text(encoding="utf-8")
        imports = re.findall(r"^\s*(?:from|import) specops\.(\w+)", text, re.M)
        for names in re.findall(r"^\s*from specops import (.+)$", text, re.M):
            imports += [name for name in re.findall(r"\w+", names) if name in stands]
        for name in set(imports) - {own}:
            assert stands[name] < stands[own], f"{path} imports specops.{name}"


def test_adapters_import_only_the_core_and_their_own_framework() -> None:
    modules = {"flax", "equinox", "haiku"}  # inside functions, for modules that are at hand
    formats = {"numpy", "msgpack", "tensorstore"}  # the last two inside functions
    own = {
        "specops_torch": {"torch", "numpy"},
        "specops_jax": {"jax", "optax"} | modules | formats,
        "specops_cupy": {"cupy", "cupyx"},
    }
    for package, allowed in own.items():
        for path in (ROOT / "adapters" / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    top = (node.module or "").partition(".")[0]
                elif isinstance(node, ast.Import):
                    top = node.names[0].name.partition(".")[0]
                else:
                    continue
                permitted = allowed | {"specops", package} | set(sys.stdlib_module_names)
                assert top in permitted, f"{path} imports {top}"


def test_public_names() -> None:
    assert set(specops.__all__) == PUBLIC
    for name in PUBLIC - {"errors"}:
        member = getattr(specops, name)
        documented = inspect.getdoc(member)
        assert documented, f"{name} has no docstring"
        assert member.__module__.startswith("specops.")


@pytest.mark.parametrize("name", sorted(PUBLIC - {"errors", "attach", "Monitor", "project"}))
def test_docstrings_document_every_argument(name: str) -> None:
    member = getattr(specops, name)
    documented = inspect.getdoc(member) or ""
    parameters = [p for p in inspect.signature(member).parameters if p != "_"]
    section = re.split(r"\n(?:Returns|Raises|Notes|Examples)\n-+", documented)[0]
    entries = re.findall(r"^(\*{0,2}\w+(?:, \w+)*)(?: : |$)", section, re.M)
    named = {name.strip("*") for entry in entries for name in entry.split(", ")}
    assert set(parameters) <= named, f"{name} does not document {set(parameters) - named}"
