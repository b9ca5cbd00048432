"""Products of sharded matrices with vectors: each rank multiplies its part, then ranks sum up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from specops import arrays
from specops.geometry import Dense
from specops.tracking import Wanted
from specops_torch.collectives import about, added
from specops_torch.pieces import Piece
from specops_torch.shared import SharedLocation


@dataclass(frozen=True)
class _Block:
    """For one block of `splits`: which rows of a rank's matrix it has, and as which of its rows."""

    here: Any
    there: torch.Tensor
    rows: int


@dataclass(frozen=True)
class _Cut:
    """A rank's part of the matrices that a weight consists of."""

    stack: torch.Tensor
    columns: torch.Tensor
    blocks: tuple[_Block, ...]


@lru_cache(maxsize=4096)
def _cut(geometry: Dense, shape: tuple[int, ...], piece: Piece, device: str) -> _Cut:
    batch, out, inn = geometry.axes(len(shape))
    stack, rows, columns = (_flat_indices(shape, piece, axes) for axes in (batch, out, inn))
    (whole,) = _whole(geometry).matrix_shapes(shape)
    sizes = geometry.splits or whole[:1]
    turns, within = rows // sum(sizes), rows % sum(sizes)
    blocks, begin = [], 0
    for size in sizes:
        inside = torch.nonzero((within >= begin) & (within < begin + size)).flatten()
        there = (turns[inside] * size + within[inside] - begin).to(device)
        first = int(inside[0]) if len(inside) else 0
        if torch.equal(inside, torch.arange(first, first + len(inside))):
            here: Any = slice(first, first + len(inside))
        else:
            here = inside.to(device)
        blocks.append(_Block(here, there, size * geometry.repeats))
        begin += size
    return _Cut(stack.to(device), columns.to(device), tuple(blocks))


def _whole(geometry: Dense) -> Dense:
    """The matrix in which all blocks lie side by side."""
    return replace(geometry, splits=None, repeats=1)


def _flat_indices(shape: tuple[int, ...], piece: Piece, axes: tuple[int, ...]) -> torch.Tensor:
    """The indices that the rank holds, along the flattened axes."""
    found = torch.zeros(1, dtype=torch.int64)
    for axis in axes:
        found = (found[:, None] * shape[axis] + piece.indices(axis)).reshape(-1)
    return found


def multiplied(
    asked: Sequence[tuple[SharedLocation, Wanted]],
) -> tuple[list[tuple[torch.Tensor, ...]], list[Exception | None]]:
    """(the products that are wanted, the errors on this rank), by one collective.

    All weights are of one mesh. If a rank fails to multiply its part, all ranks get NaN.
    """
    parts: list[torch.Tensor] = []
    failures: list[Exception | None] = []
    for x, wanted in asked:
        blank = _blank(x, wanted)
        failure: Exception | None = None
        if x.known.speaks:
            try:
                blank = _multiply(x, wanted, blank)
            except Exception as error:
                failure = error
                blank = [b.fill_(float("nan")) for b in blank]
        parts += blank
        failures.append(failure)
    layout = asked[0][0].known
    with about([x.weight.name for x, _ in asked]):
        sums = iter(added(parts, layout.group, layout.device))
    answers = [tuple(next(sums).to(rows.device) for rows in wanted.rows) for _, wanted in asked]
    return answers, failures


def outer(
    x: SharedLocation, geometry: Dense, vectors: Sequence[torch.Tensor], factors: Sequence[Any]
) -> torch.Tensor:
    """This rank's part of Σ factor·uvᴴ over the blocks; `vectors` are u and v of each in turn."""
    local = x.local
    if x.known.own.is_empty:
        return torch.zeros_like(local)
    cut, whole = _cut_of(x, geometry), _whole(geometry)
    term = torch.zeros_like(whole.blocks(local)[0], dtype=vectors[0].dtype)
    stacked = term.view(-1, *term.shape[-2:])
    us, vs = ([a.to(local.device) for a in vectors[first::2]] for first in (0, 1))
    for block, u, v, factor in zip(cut.blocks, us, vs, factors, strict=True):
        left, right = (
            (a.reshape(-1, a.shape[-1])[cut.stack]) for a in (u * factor.to(u.device)[..., None], v)
        )
        left, right = left[:, block.there], right[:, cut.columns].conj()
        stacked[:, block.here] = left[..., None] * right[:, None, :]
    return whole.assemble((term,), tuple(local.shape))


def _cut_of(x: SharedLocation, geometry: Dense) -> _Cut:
    return _cut(geometry, tuple(x.parameter.shape), x.known.own, str(x.local.device))


def _blank(x: SharedLocation, wanted: Wanted) -> list[torch.Tensor]:
    shapes = wanted.geometry.matrix_shapes(tuple(x.parameter.shape))
    sides = [shape[0 if wanted.to_left else 1] for shape in shapes]
    device = x.local.device  # which may be the host's, with vectors elsewhere
    return [
        rows.new_zeros(*rows.shape[:-1], side, device=device)
        for rows, side in zip(wanted.rows, sides, strict=True)
    ]


def _multiply(x: SharedLocation, wanted: Wanted, blank: list[torch.Tensor]) -> list[torch.Tensor]:
    """Products with this rank's part of the matrices, zeros elsewhere."""
    geometry, local = wanted.geometry, x.local
    cut = _cut_of(x, geometry)
    local = arrays.to_compute(arrays.namespace(local), local)
    (matrices,) = _whole(geometry).blocks(local)
    matrices = matrices.reshape(-1, *matrices.shape[-2:])
    for block, rows, out in zip(cut.blocks, wanted.rows, blank, strict=True):
        a = matrices[:, block.here]
        rows = rows.to(a.device, a.dtype).reshape(-1, *rows.shape[-2:])[cut.stack]
        target = out.view(-1, *out.shape[-2:])
        if wanted.to_left:
            found = rows[..., cut.columns] @ a.mT
            into = block.there
        else:
            found = (rows[..., block.there].conj() @ a).conj()
            into = cut.columns
        stack, k = cut.stack[:, None, None], torch.arange(out.shape[-2], device=out.device)
        target[stack, k[:, None], into] = found.to(out.dtype)
    return blank
