"""Two ranks: training by libraries that shard by `fully_shard` on their own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import specops
from tests.torch_adapter.distributed.models import batch, chain, flat, fsdp, same, train, whole

RULE = specops.ClipSpectralNorm(1.0)
STEPS = 3


def by_accelerate(_: Path) -> None:
    """Attached to the optimizer inside the prepared one, whose parameters it has exchanged."""
    import accelerate
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    with launched():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
        )
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        # On processors it would take DDP.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        net = chain()
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.3))
        attachment = specops.attach(optimizer.optimizer, model, RULE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(model(batch(net)).square().mean())
            optimizer.step()
    as_alone(model, attachment)


def by_lightning(folder: Path) -> None:
    """Sharded in `configure_model`, attached in `configure_optimizers`."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Sharded(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain()

        def configure_model(self) -> None:
            fsdp(self.net, self.device_mesh["data_parallel"])

        def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(x).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
            self.attachment = specops.attach(optimizer, self.net, RULE)
            return optimizer

    with launched():
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            default_root_dir=folder,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Sharded()
        trainer.fit(module, DataLoader([batch(module.net)] * STEPS, batch_size=None))
    as_alone(module.net, module.attachment)


def as_alone(model: nn.Module, attachment: Any) -> None:
    """Sharded, and trained as one process does."""
    assert all(hasattr(p, "device_mesh") for p in model.parameters())
    plain = chain()
    expected, _ = train(plain, RULE, steps=STEPS)
    assert attachment.steps == STEPS
    same(whole(model), whole(plain), 1e-6)
    same(flat(attachment.history), flat(expected.history), 1e-6)


@contextmanager
def launched() -> Iterator[None]:
    """What torchrun tells its processes; warnings are the libraries' own."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    told = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    told |= {f"LOCAL_{name}": told[name] for name in ("RANK", "WORLD_SIZE")}
    with mock.patch.dict(os.environ, told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CASES = tuple(
    case
    for case in (by_accelerate, by_lightning)
    if find_spec(case.__name__.removeprefix("by_")) is not None
)
