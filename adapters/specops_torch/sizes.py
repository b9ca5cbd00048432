"""Learning the grid that a convolution works on, by watching it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from specops.geometry import Conv
from specops.geometry.arguments import every_axis
from specops.training.cautions import caution
from specops_torch.geometry import role_of

_OPTIONS = ("stride", "dilation", "padding")


class SizeRecorder:
    """A forward hook that remembers the largest input a convolution has seen.

    For a zero boundary the largest size covers the smaller ones, whose operators are
    submatrices of its own. A circular layer that sees several sizes is given none, which
    stands for all. Holds no reference to anything but numbers, so that a model that carries it
    can still be pickled and copied.
    """

    def __init__(self, circular: bool) -> None:
        self.circular = circular
        self.input_shape: tuple[int, ...] | None = None
        self.output_padding: tuple[int, ...] | None = None
        self.varies = False
        self._known: tuple[Any, Any] | None = None

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """The hook itself."""
        given = args[0] if args else kwargs["input"]
        ndim = len(module.kernel_size)
        seen = given.shape[-ndim:]
        if seen == self.input_shape and not module.transposed:
            return
        seen = tuple(int(n) for n in seen)
        if module.transposed:
            self._record_output_padding(module, seen, tuple(output.shape[-ndim:]))
        self._record(seen)

    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        """Learn the first input's size already before the forward pass."""
        if self.input_shape is None:
            given = args[0] if args else kwargs["input"]
            self.input_shape = tuple(int(n) for n in given.shape[-len(module.kernel_size) :])

    def geometry(self, module: Any) -> Any:
        """The module's geometry at the size seen, or for every size."""
        sizes = self.sizes()
        # A user may change these attributes between calls, such as strides for dilations.
        key = (sizes, module.stride, module.padding, module.dilation)
        if self._known is None or self._known[0] != key:
            self._known = (key, role_of(module, "weight", *sizes).geometry)
        return self._known[1]

    def sizes(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """(input size, output padding), as `role_of` takes them; None for every size."""
        return None if self.circular and self.varies else self.input_shape, self.output_padding

    def state(self) -> dict[str, Any]:
        """What the recorder knows, for a checkpoint."""
        return {
            "input_shape": self.input_shape,
            "output_padding": self.output_padding,
            "varies": self.varies,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        for key in ("input_shape", "output_padding"):
            value = state[key]
            setattr(self, key, None if value is None else tuple(value))
        self.varies = state["varies"]

    def merge(self, state: dict[str, Any]) -> None:
        """Add what the same layer has seen on another rank: the `state` of its recorder."""
        if state["input_shape"] is not None:
            self._record(tuple(state["input_shape"]))
        if state["output_padding"] is not None:
            self._record_extra(tuple(state["output_padding"]))
        self.varies = self.varies or state["varies"]

    def _record(self, seen: tuple[int, ...]) -> None:
        if self.input_shape is not None and seen != self.input_shape:
            self.varies = True
            seen = _largest(seen, self.input_shape)
        self.input_shape = seen

    def _record_extra(self, extra: tuple[int, ...]) -> None:
        if self.output_padding is not None:
            extra = _largest(extra, self.output_padding)
        self.output_padding = extra

    def _record_output_padding(
        self, module: Any, seen: tuple[int, ...], produced: tuple[int, ...]
    ) -> None:
        ndim = len(module.kernel_size)
        options = (every_axis(getattr(module, key), ndim, key) for key in _OPTIONS)
        axes = zip(seen, produced, module.kernel_size, *options, strict=True)
        extra = tuple(int(o - ((n - 1) * s + d * (k - 1) + 1 - 2 * p)) for n, o, k, s, d, p in axes)
        self._record_extra(extra)


def _largest(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(max, a, b))


@contextmanager
def unrecorded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context for forward passes whose sizes no recorder keeps."""
    hooks = [h for m in modules for h in m._forward_hooks.values() if isinstance(h, SizeRecorder)]
    known = [dict(vars(recorder)) for recorder in hooks]
    try:
        yield
    finally:
        for recorder, state in zip(hooks, known, strict=True):
            vars(recorder).update(state)


class DeclaredSize:
    """A forward hook that warns once if a convolution's inputs are not of its declared size.

    It accepts smaller inputs with a zero boundary: their maps are parts of the declared one, and
    bounded with it.
    """

    def __init__(self, name: str, geometry: Conv) -> None:
        self.name, self.geometry, self.told = name, geometry, False
        self.described = geometry.describe()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The hook itself."""
        grid = self.geometry.grid
        if self.told or grid is None:
            return
        given = args[0] if args else kwargs["input"]
        seen = tuple(int(n) for n in given.shape[-len(grid) :])
        # Compilers of torch 2.4 trace no map of two sequences.
        covered = all(seen[axis] <= n for axis, n in enumerate(grid))
        if seen == grid or (covered and self.geometry.boundary != "circular"):
            return
        self.told = True
        # Compilers may not know sizes.
        met = "another size" if torch.compiler.is_compiling() else "×".join(map(str, seen))
        _caution(self.name, self.described, met)


@torch.compiler.assume_constant_result  # It is called during tracing and does not break the graph.
def _caution(name: str, described: str, met: str) -> None:
    caution(
        f"{name} was declared as {described} and meets inputs of {met}, for which neither its rule "
        f"nor reports hold: declare the size that it meets, or none, for every size"
    )


class FirstSize:
    """A forward pre-hook that learns a convolution's first input size before its weight is read."""

    def __init__(self, in_use: Any) -> None:
        self.in_use = in_use

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The hook itself."""
        in_use = self.in_use
        if in_use.state is None and in_use.recorder is not None:
            in_use.recorder.before(module, args, kwargs)
            in_use.geometry = in_use.recorder.geometry(module)
