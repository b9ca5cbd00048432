"""Every variable of a Keras model: its name, its map, and the sizes its layer sees."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import keras

from specops import Conv
from specops.authors import Parameter, Weight
from specops_keras.geometry import SIZED, TRANSPOSES, Role, grid_of, roles, wrappers

_UNKNOWN = "no geometry is known for it: pass it in geometries="
_FROZEN = "frozen (trainable=False)"


@dataclass
class Variable(Parameter):
    """A variable, and the layer through which it acts."""

    weight: Weight
    variable: Any
    layer: Any = None
    recorder: SizeRecorder | None = None
    role: Role = field(default_factory=Role)

    @property
    def learns_size(self) -> bool:  # type: ignore[override]
        """Whether the layer is a convolution whose geometry was not declared."""
        return self.recorder is not None and not self.declared

    def geometry(self) -> Any:
        """The map now, at the largest size seen."""
        if self.recorder is None or self.declared:
            return self.weight.geometry
        return self.recorder.geometry(self.layer, self.variable)

    def read(self) -> Any:
        """The value as the geometry's array, without gradient."""
        value = keras.ops.stop_gradient(self.variable.value)
        shape = self._view()
        return value if shape is None else keras.ops.reshape(value, shape)

    def write(self, value: Any) -> None:
        """Store an array of the geometry's shape."""
        shape = self.variable.shape
        self.variable.assign(value if self._view() is None else keras.ops.reshape(value, shape))

    def identity(self) -> int:
        """One variable is one memory."""
        return id(self.variable)

    def frozen(self) -> str:
        """A layer may be frozen after attaching."""
        return "" if self.variable.trainable else _FROZEN

    def watch(self) -> None:
        """Learn what sizes the layer's `call` is given."""
        if self.recorder is not None:
            self.recorder.watch(self.layer)

    def unwatch(self) -> None:
        """Give the layer its own `call` back."""
        if self.recorder is not None:
            self.recorder.unwatch(self.layer)

    def sizes(self) -> Any:
        """The largest grid seen."""
        return None if self.recorder is None else self.recorder.grid

    def see(self, sizes: Any) -> None:
        """Take note of a grid."""
        if self.recorder is not None:
            self.recorder.see(sizes)

    def saved(self, value: Any) -> Any:
        """Arrays of no backend."""
        return keras.ops.convert_to_numpy(value)

    def restored(self, value: Any) -> Any:
        """Arrays of this one."""
        return keras.ops.convert_to_tensor(value, dtype=str(value.dtype))

    def _view(self) -> tuple[int, ...] | None:
        return None if self.declared else self.role.shape


class SizeRecorder:
    """The largest input that a convolution was built for or has seen; None: every size.

    Zero padding makes the operator of a smaller input a submatrix, so the largest covers all, but
    where "same" padding at a stride begins elsewhere.
    Sizes other than those of the model's graph are seen by a wrapper around the layer's
    `call`, which compiled functions run when they are traced: once for every size.
    """

    def __init__(self, layer: Any) -> None:
        shapes = [node.input_tensors[0].shape for node in getattr(layer, "_inbound_nodes", ())]
        shapes = shapes or [(layer.get_build_config() or {}).get("input_shape")]
        first, *others = (grid_of(layer, shape) for shape in shapes)
        begins = layer.padding == "same" and not isinstance(layer, TRANSPOSES)
        seen = Conv(first, stride=tuple(layer.strides), padding="same" if begins else "valid")
        self._seen = functools.reduce(Conv.covering, others, seen)
        self._known: tuple[Any, Any] | None = None

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The size that covers those that were met."""
        return self._seen.grid

    def watch(self, layer: Any) -> None:
        """Look at what the layer's `call` is given."""
        wrapper = vars(layer).get("call")
        if not isinstance(wrapper, _Watched):
            wrapper = layer.call = _Watched(layer, "call" in vars(layer))
        wrapper.recorders.append(self)

    def unwatch(self, layer: Any) -> None:
        """Give the layer its own `call` back, unless another attachment watches it."""
        wrapper = vars(layer).get("call")
        if not isinstance(wrapper, _Watched) or self not in wrapper.recorders:
            return
        wrapper.recorders.remove(self)
        if not wrapper.recorders and wrapper.was_wrapped:
            layer.call = wrapper.call
        elif not wrapper.recorders:
            del layer.call

    def see(self, grid: Any) -> None:
        """Take note of a size."""
        if grid and self.grid:
            self._seen = self._seen.covering(grid)

    def geometry(self, layer: Any, variable: Any) -> Any:
        """The map of one of the layer's variables at this size."""
        if self._known is None or self._known[0] != self.grid:
            found = {id(v): role.geometry for v, role in roles(layer, self.grid)}
            self._known = (self.grid, found)
        return self._known[1][id(variable)]


class _Watched:
    """A layer's `call` that tells recorders of the sizes it is given."""

    def __init__(self, layer: Any, was_wrapped: bool) -> None:
        self.call, self.was_wrapped = layer.call, was_wrapped
        self.recorders: list[SizeRecorder] = []
        self._grid_of = functools.partial(grid_of, layer)
        functools.update_wrapper(self, layer.call)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for recorder in self.recorders:
            recorder.see(self._grid_of(inputs.shape))
        return self.call(inputs, *args, **kwargs)


def locate(model: Any) -> list[Variable]:
    """Describe every weight of the model, each name once."""
    found: dict[int, tuple[Any, SizeRecorder | None, Role]] = {}
    wrapped = wrappers(model._flatten_layers())
    for layer in model._flatten_layers():
        recorder = SizeRecorder(layer) if isinstance(layer, SIZED) and layer.built else None
        wrapper = wrapped.get(id(layer), "")
        for variable, role in roles(layer, recorder.grid if recorder else None, wrapper):
            earlier = found.get(id(variable))
            if earlier is not None and earlier[2].geometry != role.geometry:
                role = Role(
                    obstacle=f"{earlier[0].name} and {layer.name} share it as different maps: "
                    f"give one in geometries="
                )
            found[id(variable)] = (layer, recorder, role)
    result, names = [], set()
    for variable in model.weights:
        name = variable.path.removeprefix(f"{model.name}/")
        while name in names:  # layers of the same name in a subclassed model
            name += "+"
        names.add(name)
        layer, recorder, role = found.get(id(variable), (None, None, Role(obstacle=_UNKNOWN)))
        result.append(Variable(_describe(name, variable, role), variable, layer, recorder, role))
    return result


def averaging(model: Any) -> list[str]:
    """Batch normalisations that batches have left their averages in, and that still train."""
    kind = keras.layers.BatchNormalization
    found = (x for x in model._flatten_layers() if isinstance(x, kind) and x.built and x.trainable)
    return [x.name for x in found if keras.ops.convert_to_numpy(x.moving_mean.value).any()]


def _describe(name: str, variable: Any, role: Role) -> Weight:
    return Weight.of(
        name,
        tuple(variable.shape),
        str(variable.dtype),
        role.geometry,
        skipped=role.skipped if variable.trainable else _FROZEN,
        obstacle=role.obstacle,
        opt_in=role.opt_in,
    )
