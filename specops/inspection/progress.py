"""A progress bar for the inspection of a checkpoint."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

from specops.checkpoints import Entry
from specops.inspection.figures import Method, takes_bounds
from specops.tables import printable

_DECOMPOSED = 15.0
"""The time of all singular values, in units of that of bounds of the norm: an estimate, which the
bar corrects as it goes."""
_READ = 500.0
"""The time to read and cast an entry, in units of a product: an estimate as well."""
_REMEMBERED = 3600.0
"""Seconds over which the speed is averaged to estimate the time left: a tensor may take minutes."""


def work(entry: Entry, method: Method) -> float:
    """The work for a tensor, in products, estimated from its shape before it is read."""
    if entry.problem or entry.shape is None:
        return 1.0
    size = math.prod(entry.shape)
    if len(entry.shape) < 2:
        return 1.0 + size
    side = min(sorted(entry.shape)[-2:])
    factor = 1.0 if takes_bounds(side, method) else _DECOMPOSED
    return 1.0 + size * (_READ + side * factor)


@contextlib.contextmanager
def shown_progress(method: Method) -> Iterator[dict[str, Any]]:
    """Callbacks for `inspect_checkpoint` that move a bar on standard error, if it is a terminal."""
    if not (sys.stderr.isatty() and find_spec("rich")):
        yield {}
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[tensors]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # The work of all tensors before each.
    before = [0.0]
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=_REMEMBERED,
    ) as bar:
        task = bar.add_task("opening", total=None, tensors="")

        def listed(entries: Sequence[Entry]) -> None:
            before[:] = accumulate((work(entry, method) for entry in entries), initial=0.0)
            bar.update(task, total=before[-1])

        def progress(done: int, total: int, name: str) -> None:
            text = f"{done}/{total}"
            bar.update(task, completed=before[done], tensors=text, description=printable(name))

        yield {"progress": progress, "listed": listed}
