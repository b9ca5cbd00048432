"""Parts of the kit on their own: laws, the oracle, what is imported when."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from specops import Conv, Dense, Plan
from specops.testing import Capabilities, LayerCase
from specops.testing.base import changed
from specops.testing.laws import RULES, LawChecks
from specops.testing.oracle import explicit_matrix, is_linear, parts_of
from specops.testing.recording import Recorder, with_grid
from specops.testing.suite import AdapterSuite
from tests.kit.tiny import Tiny


class _Wrong(Tiny, LawChecks):
    """A compiler that computes something else."""

    capabilities = Capabilities(supports_jit=True)

    def jit(self, function: Any) -> Any:
        return lambda *arguments: 1.01 * function(*arguments)


class _Doubles(Tiny, LawChecks):
    """Arrays of another dtype than asked for."""

    def array(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float64)


def test_a_wrong_compiler_is_found() -> None:
    with pytest.raises(AssertionError, match=r"on a dense under jit: entries differ by up to 0.01"):
        _Wrong().test_rule_under_jit("normalize-if-above")


def test_arrays_of_another_dtype_are_found() -> None:
    with pytest.raises(AssertionError, match=r"on float32 gave float64.*array\(\)"):
        _Doubles().test_rule_agrees_with_numpy("penalty")


def test_only_claimed_stages_are_tried() -> None:
    class Some(Tiny, LawChecks):
        capabilities = Capabilities(stages=("weights", "forward"))

    assert set(Some().choices()["law"]()) == RULES.keys() - {"penalty"}


def test_a_suite_that_is_not_finished_says_what_is_missing() -> None:
    class TestHalf(AdapterSuite):
        name = "half"

    with pytest.raises(TypeError, match=r"abstract methods.*layers"):
        TestHalf()


def test_explicit_matrix_takes_the_bias_off() -> None:
    w = np.arange(6.0).reshape(3, 2)
    case = LayerCase("affine", None, "w", (2,), lambda x: x @ w.T + 5.0)
    matrix = explicit_matrix(case)
    np.testing.assert_allclose(matrix, w)
    assert is_linear(case, matrix, 1e-5)
    bent = LayerCase("bent", None, "w", (2,), lambda x: np.tanh(x @ w.T))
    assert not is_linear(bent, explicit_matrix(bent), 1e-5)
    flat = LayerCase("flat", None, "w", (2,), lambda x: (x @ w.T).sum(0))
    with pytest.raises(ValueError, match=r"flat: apply\(\) returned .* \(3,\) for a batch of 1"):
        explicit_matrix(LayerCase("flat", None, "w", (2,), lambda x: (x @ w.T)[0]))
    assert flat.geometry is None


def test_explicit_matrix_goes_by_batches() -> None:
    seen = []
    case = LayerCase("long", None, "w", (600, 2), lambda x: seen.append(len(x)) or 2 * x)
    np.testing.assert_array_equal(explicit_matrix(case), 2 * np.eye(1200))
    assert max(seen) == 512


def test_splits_are_blocks_of_rows_of_each_matrix() -> None:
    w = np.arange(30.0).reshape(2, 5, 3)
    geometry = Dense(out_axes=(1,), batch_axes=(0,), splits=(3, 2))
    matrix = np.arange(60.0).reshape(10, 6)
    first, second = parts_of(matrix, w, geometry)
    np.testing.assert_array_equal(first, matrix[[0, 1, 2, 5, 6, 7]])
    np.testing.assert_array_equal(second, matrix[[3, 4, 8, 9]])
    turns = Dense(splits=(1, 2), repeats=2)
    first, second = parts_of(matrix[:6], np.empty((6, 6)), turns)
    np.testing.assert_array_equal(first, matrix[[0, 3]])
    np.testing.assert_array_equal(second, matrix[[1, 2, 4, 5]])


@pytest.mark.parametrize(
    ("geometry", "shape", "input_shape", "grid"),
    [
        (Conv(None), (8, 3, 3, 3), (3, 7, 5), (7, 5)),
        (Conv(None, groups=2), (8, 3, 3), (6, 9), (9,)),
        (Conv(None, layout="*IO"), (3, 3, 3, 8), (7, 5, 3), (7, 5)),
        (Conv(None, layout="*IO"), (3, 3, 8), (3, 7), (7,)),
        (Conv(None, transposed=True, groups=2, layout="IO*"), (6, 2, 3), (6, 9), (9,)),
        (Conv(None, transposed=True, layout="*OI"), (3, 2, 6), (9, 6), (9,)),
        (Conv((4,)), (8, 3, 3), (3, 9), (4,)),
    ],
)
def test_the_grid_of_a_case(geometry: Conv, shape: Any, input_shape: Any, grid: Any) -> None:
    assert with_grid(geometry, shape, input_shape).grid == grid


def test_changed_sees_nan_and_rounding() -> None:
    old = {"a": np.ones(3, np.float32), "b": np.array([np.nan, 1.0])}
    assert changed(old, old) == {}
    assert changed({**old, "a": old["a"] * (1 + 1e-6)}, old) == {}
    assert changed({**old, "a": old["a"] * (1 + 1e-6)}, old, 0.0).keys() == {"a"}
    assert changed({**old, "a": np.array([1.0, np.nan, 1.0])}, old) == {"a": np.inf}
    assert changed({**old, "b": np.array([np.nan, 2.0])}, old) == {"b": 1.0}
    with pytest.raises(AssertionError, match="names of parameters must not depend"):
        changed({"a": old["a"]}, old)


def test_the_recorder_is_a_rule() -> None:
    recorder = Recorder()
    Plan([("*", recorder)])
    w = np.eye(2)
    assert recorder.update(w, Dense(), {})[0] is w
    assert recorder.seen == [(w, Dense())]


def test_the_kit_is_not_imported_with_specops() -> None:
    code = "import sys, specops, specops.plugins; print('specops.testing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_pytest_the_kit_says_what_to_install() -> None:
    code = "import sys; sys.modules['pytest'] = None; import specops.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(r"ImportError: .*pip install 'specops\[testing\]'", done.stderr)
