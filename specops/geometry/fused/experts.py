"""Stacked experts: which axis holds the outputs, and the two maps of `gate_up_proj`."""

from __future__ import annotations

from typing import Final

from specops.geometry.dense import Dense
from specops.geometry.fused.known import Fused, Shape, Surroundings

PAIRS: Final = {"gate_up_proj": "down_proj", "input_linear": "output_linear"}
"""Names of stacks with gates and the values that they gate, and of the stack after each."""


def fused_experts(
    parameter: str,
    shape: Shape,
    around: Surroundings,
    *,
    turned: bool | None = None,
    alternating: bool | None = None,
) -> Fused | None:
    """The maps of stacked experts; None if it is not known which axis holds the outputs.

    Parameters
    ----------
    parameter : str
        Its name, or that of its layer: "gate_up_proj" holds two maps of every expert.
    shape : tuple of int
        (experts, outputs, inputs), or the other way round.
    around : Surroundings
        Its `beside` gives the shapes of other stacks of the same experts.
    turned : bool, optional
        Whether outputs come last. With None this is inferred from the stack that follows or
        precedes this one, else from the width of the model.
    alternating : bool, optional
        Whether rows of the gate alternate with rows of what it gates. With None only models of
        GPT-OSS are taken to do so.
    """
    turned = _is_turned(parameter, shape, around) if turned is None else turned
    if turned is None:
        return None
    out = 2 if turned else 1
    if parameter not in PAIRS:
        return Fused(Dense(out_axes=(out,), batch_axes=(0,)), "a matrix for each expert")
    if shape[out] % 2:
        doubt = f"a gate and what it gates, of {shape[out]} outputs together, are no halves"
        return Fused(Dense(out_axes=(out,), batch_axes=(0,)), doubt, doubt)
    if alternating is None:
        alternating = around.setting("model_type") == "gpt_oss"
    half = shape[out] // 2
    splits, repeats = ((1, 1), half) if alternating else ((half, half), 1)
    how = "row by row" if alternating else "in halves"
    return Fused(
        Dense(out_axes=(out,), batch_axes=(0,), splits=splits, repeats=repeats),
        f"of each expert a gate and what it gates, {how}",
    )


def _is_turned(parameter: str, shape: Shape, around: Surroundings) -> bool | None:
    """Whether stacks are (experts, inputs, outputs); None if nothing tells."""
    up = next((name for name, back in PAIRS.items() if parameter in (name, back)), "")
    down = bool(up) and parameter != up
    other = around.beside(up if down else PAIRS[up]) if up else ()
    if len(other) == 3:
        first, back = (other, shape) if down else (shape, other)
        if first[1:] == (2 * back[2], back[1]):
            return False
        if first[1:] == (back[2], 2 * back[1]):
            return True
    width = around.count("hidden_size", "hidden_dim")
    at = [axis for axis in (1, 2) if shape[axis] == width]
    return at == ([2] if down else [1]) if len(at) == 1 else None
