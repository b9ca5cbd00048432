"""Threads of BLAS while functions of small weights run, and after."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import specops
from specops import arrays
from specops.arrays import workers


def _threads() -> list[int]:
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((4, 4), True),
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


def test_torch_takes_one_thread_in_the_thread_that_calls() -> None:
    """The number is that of OpenMP, which each thread has of its own: others keep theirs."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    elsewhere: list[int] = []

    def other() -> None:
        torch.ones(8, 8) @ torch.ones(8, 8)
        elsewhere.append(torch.get_num_threads())

    try:

        @arrays.in_full_precision
        def fails(w: object) -> None:
            assert max(_threads()) == 1
            assert torch.get_num_threads() == 1
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            raise ValueError("on purpose")

        with threadpool_limits(2, user_api="blas"):
            outside = _threads()
            with pytest.raises(ValueError, match="purpose"):
                fails(torch.zeros(256, 256))
            assert _threads() == outside
        assert elsewhere == [2]
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


def test_chunks_come_back_in_order_and_the_caller_takes_some() -> None:
    with threadpool_limits(2, user_api="blas"):
        if max(_threads()) < 2:
            pytest.skip("BLAS has one thread")
        threads: set[str] = set()
        both = threading.Event()

        def work(chunk: slice) -> int:
            threads.add(threading.current_thread().name)
            if len(threads) > 1:
                both.set()
            both.wait(timeout=0.2)
            return chunk.start

        starts = workers.map_chunks(work, 64, 2**16)
        assert starts == sorted(starts)
        assert threading.current_thread().name in threads
        assert len(threads) == 2


@pytest.mark.parametrize("mine", [False, True])
def test_what_a_chunk_raises_is_raised_after_all_have_ended(mine: bool) -> None:
    caller, running = threading.current_thread(), []

    def work(chunk: slice) -> None:
        running.append(chunk)
        try:
            if (threading.current_thread() is caller) == mine:
                raise ValueError("on purpose")
            threading.Event().wait(0.05)
        finally:
            running.remove(chunk)

    with threadpool_limits(2, user_api="blas"):
        if max(_threads()) < 2:
            pytest.skip("BLAS has one thread")
        with pytest.raises(ValueError, match="purpose"):
            workers.map_chunks(work, 64, 2**16)
    assert running == []


def test_after_an_error_no_other_chunk_is_begun() -> None:
    begun: list[int] = []

    def work(chunk: slice) -> None:
        begun.append(chunk.start)
        if threading.current_thread() is not caller:
            raise ValueError("on purpose")
        threading.Event().wait(0.05)

    caller = threading.current_thread()
    with threadpool_limits(2, user_api="blas"):
        if max(_threads()) < 2:
            pytest.skip("BLAS has one thread")
        # A hundred chunks, of which each takes the caller a twentieth of a second.
        with pytest.raises(ValueError, match="purpose"):
            workers.map_chunks(work, 100, workers._CHUNK_BYTES)
    assert len(begun) < 50


_FORKED = """
import os, threading
from threadpoolctl import threadpool_limits
import numpy as np, specops
from specops.arrays import workers

threadpool_limits(2, user_api="blas")
entered, leave = threading.Event(), threading.Event()

def holds():
    with workers.one_blas_thread() as before, workers._lock:
        entered.set()
        leave.wait()

thread = threading.Thread(target=holds)
thread.start()
entered.wait()
child = os.fork()
if child == 0:
    with workers.one_blas_thread() as count:
        specops.spectral_norm(np.eye(4))
    lib = workers._controller("blas").lib_controllers[0]
    os._exit(0 if lib.num_threads == count else 1)
leave.set()
thread.join()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_is_forked_meanwhile_is_not_limited() -> None:
    """As workers of a loader are: the thread that holds the limit is not in the child."""
    command = [sys.executable, "-W", "ignore", "-c", _FORKED]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_thread_that_begins_with_a_small_weight_keeps_the_number_of_torch() -> None:
    torch = pytest.importorskip("torch")
    before, found = torch.get_num_threads(), []
    w = torch.eye(250)

    def first() -> None:
        specops.spectral_norm(w)
        found.append(torch.get_num_threads())

    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            thread = threading.Thread(target=first)
            thread.start()
            thread.join()
            assert found.pop() == number
    finally:
        torch.set_num_threads(before)


def test_libraries_that_are_imported_later_are_limited_too() -> None:
    """scipy.linalg brings a BLAS of its own, and scipy alone does not."""
    pytest.importorskip("scipy")
    script = (
        "import os, numpy, scipy, specops\n"
        "from threadpoolctl import threadpool_info\n"
        "from specops.arrays import workers\n"
        "def threads():\n"
        "    with workers.one_blas_thread():\n"
        "        return [x['num_threads'] for x in threadpool_info() if x['user_api'] == 'blas']\n"
        "before = threads()\n"
        "import scipy.linalg\n"
        "after = threads()\n"
        "assert len(after) > len(before) and set(after) == {1}, (before, after)\n"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
