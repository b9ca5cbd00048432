"""What the READMEs print runs as printed, and what they name exists."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
READMES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        *ROOT.glob("adapters/**/README.md"),
        ROOT / "examples/README.md",
    ]
}
README = READMES["README.md"]
OWN_TEST = "examples/adapter_keras/README.md"
"""Runs with the package that it belongs to."""
PROGRAMS = {
    name: blocks
    for name, text in READMES.items()
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
}
COMMANDS = [
    command
    for text in READMES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.S)
    for command in block.splitlines()
    if command.startswith("specops ")
]
_PATH = r"\b(?:specops|adapters|examples|tests)/[\w./]*\w"
NEEDED = ("torch", "jax", "flax", "optax")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "jax" in n else ()) for n in PROGRAMS]
)
def test_programs_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a README as one program, from the first line to the last."""
    program = "\n".join(PROGRAMS[name])
    for needed in NEEDED:
        if f"import {needed}" in program:
            pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    exec(compile(program, name, "exec"), vars(module))


def test_every_use_has_a_program() -> None:
    assert {name: len(blocks) for name, blocks in PROGRAMS.items()} == {
        "README.md": 3,
        "adapters/specops_torch/README.md": 6,
        "adapters/specops_jax/README.md": 3,
        "adapters/specops_cupy/README.md": 1,
    }
    blocks = {block for text in READMES.values() for block in re.findall(r"```(\w+)\n", text)}
    assert blocks == {"python", "sh", "text", "toml"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("torch", "safetensors", "matplotlib", "rich"):
        pytest.importorskip(needed)
    import torch
    from safetensors.numpy import save_file

    from specops.cli import main

    rng = np.random.default_rng(0)
    kernels = {
        f"{name}.weight": rng.standard_normal((4, 2, 3, 3)).astype(np.float32)
        for name in ("block1.conv", "block2.conv")
    }
    monkeypatch.chdir(tmp_path)
    save_file(kernels, "model.safetensors")
    for name in ("before.pt", "after.pt"):
        torch.save({key: torch.from_numpy(w) for key, w in kernels.items()}, name)
    assert main(shlex.split(command)[1:]) == 0


def test_front_page_is_short() -> None:
    assert len(README.encode()) <= 10_000


def test_the_gate_finds_its_command() -> None:
    block = re.search(r"```sh\n(.*?)\n```", README.split("\n## Tests\n")[1], re.S)
    assert block is not None
    assert block.group(1).endswith("python -m pytest -n 2")
    assert "\n" not in block.group(1)


def test_commands_install_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    for text in READMES.values():
        named = re.findall(r"\[([\w,]+)\]'", text)
        assert {extra for names in named for extra in names.split(",")} <= extras
    assert re.findall(r"\[(\w+)\]'", README)


@pytest.mark.parametrize("name", [*READMES, OWN_TEST])
def test_what_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in re.findall(r"^## (.+)$", README, re.M)
    }
    for link, anchor in re.findall(r"\]\(([^)#:]*)#?([\w-]*)\)", text):
        assert ((ROOT / name).parent / link).exists(), link
        assert not anchor or anchor in anchors, anchor
    named = [] if name == OWN_TEST else re.findall(_PATH, text)  # its paths are its package's
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_map_of_the_tree_is_whole() -> None:
    section = README.split("\n## Where things live\n")[1].split("\n## ")[0]
    first = "".join(re.findall(r"^\|([^|]*)\|", section.split("|---|---|")[1], re.M))
    named = re.findall(r"`([\w.]+/?)`", first)
    for path in named:
        assert (ROOT / "specops" / path).exists(), path
    packages = {path.parent.name + "/" for path in (ROOT / "specops").glob("*/__init__.py")}
    assert {path for path in named if path.endswith("/")} == packages


def test_every_rule_is_in_the_table() -> None:
    import specops

    table = README.split("| you want | rule |")[1].split("\n\n")[0]
    rules = {name for name in specops.__all__ if hasattr(getattr(specops, name), "stage")}
    assert rules == set(re.findall(r"`([A-Z]\w+)", table)) & set(specops.__all__)
    assert len(rules) == 10


@pytest.mark.parametrize("adapter", ["specops_torch", "specops_jax", "specops_cupy"])
def test_adapters_say_what_they_have(adapter: str) -> None:
    """Their READMEs name public functions only, and all that are not the core's own."""
    import specops

    exported = set(import_module(adapter).__all__)
    text = READMES[f"adapters/{adapter}/README.md"]
    for name in exported - set(specops.__all__) - {"Attachment", "SpecopsState"}:
        assert re.search(rf"\b{name}\b", text), name
    for name in re.findall(rf"\b{adapter}\.([a-z]\w+)", text):
        assert name in exported, name


def test_every_example_is_listed() -> None:
    listed = set(re.findall(r"\b\w+\.py\b", READMES["examples/README.md"]))
    programs = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert programs <= listed


def test_costs_are_those_that_were_measured() -> None:
    results = (ROOT / "tests/benchmarks/RESULTS.md").read_text(encoding="utf-8")

    def figures(network: str, title: str) -> list[float]:
        row = results.split(title)[1].split(f"| {network}")[1].split("\n")[0]
        return [float(cell) for cell in re.findall(r"\| ([\d.]+)(?: ms|%)? ", row)]

    shares, of_torch, penalties = [], [], []
    for network in ("MLP 6×1024", "transformer, d = 512"):
        plain, _, normalised, ratio, penalised, _ = figures(network, "| torch spectral_norm |")
        shares.append(f"{100 * normalised / plain:.0f} %")
        of_torch.append(f"{ratio:.2f}")
        penalties.append(f"{100 * penalised / plain:.0f} %")
    assert f"| {' and '.join(shares)} ¹, {' and '.join(of_torch)} times torch's" in README
    assert f"| {' and '.join(penalties)} ¹ |" in README
