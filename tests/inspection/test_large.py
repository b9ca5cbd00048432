"""Bounds of large matrices, and the bar that knows how long they take."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from specops.checkpoints import Entry
from specops.inspection import inspect_checkpoint, large
from specops.inspection.large import norm_bounds
from specops.inspection.progress import shown_progress, work
from tests.inspection.files import model, written

RNG = np.random.default_rng(3)
NORMAL = RNG.normal(size=(300, 130)).astype(np.float32)
SPIKED = NORMAL + np.float32(4.0) * np.outer(NORMAL[:, 0], NORMAL[0]).astype(np.float32)
MATRICES = {
    "normal": NORMAL,
    "wide": np.ascontiguousarray(NORMAL.T),
    "few directions": SPIKED,
    "all values equal": np.linalg.qr(NORMAL)[0],
    "one value": np.ones((200, 130), np.float32),
    "complex": (NORMAL[:150] + 1j * NORMAL[150:]).astype(np.complex64),
}


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_SINGLE_FROM", 100)
    monkeypatch.setattr(large, "_SUMMED", 64)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("key", MATRICES)
def test_single_precision_encloses_to_a_thousandth(key: str) -> None:
    a = MATRICES[key]
    values = np.linalg.svd(a.astype(np.result_type(a, np.float64)), compute_uv=False)
    found = norm_bounds(a)
    assert found.lower <= values[0] * (1 + 1e-12)
    assert values[0] <= found.upper <= found.lower * 1.001
    assert found.frobenius == pytest.approx(np.sqrt(np.sum(values**2)), rel=1e-9)


@pytest.mark.usefixtures("small_is_large")
def test_as_many_steps_again_go_on_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[bool] = []
    have_factors = large.host.have_factors

    def counted(gram: np.ndarray) -> np.ndarray:
        found = have_factors(gram)
        factored.append(bool(found))
        return found

    monkeypatch.setattr(large.host, "have_factors", counted)
    monkeypatch.setattr(large, "_STEPS", 8)
    a = np.random.default_rng(0).normal(size=(700, 600)).astype(np.float32)
    found = large._by_single(a)
    assert factored == [False, True]
    assert found is not None
    top = np.linalg.norm(a.astype(float), 2)
    assert found.lower <= top <= found.upper <= found.lower * 1.001


@pytest.mark.usefixtures("small_is_large")
def test_what_few_steps_do_not_find_is_found_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_ROOM", -1e-3)  # below the norm no factor is found
    a = np.random.default_rng(0).normal(size=(700, 600)).astype(np.float32)
    assert large._by_single(a) is None
    top = np.linalg.norm(a.astype(float), 2)
    found = norm_bounds(a)
    assert found.lower <= top <= found.upper <= found.lower * (1 + 1e-4)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("ratio", [0.999, 1.001])
def test_a_limit_below_the_norm_has_no_factor(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = float(np.linalg.norm(SPIKED.astype(float), 2))
    measured = (top * ratio / (1.0 + large._ROOM), 0.0)
    monkeypatch.setattr(large, "_measured", lambda a, v: measured)
    assert (large._by_single(SPIKED) is None) == (ratio < 1.0)


def test_work_grows_with_what_is_computed() -> None:
    matrix = Entry("w", (4096, 4096), "float32")
    sizes = [
        work(Entry("b", (4096,), "float32"), "auto"),
        work(Entry("w", (64, 64), "float32"), "auto"),
        work(matrix, "bounds"),
        work(matrix, "exact"),
    ]
    assert sizes == sorted(sizes)
    assert work(matrix, "auto") == work(matrix, "bounds")
    assert work(Entry("w", None, "float32", problem="lost"), "auto") == 1.0


def test_files_are_listed_once_before_they_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", model(), format="pt")
    calls: list[object] = []
    inspect_checkpoint(
        path,
        progress=lambda done, total, name: calls.append(done),
        listed=lambda entries: calls.append([entry.name for entry in entries]),
    )
    assert calls[0] == list(model())
    assert calls[1:] == list(range(len(model()) + 1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    small, matrix = (Entry(str(n), (n, n), "float32") for n in (2, 4096))
    with shown_progress("bounds") as calls:
        calls["listed"]([small, *[matrix] * 3])
        for done in range(4):
            calls["progress"](done, 4, "layer.weight")
            time.sleep(0.01)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if "3/4" in line][-1]
    assert "layer.weight" in last
    assert re.search(r"3/4 +\d:\d\d:\d\d left +\d:\d\d:\d\d", last), last


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with shown_progress("auto") as calls:
        assert calls == {}
