"""Names of what training scripts save around a model, and of what is no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specops.checkpoints import open_checkpoint
from specops.checkpoints.branches import leaves

torch = pytest.importorskip("torch")
MODEL = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2)}
ADAM = {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def names(path: Path, saved: Any, **options: Any) -> tuple[list[str], list[str]]:
    """Names of the tensors and of the plain values."""
    torch.save(saved, path / "a.pt", **options)
    with open_checkpoint(path / "a.pt") as found:
        assert not found.problems
        for entry in found.entries:
            if not entry.problem:
                assert found.read(entry.name).shape == entry.shape
        assert all(e.shape is None for e in found.entries if e.harmless)
        tensors = [entry.name for entry in found.entries if not entry.harmless]
        return tensors, [entry.name for entry in found.entries if entry.harmless]


@pytest.mark.parametrize("zipped", [True, False])
def test_every_branch_with_weights_keeps_its_key(tmp_path: Path, zipped: bool) -> None:
    saved = {"model": MODEL, "discriminator": MODEL, "ema": MODEL, "optimizer": ADAM, "epoch": 3}
    tensors, plain = names(tmp_path, saved, _use_new_zipfile_serialization=zipped)
    assert tensors == ["model.fc.weight", "model.fc.bias", "optimizer.state.0.exp_avg"]
    other = {key: {k: v.clone() for k, v in MODEL.items()} for key in ("discriminator", "ema")}
    tensors, plain = names(tmp_path, saved | other, _use_new_zipfile_serialization=zipped)
    assert tensors == [
        *[f"{m}.fc.{w}" for m in ("model", "discriminator", "ema") for w in ("weight", "bias")],
        "optimizer.state.0.exp_avg",
    ]
    assert plain == ["optimizer.param_groups", "epoch"]


@pytest.mark.parametrize("main", ["state_dict", "model_state_dict", "model", "params"])
@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("optimizer", "optimizer"),
        ("optimizer_state_dict", "optimizer.optimizer_state_dict"),
        ("optim", "optimizer.optim"),
        ("opt", "optimizer.opt"),
        ("optimizers", "optimizer.optimizers"),
        ("lr_schedulers", "optimizer.lr_schedulers"),
        ("optimizer_G", "optimizer.optimizer_G"),
    ],
)
def test_one_model_and_its_optimizer(tmp_path: Path, main: str, key: str, prefix: str) -> None:
    tensors, plain = names(tmp_path, {"epoch": 3, key: ADAM, main: MODEL, "none": {}})
    assert tensors == ["fc.weight", "fc.bias", f"{prefix}.state.0.exp_avg"]
    assert plain == ["epoch", f"{prefix}.param_groups"]


def test_random_states_and_counters_are_no_second_model(tmp_path: Path) -> None:
    rest = {"rng_state": torch.get_rng_state(), "best": torch.tensor(0.5), "n": [torch.arange(3)]}
    assert names(tmp_path, rest | {"state_dict": {"model": MODEL, "step": 1}}) == (
        ["fc.weight", "fc.bias", "rng_state", "best", "n.0"],
        ["step"],
    )
    assert names(tmp_path, {"model": MODEL, "w": torch.ones(2)})[0] == [
        "model.fc.weight",
        "model.fc.bias",
        "w",
    ]


def test_two_optimizers_without_a_wrapper(tmp_path: Path) -> None:
    saved = {"gen": MODEL, "optim_g": ADAM, "optimizer": [{"x": torch.ones(1)}]}
    assert names(tmp_path, saved)[0] == [
        "gen.fc.weight",
        "gen.fc.bias",
        "optimizer.optim_g.state.0.exp_avg",
        "optimizer.0.x",
    ]


def test_plain_values(tmp_path: Path) -> None:
    plain: dict[str, Any] = {
        "int": 1,
        "float": 0.5,
        "str": "a",
        "bool": True,
        "None": None,
        "list": [1, {"a": (2, "b")}],
        "set": {1},
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    assert names(tmp_path, plain | {"w": torch.ones(1)}) == (["w"], list(plain))
    torch.save({"a": torch.ones(2), "storage": torch.ones(2).untyped_storage()}, tmp_path / "a.pt")
    entry = open_checkpoint(tmp_path / "a.pt").entries[1]
    assert (entry.problem, entry.harmless) == ("not a tensor but of type TypedStorage", False)
    assert names(tmp_path, {}) == ([], [])
    assert names(tmp_path, [1, 2]) == ([], ["file"])


def test_containers_in_each_other_without_end() -> None:
    deep: Any = [np.ones(1)]
    for _ in range(3000):
        deep = [deep, 1]
    found = dict(leaves(deep, lambda thing: isinstance(thing, np.ndarray)))
    assert len(found) == 3001
