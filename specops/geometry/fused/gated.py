"""Gated layers: the gate and the values that it gates, two maps of one input in one matrix."""

from __future__ import annotations

from typing import Final

from specops.geometry.fused.known import Fused, Surroundings

_BEHIND: Final = {
    "gate_up_proj": "down_proj",
    "w12": "w3",
    "weights_in": "weights_out",
    "Wi": "Wo",
    "input_linear": "output_linear",
    "in_proj": "out_proj",
    "fc1": "fc2",
    "linear_fc1": "linear_fc2",
    "linear1": "linear2",
    "dense_h_to_4h": "dense_4h_to_h",
    "proj": "../2",
}
"""Names of fused layers, and of the layer after each, with half as many inputs as the fused one has
outputs. The last is that of diffusers."""


def gated(layer: str, rows: int, columns: int, out: int, around: Surroundings) -> Fused | None:
    """The two halves, if the layer behind has as many inputs as one of them has outputs.

    Flux fuses an attention with a parallel layer; the layer behind takes the outputs of both.
    """
    if layer not in _BEHIND:
        return None
    behind = around.inputs([_BEHIND[layer]], out)
    if 2 * behind == rows:
        return Fused.of(out, (rows // 2,) * 2, "a gate and what it gates in one")
    if layer == "linear1" and rows - behind == 2 * columns < rows - columns:
        splits = (columns, columns, columns, rows - 3 * columns)
        return Fused.of(out, splits, "query, key and value, and a layer beside the attention")
    if layer != "gate_up_proj":
        return None
    halves = (rows // 2,) * 2 if rows % 2 == 0 and not behind else ()
    if behind:
        reason = f"{_BEHIND[layer]} has other inputs"
    else:
        reason = f"there is no {_BEHIND[layer]} behind"
    return Fused.whole(out, f"a gate and what it gates are taken for one matrix: {reason}", halves)
