"""Workers for stacks of small matrices on the CPU: many LAPACK calls at once, not one in pieces.

LAPACK gains little from threads inside one small matrix and loses much when they fight over
cores, most of all with those of other processes: whole public functions on small weights run with
one thread. Work on a stack is cut into chunks, and as many workers as BLAS had threads take them,
each with one BLAS thread while it lasts. A user who gave BLAS one thread gets one worker; whatever
was set is set again afterwards.
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
"""Blocks of one chunk at most, a choice of memory per worker: with chunks twice as large a pool was
4.5 to 6.6 times as fast as torch's SVD of all blocks at once, in a sixth to a third of the
memory."""
_ALONE_BYTES = 2**19
"""Of a whole stack that one thread takes: projections of small kernels were up to a third slower
with a second one, which cost more to begin than it took off."""
_SMALL_MATRIX, _SMALL_WEIGHT = 2**16, 2**17
"""Entries of a weight's largest matrix, and of the weight, up to which a function takes one thread.
On two cores that other processes kept busy its functions took 2 to 35 times as long with two
threads at 256×256 and at 32 of 64×64, up to 30 times as much of the processor; those of torch
began threads from 4×4 on, NumPy's from 28×28 on."""

_lock = threading.Lock()
_limited = False
_before: list[tuple[Any, int]] = []
"""The libraries that are limited, and their numbers of threads."""


def _controller(user_api: str) -> Any:
    return _controller_of(user_api, len(sys.modules))


@lru_cache(maxsize=8)
def _controller_of(user_api: str, modules: int) -> Any:
    from threadpoolctl import ThreadpoolController

    del modules  # one imported since then may have brought threads of its own
    return ThreadpoolController().select(user_api=user_api)


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """One BLAS thread per caller for the duration; yields how many there were.

    The thread that limits BLAS lifts the limit, since some libraries obey no other; for threads
    that are inside then it ends early.
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
    """In a forked child: the thread that held the lock, or the limit, is not there."""
    global _lock, _limited
    _lock = threading.Lock()
    if _limited:
        _limited = False
        _set(_before, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """One thread of OpenMP for the duration, in the calling thread: each has a number of its own.

    torch's operations obey it, and its LAPACK until `torch.set_num_threads` has given that a number
    of the process.
    """
    before = [(lib, lib.num_threads) for lib in _controller("openmp").lib_controllers]
    _set(before, 1)
    try:
        yield
    finally:
        _set(before, None)


def _set(libraries: list[tuple[Any, int]], count: int | None) -> None:
    """That many threads, or as many as there were."""
    for lib, threads in libraries:
        if threads != 1:
            lib.set_num_threads(threads if count is None else count)
            if count is None and hasattr(lib, "clear_controlling_thread"):
                lib.clear_controlling_thread()  # other threads may limit it again


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
    """The caller takes chunks too: beside busy processes it need not wait for others to begin."""
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
                left.clear()  # nobody begins another
                raise

    pool = ThreadPoolExecutor(workers - 1)
    others: list[Future[None]] = []
    with suppress(RuntimeError):  # Where no thread can begin the caller takes all.
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
