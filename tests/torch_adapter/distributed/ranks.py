"""Runs functions on several gloo processes, all of them in one group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Case = Callable[[Path], None]
_PATIENCE = 20
"""Seconds until a collective that others have left fails."""
_PRELOADED = [
    f"{__package__}.rules",
    f"{__package__}.training",
    "accelerate",
    "lightning.pytorch.strategies",
    "numpy.testing",
    "specops.arrays.numpy",
    "specops.arrays.torch",
    "specops.models",
    "specops_torch.adapter",
]
"""Once, where processes are forked from: what is there, and what most cases would import."""


def run(cases: Sequence[Case], ranks: int, folder: Path) -> dict[str, str]:
    """What went wrong in each case, on any rank; "" where nothing did.

    A case is a function of a module; processes are forked from one that has imported all it needs.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results = context.SimpleQueue()
    given = (cases, ranks, folder, os.urandom(4).hex(), results)
    children = [context.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    failures = {case.__name__: "" for case in cases}
    ended = set()
    while not results.empty():
        rank, name, failure = results.get()
        ended.add((rank, name))
        if failure:
            failures[name] += f"rank {rank}: {failure}\n"
    for name in failures:
        missing = [rank for rank in range(ranks) if (rank, name) not in ended]
        if missing:
            failures[name] += f"ranks {missing} never came to an end\n"
    return failures


def _rank(
    rank: int, cases: Sequence[Case], ranks: int, folder: Path, name: str, results: Any
) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    # As in the other tests; the rest is what torch says of itself.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"torch\.")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{name}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=_PATIENCE),
    )
    for case in cases:
        torch.manual_seed(0)
        failure = ""
        try:
            case(folder)
        except BaseException:
            failure = traceback.format_exc()
        results.put((rank, case.__name__, failure))
        try:
            # Where others wait in a collective that this one left, they do so for long enough.
            dist.barrier()
        except RuntimeError:
            os._exit(1)
    dist.destroy_process_group()
