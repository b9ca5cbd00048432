"""Workers for stacks of small matrices on the CPU: many single-threaded LAPACK calls in parallel.

LAPACK gains little from threads inside one small matrix, and loses much when threads compete for
cores, most of all with those of other processes. So public functions run with one thread on small
weights. Work on a stack is cut into chunks for as many workers as BLAS had threads, and each worker
has one BLAS thread meanwhile. A user who gave BLAS one thread gets one worker. All settings are
restored afterwards.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

_CHUNK_BYTES = 4 * 2**20
"""Most bytes of a chunk's blocks, a choice of memory per worker. With chunks twice as large a pool
was 4.5 to 6.6 times as fast as torch's SVD of all blocks at once, in a sixth to a third of the
memory."""
_ALONE_BYTES = 2**19
"""Up to so many bytes one thread works on a whole stack: projections of small kernels were up to a
third slower with a second one, which took longer to start than it saved."""
_SMALL_MATRIX, _SMALL_WEIGHT = 2**16, 2**17
"""Up to so many entries of a weight's largest matrix, and of the weight, a function takes one
thread. On two cores that other processes kept busy, functions on 256×256 and on 32 of 64×64 took 2
to 35 times as long with two threads, and up to 30 times as much processor time. torch starts
threads from 4×4 on, NumPy from 28×28 on."""

_lock = threading.Lock()
_limited = False
_before: list[tuple[Any, int]] = []
"""The libraries that are limited, and the numbers of threads that they had."""


def _controller(user_api: str) -> Any:
    return _controller_of(user_api, len(sys.modules))


@lru_cache(maxsize=8)
def _controller_of(user_api: str, modules: int) -> Any:
    from threadpoolctl import ThreadpoolController

    del modules  # part of the cache's key: a module imported since may bring threads of its own
    return ThreadpoolController().select(user_api=user_api)


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """One BLAS thread per caller meanwhile; yields how many there were.

    The thread that set the limit removes it, because some libraries obey no other thread. For
    other threads that are inside at that moment the limit ends early.
    """
    global _limited, _before
    with _lock:
        mine, _limited = not _limited, True
        if mine:
            controller = _controller("blas")
            _before = [(lib, lib.num_threads) for lib in controller.lib_controllers]
            _set(_before, 1)
        workers = max((threads for _, threads in _before), default=1)
    try:
        yield workers
    finally:
        if mine:
            with _lock:
                _limited = False
                _set(_before, None)


def _forget() -> None:
    """Reset in a forked child, where the thread that held the lock, or the limit, is missing."""
    global _lock, _limited
    _lock = threading.Lock()
    if _limited:
        _limited = False
        _set(_before, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """One OpenMP thread meanwhile for the calling thread: each thread has its own number.

    torch's operations obey it. So does torch's LAPACK, unless `torch.set_num_threads` was called,
    which sets a number for the whole process.
    """
    before = [(lib, lib.num_threads) for lib in _controller("openmp").lib_controllers]
    _set(before, 1)
    try:
        yield
    finally:
        _set(before, None)


def _set(libraries: list[tuple[Any, int]], count: int | None) -> None:
    """Set so many threads, or (None) as many as there were."""
    for lib, threads in libraries:
        if threads != 1:
            lib.set_num_threads(threads if count is None else count)
            if count is None and hasattr(lib, "clear_controlling_thread"):
                lib.clear_controlling_thread()  # from now on other threads may limit it


def is_small(shape: tuple[int, ...]) -> bool:
    """Whether work with a weight, or a stack of matrices, of this shape takes one thread."""
    matrix, entries = math.prod(sorted(shape)[-2:]), math.prod(shape)
    return matrix <= _SMALL_MATRIX and entries <= _SMALL_WEIGHT


def map_chunks(function: Callable[[slice], Any], count: int, item_bytes: int) -> list[Any]:
    """``[function(chunk), ...]`` for slices that cover ``range(count)``, in order."""
    with one_blas_thread() as workers:
        if count * item_bytes <= _ALONE_BYTES:
            workers = 1
        pieces = 2 * workers if workers > 1 else 1
        size = max(1, min(_CHUNK_BYTES // item_bytes, -(-count // pieces)))
        chunks = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        if workers == 1 or len(chunks) == 1:
            return [function(chunk) for chunk in chunks]
        return _shared(function, chunks, min(workers, len(chunks)))


def _shared(function: Callable[[slice], Any], chunks: list[slice], workers: int) -> list[Any]:
    """Results by several workers; the caller works, too, and need not wait for others to start."""
    results: list[Any] = [None] * len(chunks)
    left = deque(enumerate(chunks))

    def take() -> None:
        while True:
            try:
                at, chunk = left.popleft()
            except IndexError:
                return
            try:
                results[at] = function(chunk)
            except BaseException:
                left.clear()  # so that no worker takes another chunk
                raise

    pool = ThreadPoolExecutor(workers - 1)
    others: list[Future[None]] = []
    with suppress(RuntimeError):  # if no thread can start, the caller takes all chunks
        others += (pool.submit(take) for _ in range(workers - 1))
    try:
        take()
    finally:
        begun = [other for other in others if not other.cancel()]
        wait(begun)
        pool.shutdown(wait=False)
    for other in begun:
        other.result()
    return results
