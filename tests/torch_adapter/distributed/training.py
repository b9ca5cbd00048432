"""Two ranks: training as people do it, and what goes wrong."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import specops
import specops_torch
from specops import (
    ClipSpectralNorm,
    Monitor,
    SpectralNormalization,
    SpectralNormPenalty,
    SpectralSoftCap,
    TrainableScale,
    errors,
)
from tests.torch_adapter.distributed import engines, failing, recurrent
from tests.torch_adapter.distributed.models import (
    RESUMED,
    Breaking,
    batch,
    counted,
    dense,
    flat,
    fsdp,
    in_columns,
    raises,
    same,
    train,
    whole,
)


def mixed_precision_and_checkpointing(_: Path) -> None:
    """Parameters stay as they are; layers meet them in bfloat16."""

    def shard(model: nn.Module) -> nn.Module:
        checkpoint_wrapper.apply_activation_checkpointing(
            model, check_fn=lambda m: isinstance(m, nn.Linear)
        )
        return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    for rule in (ClipSpectralNorm(1.0), SpectralNormalization(norm="reshaped")):
        model = shard(dense())
        attachment, _ = train(model, rule, rate=0.01)
        names = [row.name for row in attachment.report().rows]
        assert names == [name for name, _ in dense().named_parameters()], names
        for name, used in attachment.weights().items():
            w = used.full_tensor() if hasattr(used, "full_tensor") else used
            norms = specops.spectral_norm(w.detach(), attachment.geometries()[name])
            largest = max(map(float, norms if isinstance(norms, tuple) else (norms,)))
            assert largest < 1.1, (rule, name)
            assert largest > 0.9 or isinstance(rule, ClipSpectralNorm)


def accumulation(_: Path) -> None:
    """Two halves of a batch in one step, gradients sent once."""
    plain = dense()
    sharded = fsdp(copy.deepcopy(plain))
    rule, halves = ClipSpectralNorm(1.0), batch(plain).split(2)
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attachment = specops.attach(optimizer, model, rule)
        for _ in range(2):
            for i, half in enumerate(halves):
                if model is sharded:
                    model.set_requires_gradient_sync(i == 1)
                model(half).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert attachment.steps == 2
    same(whole(sharded), whole(plain), 1e-6)


def what_is_let_go_of_is_freed(_: Path) -> None:
    """Parameters with trained scales too, which torch's hooks on them would hold."""
    model = fsdp(dense())
    train(model, SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5)))
    held = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in held)


def copies_of_an_evaluation(_: Path) -> None:
    """A layer that was left whole by an evaluation does not go on with the old weight."""
    model = fsdp(dense(), reshard_after_forward=False)
    attachment = specops.attach(None, model, ClipSpectralNorm(1.0))
    with torch.no_grad():
        before = model(batch(model))
    attachment.enforce()
    with torch.no_grad():
        after = model(batch(model))
    reference = dense()
    specops.attach(None, reference, ClipSpectralNorm(1.0)).enforce()
    with torch.no_grad():
        same({"": after}, {"": reference(batch(reference))}, 1e-6)
    assert float((before - after).abs().max()) > 1e-3


def on_the_meta_device(_: Path) -> None:
    """Made without numbers, sharded, filled, attached; before they are there it says so."""
    plain = dense()
    with torch.device("meta"):
        model = dense()
    fsdp(model)
    with raises(errors.UnsupportedArrayError, "0.weight is on the meta device"):
        specops.attach(None, model, ClipSpectralNorm(1.0))
    model.to_empty(device="cpu")
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.data.copy_(distribute_tensor(q.data, p.device_mesh, p.placements))
    for m in (plain, model):
        train(m, ClipSpectralNorm(1.0))
    same(whole(model), whole(plain), 0.0)


def refused(_: Path) -> None:
    """What cannot be right is named, with the remedy."""
    for rule in (ClipSpectralNorm(1.0), SpectralNormalization(norm="reshaped")):
        model = dense()
        attachment = specops.attach(None, model, rule)
        fsdp(model)
        with raises(errors.AdapterError, "0.weight is sharded", "then attach"):
            attachment.step()
        model(batch(model))
        with raises(errors.AdapterError, "0.weight is sharded", "then attach"):
            attachment.step()
        attachment.detach()
    with raises(errors.AdapterError, "FSDP1", "fully_shard"):
        specops.attach(None, FullyShardedDataParallel(dense(), device_id="cpu"), Monitor())
    marks = {
        "DeepSpeed": {"ds_id": 0, "ds_shape": (8, 6)},
        "Megatron": {"tensor_model_parallel": 1},
    }
    for engine, attributes in marks.items():
        model = dense()
        vars(model[0].weight).update(attributes)
        with raises(errors.AdapterError, "0.weight", engine):
            specops.attach(None, model, Monitor())
    model = in_columns(nn.Sequential(nn.Linear(4, 6)))
    with raises(errors.AdapterError, "0.weight: it is sharded", "ClipSpectralNorm"):
        specops.attach(None, model, SpectralNormalization(norm="reshaped"))
    rank = dist.get_rank()
    for plan in (ClipSpectralNorm(1.0 + rank), specops.Plan([("*", Monitor(), 1 + rank)])):
        with raises(errors.AdapterError, "0.weight", "different rules"):
            specops.attach(None, fsdp(dense()), plan)
    model = fsdp(dense())
    optimizer = torch.optim.LBFGS(model.parameters())
    specops.attach(optimizer, model, SpectralNormPenalty(0.1, norm="reshaped"))
    with raises(errors.AdapterError, "0.weight", "closure"):
        optimizer.step(lambda: model(batch(model)).square().mean())


def failures_reach_all_ranks(_: Path) -> None:
    """With the layer's name, and with all weights as they were."""
    model = fsdp(dense())
    before = whole(model)
    attachment = specops.attach(None, model, Breaking())
    with raises(ValueError, "broken") as caught:
        attachment.step()
    notes = " ".join(caught.value.__notes__)
    assert "4.weight" in notes, notes
    assert "Breaking" in notes, notes
    attachment.detach()
    same(whole(model), before, 0.0)

    attachment = specops.attach(None, model, ClipSpectralNorm(20.0))
    attachment.step()
    if dist.get_rank() == 1:
        with (
            mock.patch("specops_torch.products._multiply", side_effect=MemoryError),
            raises(MemoryError) as caught,
        ):
            attachment.step()
        assert "acted on 0.weight" in caught.value.__notes__[0]
    else:
        with raises(errors.AdapterError, "0.weight", "another rank"):
            attachment.step()
    attachment.step()
    attachment.detach()


def replicas(_: Path) -> None:
    """Every rank of DDP ends with bitwise the same, of different batches."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns, of itself

    for rule in (
        ClipSpectralNorm(1.0),
        SpectralNormalization(norm="reshaped"),
        SpectralNormPenalty(0.1, norm="reshaped"),
    ):
        for zero in (False, True):
            model = nn.parallel.DistributedDataParallel(dense())
            if zero:
                optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
                    model.parameters(), torch.optim.SGD, lr=0.1
                )
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            attachment = specops.attach(optimizer, model, rule)
            torch.manual_seed(dist.get_rank())
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 3, 6)).square().mean().backward()
                optimizer.step()
            assert attachment.steps == 3
            attachment.detach(fold=True)
            for name, p in model.named_parameters():
                both = [torch.empty_like(p) for _ in range(2)]
                dist.all_gather(both, p.detach())
                assert torch.equal(*both), (rule, zero, name)


class _Skipping(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if dist.get_rank() == 0 else self[0](x)


def layers_that_run_on_some_ranks(_: Path) -> None:
    """Their gradients reach the others, whose forward passes have left them out."""
    for rule in (SpectralNormalization(norm="reshaped"), SpectralNormPenalty(0.1, norm="reshaped")):
        inner = _Skipping(nn.Linear(6, 6), nn.Linear(6, 6))
        model = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
        train(model, rule)[0].detach(fold=True)
        for name, p in model.named_parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both), (rule, name)


def owned_replicas(_: Path) -> None:
    """With a group each rank decomposes some layers, and all end where one alone would."""
    rules = (
        ClipSpectralNorm(1.0, screen=False),
        ClipSpectralNorm(8.0),
        SpectralSoftCap(1.0, norm="operator"),
    )
    for rule in (*rules, SpectralNormPenalty(0.1, norm="reshaped")):
        plain, model = dense(), nn.parallel.DistributedDataParallel(dense())
        attachment, _ = train(model, rule, replicas=dist.group.WORLD)
        expected, _ = train(plain, rule)
        tolerance = 0.0 if rule in rules[:1] else 1e-6
        same(whole(model.module), whole(plain), tolerance)
        same(flat(attachment.history), flat(expected.history), tolerance)
        same(flat(attachment.state_dict()), flat(expected.state_dict()), tolerance)
        for name, p in model.named_parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both), (rule, name)
    attachment = specops.attach(None, dense(), rules[0], replicas=dist.group.WORLD)
    with (
        CommDebugMode() as firing,
        mock.patch.object(
            ClipSpectralNorm, "enforce", autospec=True, side_effect=ClipSpectralNorm.enforce
        ) as done,
    ):
        attachment.enforce()
    assert counted(firing) == {"alltoall_base_": 2}
    counts: list[Any] = [None, None]
    dist.all_gather_object(counts, done.call_count)
    assert min(counts) > 0
    assert sum(counts) == len(attachment.weights()), counts
    attachment.report()  # on one rank alone, if you like
    model = dense()
    with torch.no_grad():
        model[2].weight.add_(dist.get_rank())
    with raises(errors.AdapterError, "2.weight", "no replicas"):
        specops.attach(None, model, rules[0], replicas=dist.group.WORLD)
    rank = dist.get_rank()
    for other in (ClipSpectralNorm(1.0 + rank), (rules[0], rule)[rank]):
        with raises(errors.AdapterError, "0.weight", "equal rules"):
            specops.attach(None, dense(), other, replicas=dist.group.WORLD)
    scheduled = ClipSpectralNorm(lambda *_: 1.0)
    specops.attach(None, dense(), scheduled, replicas=dist.group.WORLD).step()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    attachment = specops.attach(None, model, rules[0], replicas=dist.group.WORLD)
    model(torch.ones(1, 2, 4, 4))
    attachment.step()
    model(torch.ones(1, 2, 4 + rank, 4))
    with raises(errors.AdapterError, "0.weight", "other sizes"):
        attachment.step()


def saved(folder: Path) -> None:
    """What `three` and one process load."""
    for name, rule in RESUMED.items():
        model = fsdp(dense())
        attachment, _ = train(model, rule)
        state = {"model": model.state_dict(), "rule": specops_torch.Stateful(attachment)}
        dcp.save(state, checkpoint_id=folder / name)
        weights = whole(model)
        if dist.get_rank() == 0:
            torch.save((weights, attachment.state_dict()), folder / f"{name}.pt")


def example(_: Path) -> None:
    """The program that users copy from, in little."""
    place = Path(__file__).parents[3] / "examples"
    with mock.patch.object(sys, "path", [str(place), *sys.path]):
        program = importlib.import_module("train_distributed")
    options = program.parsed(["--quick", "--max-norm", "1.0"])
    model, attachment, losses = program.train(options, torch.device("cpu"))
    assert losses[-1] < losses[0]
    for name, w in whole(model).items():
        if name in attachment.geometries():
            norms = specops.spectral_norm(w, attachment.geometries()[name])
            assert max(map(float, norms if isinstance(norms, tuple) else (norms,))) <= 1.0 + 1e-6


RANKS = 2
CASES = (
    mixed_precision_and_checkpointing,
    accumulation,
    what_is_let_go_of_is_freed,
    copies_of_an_evaluation,
    on_the_meta_device,
    refused,
    failures_reach_all_ranks,
    replicas,
    layers_that_run_on_some_ranks,
    owned_replicas,
    saved,
    example,
    *engines.CASES,
    *failing.CASES,
    *recurrent.CASES,
)
