"""Tensors that stand for no linear map, or whose map is not that of the numbers stored."""

from __future__ import annotations

import re

from specops.inspection.assumptions.context import (
    LEAF,
    Context,
    is_attention,
    parts_of,
)
from specops.inspection.assumptions.reading import Assumption
from specops.inspection.assumptions.scales import SCALES

_INDICES = ("int64", "bool")
_OPTIMIZERS = {
    *("optimizer", "optimizer_weights", "opt_state"),
    *("optimizer_state", "optimizer_states"),
}
_MOMENTS = {"nu", "nu_max", "trace", "e_g", "e_x"}
"""Fields of optax states that hold an array for each parameter."""
_AS_IN_MODELS = {"mu", "m", "m1", "m2", "v", "n", "g"}
"""More such fields, whose names layers of models may have, too."""
_OF_STATES = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
    *("acc_delta", "grad_avg", "grad_sum", "acc_grads", "sum_of_squares", "prev_updates"),
    *("step_sizes", "diff_params_memory", "diff_updates_memory", "previous_gradient", "params0"),
    *("base_optimizer_state", "init_params", "init_particles", "cumulative_gradients", "grad_acc"),
    *("subgradients", "inner_states"),
}
"""Fields of torch's and optax's states with names that no layer has."""
_FLAT = ("flat_param", "_flat_param")
_WEIGHTS = {"weight", "kernel", "qweight", "qzeros", "weight_packed", "0"}
_PACKED = {"W_q", "_data", "codes", "Qidxs"}
_PACKED_ENDS = ("_blocks", "qdata")
"""Names and endings of packed weights: of HQQ, quanto, AQLM and QuIP; of GPT-OSS and torchao."""
_STATE_SPACE = {"a_log", "a_logs", "dt_bias"}
_LEARNT_INPUTS = ("token", "position_embedding", "pos_embed", "_embed", "query_tokens", "latents")
_BUFFERS = {
    *("inv_freq", "freqs_cis", "cos_cached", "sin_cached", "relative_coords_table"),
    *("time_decay", "time_first", "time_faaaa"),
}
_ADAPTER = re.compile(
    r"(adamss|beft|boft|bone|c3a|deft|delora|fourierft|frod|glora|gralora|hira|hra|ia3|lily|ln_tuning"
    r"|miss|oft|osf|peanut|poly|psoft|p?vera|randlora|road|shadow|shira|supertuning|tinylora"
    r"|trainable_tokens|unilora|vblora|waveft|lora|hada|lokr)_"
)
_LOW_RANK = ("lora", "hada", "lokr")
"""Beginnings of the names of parameters of peft's low-rank adapters."""
_TABLES_OF_BIASES = ("bias_table", "position_bias", "rel_pos_h", "rel_pos_w")


def no_map(name: str, shape: tuple[int, ...], dtype: str, context: Context) -> Assumption | None:
    """Why a tensor is not measured; None if it may be a map."""
    parts = parts_of(name)
    last = parts[-1].lower()
    if 0 in shape:
        return Assumption(skipped="empty")
    if set(parts) & (_OPTIMIZERS | _OF_STATES) or _is_moment(parts, shape, context):
        return Assumption(skipped="of the optimizer's state")
    adapter = _adapter(shape, parts, context)
    if adapter is not None:
        return adapter
    if last in _FLAT:
        reason = "several parameters in a row, as FSDP flattens them: save a full state dict"
        return Assumption(skipped=reason, harmless=False)
    if len(shape) < 2:
        return Assumption(skipped="a scalar" if not shape else "1-d: a bias or scale, no matrix")
    if dtype in _INDICES:
        return Assumption(skipped=f"{dtype}: indices or flags, no weights")
    quantised = _quantised(name, parts[-1], dtype, context)
    if quantised is not None:
        return quantised
    if len(shape) > 5:
        return Assumption(skipped=f"{len(shape)}-d: no layer that is known", harmless=False)
    if _is_bias(name, shape, parts, context):
        return Assumption(skipped="a bias or mask, no matrix")
    if last in _STATE_SPACE:
        return Assumption(skipped="logarithms or steps of a state space, no matrix")
    if last in ("scale", "gamma", "beta", "running_mean", "running_var", "mean", "var"):
        return Assumption(skipped="scales or statistics of layers, no matrix")
    if last == "vector_u" or _is_of_spectral_normalization(name, shape, parts, context):
        return Assumption(skipped="what Keras' SpectralNormalization has beside the layer's weight")
    if last in ("weight_g", "original0", "lora_magnitude_vector", "dora_scale"):
        return Assumption(skipped="the lengths of a normalised weight, no matrix")
    if "parametrizations" in parts and any(p.isdecimal() for p in parts[-2:]):
        return Assumption(skipped="a part of a parametrisation, no weight")
    if last in _WEIGHTS:
        return None
    if last in _BUFFERS or "mask" in last:
        return Assumption(skipped="a mask or table of constants, no map")
    named = any(word in last for word in _LEARNT_INPUTS)
    if shape[0] == 1 and (named or (len(shape) == 3 and context.layout == "torch")):
        return Assumption(skipped="a learnt input, no map")
    if len(shape) > 2 and sum(n > 1 for n in shape) < 2:
        return Assumption(skipped="a scale along one axis, no matrix")
    return None


def _adapter(shape: tuple[int, ...], parts: list[str], context: Context) -> Assumption | None:
    """A part of an adapter that is not used in an update; None for other tensors."""
    known = context.configuration.adapter or context.wraps_layers
    kind = next((m[1] for part in parts[-3:] if (m := _ADAPTER.match(part))), "") if known else ""
    if not kind or (kind in _LOW_RANK and len(shape) < 2):
        return None
    reason = f"a part of an adapter ({kind}), no map by itself: merge it into the model"
    return Assumption(
        skipped=f"{reason} (peft: model.merge_and_unload()) and save that", harmless=False
    )


def _is_moment(parts: list[str], shape: tuple[int, ...], context: Context) -> bool:
    """Whether a tensor is a moment in an optax state: a parameter of its shape has the same name.

    "The same name" means the part after the field of the state. The state is a tuple, and the user
    chose its name in the checkpoint. Beside a model's own layers there is no count of steps, and
    there are no second moments.
    """
    fields = (
        i
        for i, part in enumerate(parts)
        if i and part in _MOMENTS | _AS_IN_MODELS and parts[i - 1].isdecimal()
    )
    at = next(fields, 0)
    ahead, behind = parts[:at], parts[at + 1 :]
    if context.layout != "jax" or not at:
        return False
    others = [(context.parts[name], size) for name, size in context.shapes.items()]
    beside = {other[at] for other, _ in others if other[:at] == ahead and len(other) > at}
    if parts[at] in _AS_IN_MODELS and not beside & {"count", "nu"}:
        return False
    return any(
        other == behind or (len(behind) > 1 and other[-len(behind) :] == behind)
        for other, size in others
        if size == shape and other[:at] != ahead
    )


def _quantised(name: str, last: str, dtype: str, context: Context) -> Assumption | None:
    if dtype.startswith("float8_e8m0") or (name.endswith(SCALES) and context.is_of_scaled(name)):
        return Assumption(skipped="scales of a quantised weight")
    of_comfy = f"{name.removesuffix('weight')}scale_weight"
    scaled = any(n in context.shapes for n in (f"{name}_scale", f"{name}_scale_inv", of_comfy))
    packed = "int" in dtype or dtype in ("bits8", "opaque")
    if scaled or (packed and (last in _WEIGHTS | _PACKED or last.endswith(_PACKED_ENDS))):
        reason = f"{dtype}: quantised or packed, its map is not that of the numbers stored"
        return Assumption(
            skipped=f"{reason}; dequantise the model first (transformers: model.dequantize()) and "
            "save it again",
            harmless=False,
        )
    return Assumption(skipped=f"{dtype}: no weights") if packed else None


def _is_bias(name: str, shape: tuple[int, ...], parts: list[str], context: Context) -> bool:
    last = parts[-1].lower()
    words = last.split("_")
    # Not in state spaces, which have a matrix B.
    if (
        parts[-1] == "b"
        or {"bias", "biases"} & set(words)
        or any(word in last for word in _TABLES_OF_BIASES)
    ):
        return True
    if name.startswith(LEAF):
        before = context.shapes.get(f"{LEAF}{int(last) - 1}", ())
        return len(before) == len(shape) + 1 and before[0] == shape[0] and set(shape[1:]) == {1}
    if context.layout != "keras":
        return False
    # Keras numbers the variables of a layer; the bias is the last.
    recurrent = last == "2" and any("cell" in part for part in parts)
    multiplied = is_attention(parts) or any(p.startswith("einsum_dense") for p in parts)
    return recurrent or (last == "1" and multiplied)


def _is_of_spectral_normalization(
    name: str, shape: tuple[int, ...], parts: list[str], context: Context
) -> bool:
    """Whether it is the vector of Keras' SpectralNormalization, or its copy of the inner kernel."""
    if not any(p.startswith("spectral_normalization") for p in parts[-3:-2]):
        return False
    inner = f"{name.rpartition('vars/')[0]}layer/vars/0"
    return inner in context.shapes and (parts[-1] == "1" or shape == context.shapes[inner])
