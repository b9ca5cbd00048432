"""The weights of a model with their geometries, for functions that take arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from specops.errors import AdapterError, GeometryError
from specops.geometry import Dense, Geometry
from specops.training.cautions import caution
from specops.training.coverage import warn_of_remarks
from specops.training.declared import declared
from specops.training.weight import is_named
from specops_torch.evaluation import evaluating
from specops_torch.geometry import CONVOLUTIONS
from specops_torch.own_forward import added_to
from specops_torch.pieces import is_sharded
from specops_torch.reading import brought_together
from specops_torch.sizes import SizeRecorder
from specops_torch.surroundings import role_within

_RAW = ("_orig", "_g", "_v")
"""Suffixes of the parameters that torch's older reparametrisations keep."""


@torch.no_grad()
def weights_and_geometries(
    model: nn.Module,
    x: Any = None,
    *,
    geometries: Mapping[str, Geometry] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Geometry]]:
    """Every matrix and kernel of a model, and the map that each is, by name.

    What `specops.measures.log_spec_fro` and others take of a whole model, without an attachment.

    Parameters
    ----------
    model : torch.nn.Module
        Frozen parameters are included; a tied parameter is included once.
    x : torch.Tensor, optional
        A batch, which is run through the model in evaluation to see the input sizes of
        convolutions. With None they are given for every size, for which only bounds exist.
    geometries : mapping of pattern to Dense or Conv, optional
        Geometries of weights whose layer gives none or a wrong one, by glob patterns of names,
        of which the first match counts. Embeddings are left out unless a pattern names them.

    Returns
    -------
    weights : dict of str to torch.Tensor
        The weights in use (normalised, reparametrised), without gradients. Sharded weights are
        gathered, so all ranks have to call this. Blocks of a fused weight (gates of an LSTM,
        attention projections) are entries of their own: ``"in_proj_weight[0]"``.
    geometries : dict of str to Dense or Conv
        The geometry of each weight.

    Raises
    ------
    AdapterError
        A pattern matches no weight, or the model has lazy parameters.
    GeometryError
        A geometry does not fit its weight.

    Warns
    -----
    CautionWarning
        Some arrays of two or more axes are left out (with their names and the reasons), or hold
        several maps of which it is not known how they lie in the array.

    Examples
    --------
    >>> from specops.measures import log_spec_fro
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    >>> weights, maps = weights_and_geometries(model, torch.zeros(1, 1, 6, 6))
    >>> {name: geometry.describe() for name, geometry in maps.items()}
    {'0.weight': 'conv 6×6, zeros', '2.weight': 'dense'}
    >>> complexity = log_spec_fro(weights, 1.0, maps)
    """
    patterns, modules = declared(geometries), dict(model.named_modules())
    adapted = added_to(modules)
    seen = {} if x is None else recorded(model, x)
    weights: dict[str, torch.Tensor] = {}
    maps: dict[str, Geometry] = {}
    left: dict[str, str] = {}
    remarks: list[tuple[str, str]] = []
    matched: set[str] = set()
    tied: set[int] = set()
    with evaluating(model):  # in training, reading a weight may advance its normalisation
        places = [(*place, getattr(modules[place[0]], place[1])) for place in _places(modules)]
    for path, attribute, w in places:
        module, name = modules[path], f"{path}.{attribute}".lstrip(".")
        raw = module._parameters.get(attribute)
        if isinstance(raw, nn.parameter.UninitializedParameter):
            raise AdapterError(f"{name} is lazy: run one forward pass first")
        if w.ndim < 2 or id(raw) in tied:
            continue
        pattern = next((p for p in patterns if is_named(name, p)), None)
        found: Geometry | None
        if pattern is not None:
            matched.add(pattern)
            found, why = patterns[pattern], ""
            try:
                patterns[pattern].check(tuple(w.shape))
            except GeometryError as error:
                raise GeometryError(f"{name}, geometries={{{pattern!r}: ...}}: {error}") from error
        else:
            recorder = seen.get(id(module))
            sizes = () if recorder is None else recorder.sizes()
            role = role_within(modules, path, attribute, tuple(w.shape), *sizes)
            found, why = role.geometry, role.opt_in or role.obstacle or adapted.get(path, "")
            remarks.append((name, "" if found is None or why else role.remark))
        if found is None or why:
            left[name] = why
            continue
        if is_sharded(w):
            w = brought_together(module, attribute, w)
        if raw is not None:
            tied.add(id(raw))
        for entry, part, geometry in _single(name, w.detach(), found):
            weights[entry], maps[entry] = part, geometry
    unmatched = [p for p in patterns if p not in matched]
    if unmatched:
        raise AdapterError(f"geometries names no weight: {', '.join(map(repr, unmatched))}")
    if left:
        listed = "; ".join(f"{name}: {why}" for name, why in left.items())
        caution(f"left out of the model's weights, name them in geometries= to count: {listed}")
    warn_of_remarks(remarks)
    return weights, maps


def _places(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """(path of the module, attribute) of every tensor that layers use as a parameter."""
    for path, module in modules.items():
        if ".parametrizations" in f".{path}":
            continue
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                # These hooks compute the weight at each forward pass: bring it up to date.
                hook(module, ())
        computed: list[str] = []
        if parametrize.is_parametrized(module):
            computed = list(module.parametrizations)
        attributes: dict[str, None] = {}
        for raw in (*module._parameters, *computed):
            plain = raw.removesuffix(next((end for end in _RAW if raw.endswith(end)), ""))
            known = plain not in module._parameters and hasattr(module, plain)
            attributes[plain if known else raw] = None
        for attribute in attributes:
            if isinstance(getattr(module, attribute), torch.Tensor):
                yield path, attribute


def _single(
    name: str, w: torch.Tensor, geometry: Geometry
) -> Iterator[tuple[str, torch.Tensor, Geometry]]:
    """The blocks of a fused weight, one by one, stacked or not; any other weight as it is."""
    if isinstance(geometry, Dense) and geometry.splits is not None:
        stacked = tuple(range(len(geometry.batch_axes)))
        single = Dense(out_axes=(len(stacked),), batch_axes=stacked)
        for i, block in enumerate(geometry.blocks(w)):
            yield f"{name}[{i}]", block, single
        return
    yield name, w, geometry


def recorded(model: nn.Module, x: Any) -> dict[int, SizeRecorder]:
    """The input sizes of all convolutions for a batch in evaluation, by the id of the module."""
    recorders: dict[int, SizeRecorder] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            recorder = recorders[id(module)] = SizeRecorder(module.padding_mode == "circular")
            handles.append(module.register_forward_hook(recorder, with_kwargs=True))
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return recorders
