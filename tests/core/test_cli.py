"""The command line: its table of adapters, its version, its exit status."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import specops
from specops import cli, plugins, tables
from specops.errors import PluginWarning
from specops.hookspecs import AdapterStatus

ROOT = Path(__file__).parents[2]
FOUND = [
    AdapterStatus("far", False, "far is not installed:\npip install 'specops[far]'"),
    AdapterStatus("near", True, "near 1.2", "weights, forward; checkpoints"),
]


class Terminal:
    """Standard output that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that only these adapters are installed."""
    monkeypatch.setattr(plugins, "statuses", lambda: FOUND)


def test_the_entry_point_is_this_function() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    script = metadata.EntryPoint("specops", scripts["specops"], "console_scripts")
    assert script.load() is cli.main


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "specops", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"specops {specops.__version__}"


def test_adapters_are_listed_in_aligned_columns(found: None, capsys: Any) -> None:
    assert cli.main(["adapters"]) == 0
    head, far, near = capsys.readouterr().out.splitlines()
    assert head.split() == ["adapter", "available", "supports", "detail"]
    assert far.split()[:2] == ["far", "no"]
    assert far.endswith("far is not installed: pip install 'specops[far]'")
    assert near.split()[:2] == ["near", "yes"]
    for text in ("weights, forward; checkpoints", "near 1.2"):
        assert text in near
    assert near.index("weights") == head.index("supports")
    assert near.index("near 1.2") == far.index("far is not") == head.index("detail")


def test_a_terminal_gets_a_table(found: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["adapters"]) == 0
    assert "┃" in terminal.text
    # Not taken for markup.
    assert "specops[far]" in terminal.text
    assert "weights, forward; checkpoints" in terminal.text


def test_without_rich_a_terminal_gets_plain_text(
    found: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["adapters"]) == 0
    assert terminal.text.splitlines()[2].startswith("near     yes")


def test_a_broken_plugin_is_a_row_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    entry = metadata.EntryPoint("bad", "no_such_module_anywhere", "specops")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    plugins.manager.cache_clear()
    try:
        assert cli.main(["adapters"]) == 0
        out, err = capsys.readouterr()
        assert "bad" in out
        assert "no_such_module_anywhere" in out
        assert not err
        plugins.manager.cache_clear()
        with pytest.warns(PluginWarning):
            plugins.statuses()
    finally:
        monkeypatch.undo()
        plugins.manager.cache_clear()


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(plugins, "statuses", list)
    assert cli.main(["adapters"]) == 0
    assert capsys.readouterr().out == "no adapter is installed\n"


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"specops {specops.__version__}\n"


def test_no_command_shows_the_commands(capsys: Any) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "adapters" in err
    with pytest.raises(SystemExit) as stop:
        cli.main(["adaptors"])
    assert stop.value.code == 2
    assert "invalid choice: 'adaptors'" in capsys.readouterr().err


def test_the_installed_adapters_from_outside() -> None:
    code = "import sys; from specops.cli import main; sys.exit(main(['adapters']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert {"torch", "jax", "cupy"} <= rows.keys()


def test_torch_says_what_it_supports() -> None:
    pytest.importorskip("torch")
    status = next(s for s in plugins.statuses() if s.name == "torch")
    assert status.available
    assert status.supports.startswith("weights, gradients, forward; checkpoints")
