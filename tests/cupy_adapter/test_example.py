"""The example on arrays, on the host and without a device; and the examples in docstrings."""

from __future__ import annotations

import doctest
import runpy
from pathlib import Path
from typing import Any

import pytest

from specops_cupy import attachment
from tests.cupy_adapter.libraries import absent, needs_device

EXAMPLE = Path(__file__).parents[2] / "examples" / "cupy_arrays.py"


@pytest.fixture(scope="module")
def main() -> Any:
    return runpy.run_path(str(EXAMPLE))["main"]


def test_on_numpy(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--numpy", "--quick", "--share", "0.25"])
    printed = capsys.readouterr().out
    for text in ("4 matrices 48×48", "13.748 → 3.4370", "512 singular values", "gap ≤", "layer.w"):
        assert text in printed
    assert "shared" not in printed


def test_without_a_device_it_says_so_in_one_line(
    main: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with absent(monkeypatch):
        assert main([]) is None
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "cupy is not installed" in printed
    assert "--numpy" in printed


@pytest.mark.parametrize("share", ["0", "2", "nan"])
def test_shares_out_of_range(main: Any, capsys: pytest.CaptureFixture[str], share: str) -> None:
    with pytest.raises(SystemExit):
        main(["--share", share])
    assert "--share must be in (0, 1]" in capsys.readouterr().err


@needs_device
def test_on_a_device(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--share", "0.25"])
    printed = capsys.readouterr().out
    assert "13.748 → 3.4370" in printed
    if "no hand-over" not in printed:
        assert "and back, shared" in printed


def test_docstrings_run() -> None:
    result = doctest.testmod(attachment, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed
