"""A checkpoint's own configuration, of Keras or Hugging Face, and what it says about layers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from specops.checkpoints import Checkpoint

_LIMIT: Final = 1 << 24  # bytes of a file of settings
_GATES: Final = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3, "SimpleRNN": 1}
_KERNELS: Final = ("0", "kernel")
_DEPTHWISE_PARTS: Final = ("0", "depthwise_kernel")


@dataclass(frozen=True)
class Layer:
    """What is known about the layer to which a tensor belongs.

    Attributes
    ----------
    kind : str
        The layer's class.
    stride, dilation, padding
        Those of a convolution, as `specops.Conv` takes them, or "causal"; None if not stated.
    groups, width : int
        How many groups there are, or how many channels each has; 0 if not stated.
    depthwise, transposed : bool
    gates : int
        Number of blocks of a recurrent layer, 0 for other layers.
    equation : str
        The equation of an einsum.
    """

    kind: str
    stride: int | tuple[int, ...] | None = None
    dilation: int | tuple[int, ...] = 1
    padding: Any = None
    groups: int = 0
    width: int = 0
    depthwise: bool = False
    transposed: bool = False
    gates: int = 0
    equation: str = ""


@dataclass(frozen=True)
class Configuration:
    """The settings of a model.

    Attributes
    ----------
    source : str
        Where the settings were found.
    values : dict
        For Hugging Face: the contents of config.json.
    layers : dict of str to dict
        For Keras: the configuration of each layer, by its name.
    adapter : dict
        For peft: the contents of adapter_config.json.
    labels : dict of str to tuple of str
        For Keras: the names of the layers that a tensor is in, its own first.
    """

    source: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Configuration:
        """The configuration of a checkpoint: in it, or in a file of a known name beside it."""
        if checkpoint.configuration:
            layers = {str(c.get("name")): found for found in _keras_layers(checkpoint.configuration)
                      for c in [found.get("config", {})]}  # fmt: skip
            return cls("the file's Keras configuration", layers=layers, labels=checkpoint.labels)
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        values = _settings(folder / "config.json")
        return cls(
            "config.json",
            values=values if "model_type" in values else {},
            adapter=_settings(folder / "adapter_config.json"),
        )

    def value(self, key: str) -> Any:
        """A setting of Hugging Face; for a model with parts, that of the one part that has it."""
        if key in self.values:
            return self.values[key]
        found = [
            inner[key] for inner in self.values.values() if isinstance(inner, dict) and key in inner
        ]
        return found[0] if len(found) == 1 else None

    def layer(self, name: str) -> Layer | None:
        """What is known about the layer to which a tensor belongs; None if nothing."""
        if self.values:
            return _of_hugging_face(name, self)
        parts = name.split("/")
        for label in (*self.labels.get(name, ()), *reversed(parts[:-1])):
            if label in self.layers:
                return _of_keras(parts[-1].partition(":")[0], self.layers[label])
        return None


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LIMIT:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _keras_layers(config: Any) -> Iterator[Mapping[str, Any]]:
    """The configurations of all layers, also of those inside other layers."""
    pending = [config]
    while pending:
        thing = pending.pop()
        if isinstance(thing, dict):
            if isinstance(thing.get("config"), dict) and "class_name" in thing:
                yield thing
            pending += thing.values()
        elif isinstance(thing, list):
            pending += thing


def _of_keras(last: str, layer: Mapping[str, Any]) -> Layer | None:
    kind, config = str(layer.get("class_name")), layer["config"]
    if kind in _GATES:
        recurrent = last in ("0", "1", "kernel", "recurrent_kernel")
        return Layer(kind, gates=_GATES[kind] if recurrent else 0)
    if kind == "EinsumDense":
        return Layer(kind, equation=str(config.get("equation", "")) if last in _KERNELS else "")
    if "Conv" not in kind:
        return Layer(kind)
    if kind.startswith("ConvLSTM") and last in ("1", "recurrent_kernel"):
        return Layer(kind, stride=1, groups=1, padding="same")
    separable, depthwise = "Separable" in kind, kind.startswith("Depthwise")
    pointwise = separable and last not in _DEPTHWISE_PARTS
    if pointwise:
        return Layer(kind, stride=1, groups=1)
    padding = config.get("padding")
    return Layer(
        kind,
        stride=_numbers(config.get("strides"), 1),
        dilation=_numbers(config.get("dilation_rate"), 1),
        padding=padding if padding in ("same", "valid", "causal") else None,
        groups=config["groups"] if isinstance(config.get("groups"), int) else 0,
        depthwise=depthwise or separable,
        transposed="Transpose" in kind,
    )


def _numbers(given: Any, otherwise: int) -> int | tuple[int, ...]:
    if isinstance(given, int):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(n, int) for n in given):
        return tuple(given)
    return otherwise


def _of_hugging_face(name: str, configuration: Configuration) -> Layer | None:
    """What is known about the convolutions of some models."""
    value = configuration.value
    extractor = re.search(r"feature_extractor\.conv_layers\.(\d+)\.", name)
    strides = value("conv_stride")
    if extractor and isinstance(strides, list) and int(extractor[1]) < len(strides):
        return Layer("Conv1d", stride=strides[int(extractor[1])], groups=1, padding="valid")
    groups = value("num_conv_pos_embedding_groups")
    if "pos_conv_embed" in name and isinstance(groups, int):
        return Layer("Conv1d", stride=1, groups=groups)
    width = value("groups_width")
    if isinstance(width, int) and re.search(r"\.layers\.\d+\.layer\.1\.convolution\.", name):
        return Layer("Conv2d", width=width)
    if re.search(r"patch_embed\w*(\.\d+)?\.(projection|proj)|patch_embedding\.", name):
        return _patches(name, configuration)
    return None


def _patches(name: str, configuration: Configuration) -> Layer | None:
    """Patches of images: their stride is their size, unless the configuration has another."""
    value = configuration.value
    stages, numbers = value("strides"), [int(n) for n in re.findall(r"\.(\d+)\.", name)]
    if isinstance(stages, list) and len(numbers) == 1 and numbers[0] < len(stages):
        step = _numbers(stages[numbers[0]], 0)
        return Layer("patches", stride=step, groups=1) if step else None
    steps = (value("frequency_stride"), value("time_stride"))
    own = _numbers(value("patch_stride"), 0) or (_numbers(list(steps), 0) if all(steps) else 0)
    if own:
        return Layer("patches", stride=own, groups=1, padding=_numbers(value("patch_padding"), 0))
    if any("stride" in key and key != "encoder_stride" for key in configuration.values):
        return None
    size = _numbers(value("patch_size"), 0)
    frames = _numbers(value("tubelet_size") or value("temporal_patch_size"), 0)
    if isinstance(size, int) and isinstance(frames, int) and size and frames:
        size = (frames, size, size)
    # Some configurations give all three lengths, and no patch size.
    size = size or (frames if isinstance(frames, tuple) else 0)
    return Layer("patches", stride=size, groups=1, padding="valid") if size else None
