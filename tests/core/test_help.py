"""What `help` lists is what can be imported, one line to each name."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

BESIDES = {"checkpoints", "inspection", "measures", "plots", "plugins"}
"""Modules of specops that load on first use and that ``from specops import *`` leaves out."""


def listed(text: str) -> list[str]:
    """Names at the start of indented lines, with something said about them."""
    return re.findall(r"^ {4}(\w+) +\S", text, re.M)


@pytest.mark.parametrize("name", ["specops", "specops.measures", "specops.plots"])
def test_lists_and_exports_agree(name: str) -> None:
    if name == "specops.plots":
        pytest.importorskip("matplotlib")
    module = import_module(name)
    names = listed(module.__doc__ or "")
    assert len(names) == len(set(names))
    assert set(names) == set(module.__all__) | (BESIDES if name == "specops" else set())
    for member in names:
        assert getattr(module, member).__doc__, member
