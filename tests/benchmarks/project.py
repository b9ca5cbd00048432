"""Projections onto the spectral ball against full SVD clips and the clip of Sedghi et al."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import specops
from specops import Conv, Dense, project_spectral_ball
from tests.benchmarks import conv
from tests.benchmarks.harness import Results, milliseconds, pair

SHAPES = [(512, 512), (1024, 1024), (2048, 2048), (1024, 4096)]
NUMPY_SHAPES = [(512, 512), (1024, 4096)]
WARM_SIDES = [1024, 2048]
DEVICE_SHAPES = [(4096, 4096), (24, 1024, 4096)]
SHARE = 0.4
"""Share of the singular values that the dense clips change."""
SMALL_CASES = [(3, 16, 32), (3, 32, 16), (3, 64, 8)]
BOUNDS = (0.9, 0.5, 0.25, 0.1)
_SLOW = 5.0
"""Seconds of one baseline run from which a case gets few repeats."""
_FEW = 3


def svd_clip(xp: Any, w: Any, limit: float) -> Any:
    """The clip by a full SVD, in NumPy or torch."""
    left, values, right = xp.linalg.svd(w, full_matrices=False)
    return (left * values.clip(max=limit)[..., None, :]) @ right


def paper_clip(kernel: np.ndarray, grid: tuple[int, int], limit: float) -> np.ndarray:
    """Sedghi, Gupta & Long 2019, appendix A, on a kernel (height, width, in, out)."""
    transforms = np.fft.fft2(kernel, grid, axes=[0, 1])
    left, values, right = np.linalg.svd(transforms, compute_uv=True, full_matrices=False)
    clipped_values = np.minimum(values, limit)
    if kernel.shape[2] > kernel.shape[3]:
        clipped = np.matmul(left, clipped_values[..., None] * right)
    else:
        clipped = np.matmul(left * clipped_values[..., None, :], right)
    clipped_kernel = np.fft.ifft2(clipped, axes=[0, 1]).real
    return clipped_kernel[np.ix_(*[range(d) for d in kernel.shape])]


def run(repeats: int, quick: bool) -> None:
    """Print the tables."""
    shapes = SHAPES[:1] if quick else SHAPES
    cases = [(3, 32, 16)] if quick else conv.CASES
    _dense_torch(shapes, repeats)
    _dense_numpy(NUMPY_SHAPES[:1] if quick else NUMPY_SHAPES, repeats)
    _inside(shapes, repeats)
    _warm([512] if quick else WARM_SIDES, repeats)
    _one_round(cases, repeats)
    _nearest(cases, repeats)
    _far(cases if quick else [*conv.CASES, *SMALL_CASES], repeats)
    _device(DEVICE_SHAPES[:1] if quick else DEVICE_SHAPES, repeats)


@cache
def _normal(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """(a normal matrix, its singular values, the limit, its clip), the latter in float64."""
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    left, values, right = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    limit = _limit(values)
    return w, values, limit, (left * values.clip(max=limit)) @ right


def _limit(values: Any) -> float:
    """Halfway between two neighbours, so that the share above is the same in any precision."""
    above = round(SHARE * len(values))
    return 0.5 * float(values[above - 1] + values[above])


def _label(shape: tuple[int, ...]) -> str:
    return "×".join(str(s) for s in shape)


def _error(x: Any, expected: np.ndarray) -> str:
    """‖x − expected‖/‖expected‖ for a table."""
    difference = np.asarray(x, np.float64) - expected
    return f"{np.linalg.norm(difference) / np.linalg.norm(expected):.1e}"


def _once(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of one run, what it returned)."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def _affordable(seconds: float, repeats: int) -> int:
    return min(repeats, _FEW) if seconds > _SLOW else repeats


def _dense_torch(shapes: list[tuple[int, int]], repeats: int) -> None:
    import torch

    title = f"dense clip, {SHARE:.0%} of σ above c, torch on the CPU, float32"
    results = Results(title, "torch SVD clip", "our error", "their error")
    _clips(results, torch, shapes, repeats)


def _dense_numpy(shapes: list[tuple[int, int]], repeats: int) -> None:
    title = f"dense clip, {SHARE:.0%} of σ above c, NumPy, float32"
    results = Results(title, "NumPy SVD clip", "our error", "their error")
    _clips(results, np, shapes, repeats)


def _clips(results: Results, xp: Any, shapes: list[tuple[int, int]], repeats: int) -> None:
    for shape in shapes:
        values, _, limit, expected = _normal(shape)
        w = xp.asarray(values)
        baseline = partial(svd_clip, xp, w, limit)
        ours = partial(project_spectral_ball, w, limit)
        seconds, theirs = _once(baseline)
        timed = pair(baseline, ours, _affordable(seconds, repeats))
        results.add(_label(shape), timed, _error(ours(), expected), _error(theirs, expected))
    results.show()


def _inside(shapes: list[tuple[int, int]], repeats: int) -> None:
    import torch

    title = "weight inside the ball, c = 1.05·σ₁, torch on the CPU, float32"
    results = Results(title, "torch SVD clip", "unchanged")
    for shape in shapes:
        values, spectrum, _, _ = _normal(shape)
        w, limit = torch.asarray(values), 1.05 * float(spectrum[0])
        baseline = partial(svd_clip, torch, w, limit)
        ours = partial(project_spectral_ball, w, limit)
        seconds, _ = _once(baseline)
        timed = pair(baseline, ours, _affordable(seconds, repeats))
        results.add(_label(shape), timed, "yes" if ours() is w else "no")
    results.show()


def _decaying(side: int) -> tuple[np.ndarray, float]:
    """(singular values i^-1/2 plus a little noise, the tenth of them)."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((side, side)))[0] for _ in range(2))
    w = (left * np.arange(1, side + 1) ** -0.5) @ right.T
    w += 1e-2 / math.sqrt(side) * rng.standard_normal((side, side))
    return w.astype(np.float32), float(np.linalg.svd(w, compute_uv=False)[9])


def _changed(w: np.ndarray, relative: float) -> np.ndarray:
    """`w` plus normal noise of that share of its norm."""
    noise = np.random.default_rng(1).standard_normal(w.shape, np.float32)
    return w + noise * np.float32(relative * np.linalg.norm(w) / np.linalg.norm(noise))


def _warm(sides: list[int], repeats: int) -> None:
    import torch

    title = "second call, warm, noise 1e-4, c = σ₁₀, σ = i^-1/2, torch on the CPU, float32"
    results = Results(title, "cold call", "σ₁/c", "‖warm − cold‖/‖cold‖")
    for side in sides:
        first, limit = _decaying(side)
        projected, info = project_spectral_ball(torch.asarray(first), limit, return_info=True)
        for case, before in (("weight", first), ("projection", projected.numpy())):
            second = _changed(before, 1e-4)
            top = float(specops.spectral_norm(second.astype(np.float64)))
            w = torch.asarray(second)
            cold = partial(project_spectral_ball, w, limit)
            warm = partial(project_spectral_ball, w, limit, state=info.state)
            timed = pair(cold, warm, repeats)
            error = _error(warm(), np.asarray(cold(), np.float64))
            results.add(
                f"{_label((side, side))}, {case} + noise", timed, f"{top / limit:.6f}", error
            )
    results.show()


def _one_round(cases: list[tuple[int, int, int]], repeats: int) -> None:
    title = "convolution clip, one round, c = 0.5·σ₁, NumPy, float32"
    results = Results(title, "appendix A", "their norm/c", "our norm/c")
    for k, channels, n in cases:
        w = conv.kernel_of(k, channels)
        theirs = np.ascontiguousarray(w.transpose(2, 3, 1, 0))
        geometry = Conv((n, n), boundary="circular")
        limit = 0.5 * float(specops.spectral_norm(w, geometry))
        baseline = partial(paper_clip, theirs, (n, n), limit)
        ours = partial(
            project_spectral_ball, w, limit, geometry, method="alternating", iterations=1
        )
        seconds, cropped = _once(baseline)
        timed = pair(baseline, ours, _affordable(seconds, repeats))
        back = np.ascontiguousarray(cropped.transpose(3, 2, 0, 1))
        norms = (float(specops.spectral_norm(x, geometry)) / limit for x in (back, ours()))
        results.add(conv.label(k, channels, n), timed, *(f"{norm:.4f}" for norm in norms))
    results.show()


def _nearest(cases: list[tuple[int, int, int]], repeats: int) -> None:
    table = Table(
        title="nearest kernel, warm, noise 1e-3, c = 0.95·σ₁, NumPy, float32",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("case")
    headers = ("one round", "nearest", "time / one round", "min … max")
    for header in (*headers, "gap", "rounds", "moved, one round", "moved, nearest"):
        table.add_column(header, justify="right")
    shares = []
    for k, channels, n in cases:
        w0 = conv.kernel_of(k, channels)
        geometry = Conv((n, n), boundary="circular")
        limit = 0.95 * float(specops.spectral_norm(w0, geometry))
        project = partial(
            project_spectral_ball, max_norm=limit, geometry=geometry, gap_tolerance=1e-4
        )
        state = project(w0, return_info=True)[1].state
        w1 = _changed(w0, 1e-3)
        one_round = partial(project, w1, method="alternating", iterations=1)
        nearest = partial(project, w1, state=state)
        seconds, rounded = _once(one_round)
        # The sides are swapped: the ratio is our time over that of one round.
        timed = pair(nearest, one_round, _affordable(seconds, repeats))
        found, info = nearest(return_info=True)
        moved = (np.linalg.norm(x - w1) / np.linalg.norm(w1) for x in (rounded, found))
        shares.append(timed.speedup)
        table.add_row(
            conv.label(k, channels, n),
            milliseconds(timed.ours),
            milliseconds(timed.baseline),
            f"{timed.speedup:.2f}",
            f"{timed.spread[0]:.2f} … {timed.spread[1]:.2f}",
            f"{float(info.gap):.1e}",
            str(info.iterations),
            *(f"{distance:.5f}" for distance in moved),
        )
    mean = math.exp(statistics.fmean(math.log(share) for share in shares))
    table.caption = f"geometric mean {mean:.2f}, greatest {max(shares):.2f}"
    table.caption_justify = "left"
    Console(width=150).print(table)


def _far(cases: list[tuple[int, int, int]], repeats: int) -> None:
    """Cold, and warm after the weight or what it became has changed by 1 %, in rounds."""
    table = Table(
        title="nearest kernel within a factor of 1.1, time over that of one round on the same "
        "weight, NumPy, float32",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("case")
    for header in ("c/σ₁", "one round", "cold", "certified", "warm, weight", "warm, projection"):
        table.add_column(header, justify="right")
    found: dict[float, list[tuple[float, ...]]] = {bound: [] for bound in BOUNDS}
    for k, channels, n in cases:
        w = conv.kernel_of(k, channels)
        geometry = Conv((n, n), boundary="circular")
        top = float(specops.spectral_norm(w, geometry))
        for bound in BOUNDS:
            project = partial(
                project_spectral_ball,
                max_norm=bound * top,
                geometry=geometry,
                return_info=True,
                measure_norms=False,
            )
            ratios, seconds = [], math.nan
            x, info = project(w, distance_tolerance=0.1)
            moved = float(np.sum((x - w) ** 2, dtype=float))
            nearest = moved - float(info.gap) * float(np.sum(w**2, dtype=float))
            weights = {"cold": (w, None), "warm": (_changed(w, 1e-2), info.state)}
            weights["projection"] = (_changed(x, 1e-2), info.state)
            for name, (weight, state) in weights.items():
                one_round = partial(project, weight, method="alternating", iterations=1)
                ours = partial(project, weight, distance_tolerance=0.1, state=state)
                slow, _ = _once(one_round)
                timed = pair(ours, one_round, _affordable(20 * slow, repeats))
                ratios.append(timed.speedup)
                seconds = timed.ours if name == "cold" else seconds
            found[bound].append(tuple(ratios))
            table.add_row(
                conv.label(k, channels, n),
                str(bound),
                milliseconds(seconds),
                f"{ratios[0]:.2f}",
                f"{math.sqrt(moved / nearest):.3f}" if nearest > 0 else "-",
                *(f"{ratio:.2f}" for ratio in ratios[1:]),
            )
    rows = [(str(bound), found[bound]) for bound in BOUNDS]
    for label, own in (*rows, ("all", [r for bound in BOUNDS for r in found[bound]])):
        columns = list(zip(*own, strict=True))
        means = [f"{math.exp(statistics.fmean(map(math.log, c))):.2f}" for c in columns]
        cells = [f"{mean}, {max(c):.2f}" for mean, c in zip(means, columns, strict=True)]
        table.add_row("geometric mean, greatest", label, "", cells[0], "", *cells[1:])
    Console(width=150).print(table)


def _device(shapes: list[tuple[int, ...]], repeats: int) -> None:
    import torch

    if not torch.cuda.is_available():
        print("dense clip on a GPU: no CUDA device is there")
        return
    title = f"dense clip, {SHARE:.0%} of σ above c, {torch.cuda.get_device_name()}, float32"
    results = Results(title, "torch SVD clip", "our error", "their error")
    for shape in shapes:
        _on_device(results, "cuda", shape, repeats)
    results.show()


def _on_device(results: Results, device: str, shape: tuple[int, ...], repeats: int) -> None:
    """One row; the errors are those of the first matrix of a stack."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(shape, generator=generator, device=device)
    first = (0,) * (w.ndim - 2)
    left, values, right = torch.linalg.svd(w[first].double(), full_matrices=False)
    limit = _limit(values)
    expected = ((left * values.clamp(max=limit)) @ right).cpu().numpy()
    geometry = Dense(out_axes=(1,), batch_axes=(0,)) if w.ndim == 3 else None
    baseline = partial(_synchronized, svd_clip, torch, w, limit)
    ours = partial(_synchronized, project_spectral_ball, w, limit, geometry)
    seconds, theirs = _once(baseline)
    timed = pair(baseline, ours, _affordable(seconds, repeats))
    errors = (_error(x[first].cpu(), expected) for x in (ours(), theirs))
    results.add(_label(shape), timed, *errors)


def _synchronized(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.cuda.synchronize()
    result = function(*arguments)
    torch.cuda.synchronize()
    return result
