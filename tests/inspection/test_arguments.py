"""What `specops.inspect` is given, beside a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops import errors
from tests.inspection.files import written

KERNEL = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)

WRONG: list[dict[str, Any]] = [
    {"method": "fast"},
    {"boundary": "reflect"},
    {"layout": "HWIO"},
    {"input_size": 0},
    {"input_size": "8x8"},
    {"input_size": 8.5},
    {"input_size": {"c*": (8, -1)}},
    {"stride": 0},
    {"stride": 2.5},
    {"dilation": {"c*": 0}},
    {"padding": -1},
    {"padding": "reflect"},
    {"groups": 0},
    {"exclude": "c*"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "m.safetensors", {"c.weight": KERNEL})


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_ones_are_refused_by_name(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as raised:
        specops.inspect(path, **options)
    assert not isinstance(raised.value, errors.CheckpointError)


def test_numbers_of_numpy_and_one_entry_for_each_axis(path: Path) -> None:
    def told(**options: Any) -> tuple[str, Any]:
        (row,) = specops.inspect(path, **options).measured
        assert row.figures is not None
        return row.geometry, row.figures.sigma_max

    wanted = told(input_size=(8, 8), stride=2, padding="same")
    assert wanted[0] == "conv 8×8, zeros, stride 2"
    assert told(input_size=np.int64(8), stride=np.int64(2), padding="SAME") == wanted
    assert told(input_size=[8, 8], stride=(2, 2), padding="same") == wanted
