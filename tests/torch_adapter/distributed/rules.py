"""Two ranks: every rule gives what it gives to one process."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import (
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import specops
import specops_torch
from specops import (
    ClipAndCut,
    ClipSpectralNorm,
    Conv,
    Dense,
    Monitor,
    NormalizeIfAbove,
    ProjectStableRank,
    SpectralHammer,
    SpectralNormalization,
    SpectralNormPenalty,
    SpectralSoftCap,
    StableRankNormalization,
    TrainableScale,
    errors,
)
from tests.torch_adapter.distributed.models import (
    batch,
    chain,
    compare,
    conv,
    counted,
    dense,
    experts,
    fsdp,
    in_columns,
    raises,
    same,
    step,
    train,
    whole,
)


def rules_on_weights(_: Path) -> None:
    """Bitwise what one process gives: owners do its arithmetic."""
    for rule in (
        ClipSpectralNorm(1.0, screen=False),
        NormalizeIfAbove(1.0, norm="operator"),
        SpectralSoftCap(1.0, norm="operator"),
        ProjectStableRank(ratio=0.5, norm="reshaped"),
        SpectralHammer(1.0, norm="operator"),
        Monitor(),
    ):
        compare(dense, fsdp, rule, 0.0)


def rules_on_kernels(_: Path) -> None:
    """Whose states are large."""
    for rule in (ClipSpectralNorm(0.5), ClipAndCut(0.5)):
        compare(conv, fsdp, rule, 0.0, steps=2)


def kernels_of_batches_of_many_sizes(_: Path) -> None:
    """The largest input that any rank has met counts on all, whichever owns the kernel."""
    for rule in (
        ClipSpectralNorm(1.0),
        NormalizeIfAbove(1.0, norm="operator"),
        SpectralNormalization(norm="operator"),
    ):
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0)
        model, size = fsdp(model), (3, 15)[dist.get_rank()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        attachment = specops.attach(optimizer, model, rule)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(1, 3, size, size)).square().mean().backward()
            optimizer.step()
        geometry = Conv((15, 15), padding=1)
        for name, used in attachment.weights().items():
            w = used.full_tensor() if hasattr(used, "full_tensor") else used
            assert float(specops.spectral_norm(w.detach(), geometry)) < 1.01, (rule, name)
        assert set(attachment.geometries().values()) == {geometry}


def a_firing_inside_moves_vectors(_: Path) -> None:
    """Two collectives for all layers where they are decomposed, then two that are small."""
    model = fsdp(dense())
    attachment = specops.attach(None, model, ClipSpectralNorm(20.0))
    with CommDebugMode() as first:
        attachment.step()
    assert counted(first) == {"alltoall_base_": 2}
    before = whole(model)
    with CommDebugMode() as later:
        attachment.step()
    assert counted(later) == {"allreduce_": 2}
    same(whole(model), before, 0.0)
    with CommDebugMode() as certain:
        attachment.enforce()
    assert counted(certain) == {"alltoall_base_": 2}


def estimates_by_products(_: Path) -> None:
    """What is inside is seen to be so by the same numbers, what leaves is projected."""
    compare(dense, fsdp, ClipSpectralNorm(8.0), 1e-6, steps=5)
    compare(dense, fsdp, ClipSpectralNorm(5.5), 1e-6, steps=5, rate=0.05)
    stack = {"0.weight": Dense(out_axes=(2,), in_axes=(1,), batch_axes=(0,))}
    compare(experts, fsdp, ClipSpectralNorm(9.0), 1e-6, steps=4, geometries=stack)
    for axis in (1, 2):
        place = functools.partial(fsdp, shard_placement_fn=lambda _, axis=axis: Shard(axis))
        compare(experts, place, ClipSpectralNorm(9.0), 1e-6, steps=4, geometries=stack)


def penalties(_: Path) -> None:
    """Each rank adds its part of the term."""
    compare(dense, fsdp, SpectralNormPenalty(0.05, norm="reshaped"), 1e-6)
    for norm in ("reshaped", "operator", "bidirectional"):
        compare(conv, fsdp, SpectralNormPenalty(0.05, norm=norm), 1e-6)


def forward_rules(_: Path) -> None:
    """Layers meet the whole weight, and its vectors advance with its parts."""
    for rule in (
        SpectralNormalization(norm="reshaped", scale=lambda step, *_: 1.0 + 0.1 * step),
        StableRankNormalization(0.8, norm="reshaped"),
    ):
        compare(dense, fsdp, rule, 1e-5)
    for norm in ("operator", "bidirectional"):
        compare(conv, fsdp, SpectralNormalization(norm=norm), 1e-5)
    model = fsdp(dense(), reshard_after_forward=False)
    attachment, optimizer = train(model, SpectralNormalization(norm="reshaped"))
    model.eval()
    evaluated = model(batch(model)).detach()
    step(model, optimizer)
    assert float((model(batch(model)).detach() - evaluated).abs().max()) > 1e-3
    for name, used in attachment.weights().items():
        geometry = attachment.geometries()[name]
        norms = specops.spectral_norm(used.detach(), geometry)
        for norm in norms if isinstance(norms, tuple) else (norms,):
            assert abs(float(norm) - 1.0) < 0.15, (name, norm)
    wanted = model(batch(model)).detach()
    attachment.detach(fold=True)
    same({"": model(batch(model)).detach()}, {"": wanted}, 1e-5)


def reports_of_normalised_layers(_: Path) -> None:
    """Batch normalisations are sharded, too."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        plain[1].weight.normal_()
    found = []
    for m in (plain, fsdp(copy.deepcopy(plain))):
        attachment = specops.attach(None, m, ClipSpectralNorm(0.7))
        m(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
        rows = attachment.report().rows
        found.append({row.name: row.normalized for row in rows})
    same(found[1], found[0], 1e-6)
    assert found[0]["0.weight"] > 0.0


def weights_for_functions_on_arrays(_: Path) -> None:
    """Are whole ones, and those in use."""
    for rule in (ClipSpectralNorm(1.0), SpectralNormalization(norm="reshaped", scale=2.0)):
        found = []
        for m in (chain(), fsdp(chain())):
            attachment, _ = train(m, rule)
            found.append(specops_torch.weights_and_geometries(m)[0])
            same(found[-1], _gathered(attachment.weights()), 1e-6)
        same(found[1], found[0], 1e-5)
    with raises(errors.UnsupportedArrayError, "DTensor", "full_tensor"):
        specops.spectral_norm(m[0].weight)


def _gathered(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach()
        for name, w in weights.items()
    }


def scales_that_are_trained(_: Path) -> None:
    """By the mean over batches, of which each rank has its own, however steps are taken."""
    for how in ("hooks", "closure", "by hand"):
        plain = chain()
        model, x = fsdp(copy.deepcopy(plain)), batch(plain)
        found = [
            _scales(m, [given], how)
            for m, given in ((plain, x), (model, x.chunk(2)[dist.get_rank()]))
        ]
        same(found[1], found[0], 1e-5)
        same(whole(model), whole(plain), 1e-5)
        assert abs(float(found[0]["0.weight"]) - 1.5) > 1e-2


def scales_of_accumulated_gradients(_: Path) -> None:
    """Those that wait to be sent count; those that were sent and reset do not."""
    halves = batch(chain()).split(2)
    for shared in (False, True):
        found = [_scales(m, halves, "hooks", shared) for m in (chain(), fsdp(chain()))]
        same(found[1], found[0], 1e-5)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    rounded = _scales(fsdp(chain(), mp_policy=policy), halves, "hooks", shared)
    same(rounded, found[0], 1e-2)


def scales_of_replicas(_: Path) -> None:
    """Under DDP, or in a group that is named; of a layer that one rank alone has called, too."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.on_one = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, one: bool) -> torch.Tensor:
            return self.always(x) + (self.on_one(x) if one else 0)

    torch.manual_seed(0)
    plain, x, rank = Choosing(), torch.randn(2, 4, 6), dist.get_rank()
    rule = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5))
    given = (
        (plain, {}),
        (DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=True), {}),
        (copy.deepcopy(plain), {"replicas": dist.group.WORLD}),
    )
    found = []
    for model, options in given:
        with mock.patch("specops_torch.scales.is_distributed", return_value=model is not plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            attachment = specops.attach(optimizer, model, rule, **options)
        for _ in range(3):
            optimizer.zero_grad()
            if model is plain:
                loss = sum(model(x[i], one=i == 0).square().mean() for i in (0, 1)) / 2
            else:
                loss = model(x[rank], one=rank == 0).square().mean()
            loss.backward()
            if "replicas" in options:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad / 2
                    dist.all_reduce(p.grad)
            optimizer.step()
        found.append({n.removeprefix("module."): p.detach() for n, p in attachment.scales.items()})
    for scales in found[1:]:
        same(scales, found[0], 1e-5)
    assert all(abs(float(p) - 1.5) > 1e-3 for p in found[0].values())


def _scales(model: nn.Module, parts: Any, how: str, shared: bool = False) -> dict[str, Any]:
    """Trained for three steps, each of several backward passes, the last of which sends."""
    is_sharded = hasattr(model, "set_requires_gradient_sync")
    rule = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5, shared=shared))
    by_hand = how == "by hand"
    optimizer = None if by_hand else torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch("specops_torch.scales.is_distributed", return_value=is_sharded):
        attachment = specops.attach(optimizer, model, rule)
    if by_hand:
        optimizer = torch.optim.SGD([*model.parameters(), *attachment.scales.values()], lr=0.1)

    def backward() -> None:
        (model if how == "hooks" else optimizer).zero_grad()
        for i, part in enumerate(parts):
            if is_sharded:
                model.set_requires_gradient_sync(i == len(parts) - 1)
            model(part).square().mean().backward()

    for _ in range(3):
        if how == "closure":
            optimizer.step(backward)
            continue
        model(2 * parts[0]).square().mean().backward()
        backward()
        if by_hand:
            attachment.before_step()
        optimizer.step()
        if by_hand:
            attachment.step()
    found = {name: p.detach().clone() for name, p in attachment.scales.items()}
    if by_hand and is_sharded:
        with pytest.warns(errors.CautionWarning, match="before_step"):
            attachment.step()
        attachment.step()
    return found


def tensor_parallel(_: Path) -> None:
    """Column- and row-wise: blocks and norms are those of the logical weight."""
    for rule, tolerance in (
        (ClipSpectralNorm(1.0), 1e-6),
        (ClipSpectralNorm(30.0), 1e-6),
        (SpectralNormPenalty(0.01, norm="reshaped"), 1e-6),
    ):
        compare(
            chain, in_columns, rule, tolerance, geometries={"0.weight": Dense(splits=(3, 5, 4))}
        )


def replicated(_: Path) -> None:
    """DTensors that every rank holds, of whose gradients each has a summand."""
    mesh = init_device_mesh("cpu", (2,))
    for rule in (SpectralNormPenalty(0.5, norm="reshaped"), ClipSpectralNorm(1.0)):
        plain = chain()
        model = distribute_module(copy.deepcopy(plain), mesh)
        x = batch(plain)
        for m, given in ((plain, x), (model, distribute_tensor(x, mesh, [Shard(0)]))):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            specops.attach(optimizer, m, rule)
            for _ in range(2):
                optimizer.zero_grad()
                m(given).square().mean().backward()
                optimizer.step()
        same(whole(model), whole(plain), 1e-6)


def not_finite(_: Path) -> None:
    """Seen by one rank, told on all, by the user's policy."""
    for rule in (
        ClipSpectralNorm(20.0),
        NormalizeIfAbove(1.0, norm="operator"),
        SpectralNormalization(norm="reshaped"),
    ):
        for policy in ("raise", "skip"):
            model = fsdp(dense())
            attachment = specops.attach(None, model, rule, on_nonfinite=policy)
            with torch.no_grad():
                model(batch(model))
            attachment.step()
            if dist.get_rank() == 0:
                model[0].weight.detach().to_local()[0, 0] = float("nan")
            before = whole(model)
            if policy == "raise":
                with raises(errors.NonFiniteError, "0.weight", "(8, 6)"):
                    attachment.step()
                for name, w in whole(model).items():
                    assert torch.equal(w.nan_to_num(), before[name].nan_to_num()), name
            else:
                attachment.step()
                (record,) = [r for r in attachment.history if r["name"] == "0.weight"][1:]
                assert record["skipped"] == "not finite"


RANKS = 2
CASES = (
    rules_on_weights,
    rules_on_kernels,
    kernels_of_batches_of_many_sizes,
    a_firing_inside_moves_vectors,
    estimates_by_products,
    penalties,
    forward_rules,
    reports_of_normalised_layers,
    weights_for_functions_on_arrays,
    scales_that_are_trained,
    scales_of_accumulated_gradients,
    scales_of_replicas,
    tensor_parallel,
    replicated,
    not_finite,
)
