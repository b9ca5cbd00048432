"""Spectra and projections of CuPy arrays, and the way to torch and back without a copy.

A batch of matrices and a convolution's kernel are measured and projected to a bound on the
device, then shared with torch. Without a CUDA device it says so in one line; ``--numpy`` does
the same on the host, ``--quick`` with smaller arrays.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import specops
import specops_cupy
from specops import Conv, Dense
from specops.errors import AdapterError

Array = Any


def timed(xp: Any, function: Callable[[], Any]) -> tuple[Any, float]:
    """(what it returns, seconds until the device has finished, without compiling kernels)."""
    on_device = hasattr(xp, "cuda")
    if on_device:
        function()
        xp.cuda.get_current_stream().synchronize()
    began = time.perf_counter()
    result = function()
    if on_device:
        xp.cuda.get_current_stream().synchronize()
    return result, time.perf_counter() - began


def report(what: str, before: Array, after: Array, seconds: float, note: str = "") -> None:
    """One line: norms before and after, the largest where there are several."""
    norms = f"{float(before.max()):8.3f} → {float(after.max()):.4f}"
    print(f"{what:<38}{norms}{1e3 * seconds:10.1f} ms  {note}".rstrip())


def matrices(xp: Any, options: argparse.Namespace) -> Array:
    """A batch, projected together; its spectra."""
    count, size = (4, 48) if options.quick else (16, 384)
    rng = np.random.default_rng(options.seed)
    w = xp.asarray(rng.standard_normal((count, size, size)).astype(np.float32))
    batch = Dense(out_axes=(1,), batch_axes=(0,))
    bound = options.share * float(specops.spectral_norm(w, batch).max())
    (clipped, info), seconds = timed(
        xp, lambda: specops.project_spectral_ball(w, bound, batch, return_info=True)
    )
    gap = f"gap ≤ {float(info.gap.max()):.1e}"
    report(f"{count} matrices {size}×{size}", info.norm_before, info.norm_after, seconds, gap)
    ranks = [specops.stable_rank(x, batch) for x in (w, clipped)]
    print(f"{'':<4}stable rank, least{float(ranks[0].min()):24.1f} → {float(ranks[1].min()):.1f}")
    return clipped


def convolution(xp: Any, options: argparse.Namespace) -> None:
    """A kernel as the operator that it is on a periodic grid, not as a reshaped matrix."""
    channels, grid = (8, 8) if options.quick else (32, 16)
    rng = np.random.default_rng(options.seed + 1)
    kernel = xp.asarray(rng.standard_normal((channels, channels, 3, 3)).astype(np.float32))
    layer = Conv((grid, grid), boundary="circular")
    values, seconds = timed(xp, lambda: specops.singular_values(kernel, layer))
    print(
        f"{'all ' + format(values.size, ',') + ' singular values of a kernel':<38}"
        f"{float(values[-1]):8.3f} … {float(values[0]):.3f}{1e3 * seconds:9.1f} ms"
    )
    bound = options.share * float(values[0])
    (_, info), seconds = timed(
        xp,
        lambda: specops.project_spectral_ball(
            kernel, bound, layer, distance_tolerance=0.1, return_info=True
        ),
    )
    name = f"conv {channels}→{channels}, 3×3, on {grid}×{grid}"
    report(name, info.norm_before, info.norm_after, seconds, f"gap ≤ {float(info.gap):.1e}")


def training(xp: Any, options: argparse.Namespace) -> None:
    """A loop that keeps a dict of arrays inside a bound."""
    rng = np.random.default_rng(options.seed + 2)
    w = xp.asarray(rng.standard_normal((32, 64)))
    model = {"layer": {"w": w, "b": xp.zeros(32)}}
    rule = specops.ClipSpectralNorm(options.share * float(specops.spectral_norm(w)))
    attachment = specops_cupy.attach(None, model, rule, geometries={"layer.w": Dense()})
    for _ in range(5):
        w -= 0.1 * xp.asarray(rng.standard_normal((32, 64)))
        attachment.step()
    print(attachment.report())
    attachment.detach()


def handover(clipped: Array) -> None:
    """To torch and back: one memory, so writing to the tensor changes the array."""
    tensor = specops_cupy.to_torch(clipped)
    back = specops_cupy.from_torch(tensor)
    shared = back.data.ptr == clipped.data.ptr
    print(f"{tuple(tensor.shape)} on {tensor.device} and back, {'' if shared else 'not '}shared")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--numpy", action="store_true", help="on the host, without CuPy")
    parser.add_argument("--quick", action="store_true", help="small arrays")
    parser.add_argument(
        "--share", type=float, default=0.5, help="what to leave of each norm, in (0, 1]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrays")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error(f"--share must be in (0, 1], got {options.share:g}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, project, train, hand over."""
    options = parse(arguments)
    if options.numpy:
        xp: Any = np
    else:
        found = next(s for s in specops.plugins.statuses() if s.name == "cupy")
        if not found.available:
            print(f"{found.detail}. The same on NumPy: --numpy")
            return
        import cupy as xp

        print(found.detail)
    clipped = matrices(xp, options)
    convolution(xp, options)
    training(xp, options)
    if options.numpy:
        return
    try:
        handover(clipped)
    except AdapterError as error:
        print(f"no hand-over: {error}")


if __name__ == "__main__":
    main()
