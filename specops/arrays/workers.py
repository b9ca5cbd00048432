"""Workers for stacks of small matrices on the CPU: many LAPACK calls at once, not one in pieces.

LAPACK gains little from threads inside one small matrix and loses much when they fight over
cores. Work on a stack is therefore cut into chunks, and as many workers as BLAS had threads
take them, each with one BLAS thread while it lasts. A user who gave BLAS one thread gets one
worker; whatever was set is set again afterwards.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_CHUNK_BYTES = 4 * 2**20
"""Blocks of one chunk at most, a choice of memory per worker: with chunks twice as large a pool was
4.5 to 6.6 times as fast as torch's SVD of all blocks at once, in a sixth to a third of the
memory."""

_lock = threading.Lock()
_depth = 0
_restore: Any = None
_workers = 1


@lru_cache(maxsize=4)
def _controller(loaded: tuple[bool, ...]) -> Any:
    from threadpoolctl import ThreadpoolController

    del loaded  # a library imported since then brings a BLAS of its own
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """One BLAS thread per caller for the duration; yields how many there were."""
    global _depth, _restore, _workers
    with _lock:
        if _depth == 0:
            controller = _controller(tuple(m in sys.modules for m in ("torch", "scipy")))
            _workers = max((lib["num_threads"] for lib in controller.info()), default=1)
            _restore = controller.limit(limits=1)
        _depth += 1
        workers = _workers
    try:
        yield workers
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore.restore_original_limits()


def map_chunks(function: Callable[[slice], Any], count: int, item_bytes: int) -> list[Any]:
    """``[function(chunk), ...]`` for slices that cover ``range(count)``, in order."""
    if count * item_bytes <= 2**16:
        return [function(slice(0, count))]
    with one_blas_thread() as workers:
        size = max(1, min(_CHUNK_BYTES // item_bytes, -(-count // (2 * workers))))
        chunks = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        if workers == 1 or len(chunks) == 1:
            return [function(chunk) for chunk in chunks]
        with ThreadPoolExecutor(min(workers, len(chunks))) as pool:
            return list(pool.map(function, chunks))
