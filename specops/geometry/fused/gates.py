"""Recurrent cells: a matrix for each gate, one after the other."""

from __future__ import annotations

from typing import Final

from specops.geometry.fused.known import Fused, Surroundings

CELLS: Final = {4: "an LSTM", 3: "a GRU"}
"""Names of cells, by their number of gates."""


def gates(layer: str, rows: int, columns: int, out: int, around: Surroundings) -> Fused | None:
    """The gates in the two layers of flax nnx cells: the recurrent one has an input per unit."""
    if layer not in ("dense_i", "dense_h"):
        return None
    return gates_of(around.inputs(["dense_h"], out), rows, out)


def gates_of(hidden: int, rows: int, out: int) -> Fused | None:
    """Gates with `hidden` outputs each; None if the rows are not those of a known cell."""
    if not hidden or rows % hidden or rows // hidden not in CELLS:
        return None
    count = rows // hidden
    return Fused.of(
        out, (hidden,) * count, f"{count} gates of {hidden}, as {CELLS[count]} has them"
    )
