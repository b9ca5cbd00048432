"""Threads of BLAS while functions of small weights run, and after."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from specops import arrays
from specops.arrays import workers


def _threads() -> list[int]:
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((48, 48), False),
        ((256, 256), True),
        ((512, 512), False),
        ((32, 64, 64), True),
        ((16, 16, 3, 3), True),
        ((512, 512, 3, 3), False),
    ],
)
def test_small_weights_take_one_thread(shape: tuple[int, ...], small: bool) -> None:
    with threadpool_limits(2, user_api="blas"):
        if max(_threads()) < 2:
            pytest.skip("BLAS has one thread")

        @arrays.in_full_precision
        def seen(w: np.ndarray) -> int:
            return max(_threads())

        before = _threads()
        assert seen(np.zeros(shape)) == (1 if small else 2)
        assert _threads() == before


def test_torch_keeps_its_threads() -> None:
    """Their number is the process's: threads that begin meanwhile would keep another."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        @arrays.in_full_precision
        def fails(w: object) -> None:
            assert max(_threads()) == 1
            assert torch.get_num_threads() == 2
            raise ValueError("on purpose")

        with threadpool_limits(2, user_api="blas"):
            outside = _threads()
            with pytest.raises(ValueError, match="purpose"):
                fails(torch.zeros(256, 256))
            assert _threads() == outside
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_whoever_leaves_last_threads_are_as_before() -> None:
    entered, leave = threading.Event(), threading.Event()

    def late() -> None:
        with workers.one_blas_thread():
            entered.set()
            leave.wait()

    before = _threads()
    thread = threading.Thread(target=late)
    with workers.one_blas_thread():
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert _threads() == before
    # And the next thread may limit them.
    seen: list[int] = []

    def other() -> None:
        with workers.one_blas_thread():
            seen.extend(_threads())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert set(seen) == {1}


def test_callers_inside_each_other_share_one_limit() -> None:
    with threadpool_limits(2, user_api="blas"):
        outside = _threads()
        with workers.one_blas_thread() as first, workers.one_blas_thread() as second:
            assert first == second == max(outside)
            assert set(_threads()) == {1}
        assert _threads() == outside
