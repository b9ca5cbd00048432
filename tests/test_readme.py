"""The README's programs run as printed, and its commands are the ones that work."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = [
    pytest.param(re.findall(r"```python\n(.*?)```", section, re.S), id=section.splitlines()[0])
    for section in README.split("\n## ")
    if "```python" in section
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("blocks", SECTIONS)
def test_programs_run(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "lightning", "transformers", "accelerate", "flax", "optax"):
        if any(f"import {name}" in block for block in blocks):
            pytest.importorskip(name)
    from specops import plugins

    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    try:
        exec(compile("\n".join(blocks), "README.md", "exec"), vars(module))
    finally:
        plugins.manager.cache_clear()


def test_every_use_has_a_program() -> None:
    assert len(SECTIONS) == 6


def test_commands_install_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    named = set(re.findall(r"\[(\w+)\]'", README))
    assert named
    assert named <= extras
    for path in re.findall(r"`((?:specops|adapters|examples|tests)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/]+\.png)\)|python (examples/\w+\.py)", README):
        assert (ROOT / next(filter(None, path))).exists(), path


def test_names_in_the_table_of_functions_are_public() -> None:
    import specops

    table = README.split("| function |")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M)))
    assert len(names) == 14
    for name in names:
        assert name in specops.__all__


def test_names_in_the_table_of_measures_are_public() -> None:
    from specops import measures

    table = README.split("| measure |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M)))
    functions = {name for name in measures.__all__ if name[0].islower()}
    assert set(names) == functions
