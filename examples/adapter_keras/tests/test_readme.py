"""The README's program runs as printed, and the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_program_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict[str, object] = {}
    exec(compile(program, "README.md", "exec"), found)
    report = found["spectral"].report()  # type: ignore[attr-defined]
    assert {row.name for row in report.constrained} == {"conv/kernel", "dense/kernel"}


def test_files_exist() -> None:
    here = Path(__file__).parents[1]
    for name in re.findall(r"`((?:specops_keras|tests)/\w+\.py|\w+\.py)`", README):
        assert (here / name).exists() or (here / "specops_keras" / name).exists(), name
