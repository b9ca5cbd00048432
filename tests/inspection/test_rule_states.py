"""Checkpoints that hold the states of specops' own rules beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops

pytestmark = pytest.mark.filterwarnings("ignore")

RULES = [
    specops.ClipSpectralNorm(0.5),
    specops.SpectralNormalization(norm="operator"),
    specops.StableRankNormalization(0.5, norm="reshaped"),
    specops.SpectralNormPenalty(0.1, norm="operator"),
]
STATE = "of the state of specops' rules"


def of_states(path: Path) -> tuple[set[str], list[str]]:
    """The names of what is measured, and of what belongs to rules."""
    found = specops.inspect(path)
    assert not found.problems
    return {w.name for w in found.measured}, [w.name for w in found.weights if w.skipped == STATE]


def said_of(path: Path) -> list[str]:
    """What notes say of parameters that layers may not compute with: how many, and which."""
    notes = [note for note in specops.inspect(path).notes if "detach(fold=True)" in note]
    return [note.split("norms of ")[1].split(" by ")[0] for note in notes]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", ["file", "distributed"])
def test_the_state_of_an_attachment_is_no_weight(rule: Any, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, rule)
    for _ in range(2):
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    saved = {"model": model.state_dict(), "rules": {"generator": attachment.state_dict()}}
    path = tmp_path / "saved.pt"
    if kind == "file":
        torch.save(saved, path)
    else:
        from torch.distributed import checkpoint

        checkpoint.save(saved, checkpoint_id=path)
    measured, states = of_states(path)
    assert measured == {"model.0.weight", "model.2.weight"}
    weights = saved["rules"]["generator"]["weights"]
    assert sorted(states) == sorted(
        f"rules.generator.weights.{name}.state.{key}"
        for name, kept in weights.items()
        for key in kept["state"] or {}
    )
    assert len(states) > 2
    assert said_of(path) == ([] if rule.stage == "weights" else ["2: 0.weight, 2.weight. If"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_the_state_of_a_chain_is_no_weight(rule: Any, kind: str, tmp_path: Path) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    import specops_jax

    normal = jax.random.normal
    params = {
        "conv": {"kernel": normal(jax.random.key(0), (3, 3, 4, 8))},
        "dense": {"kernel": normal(jax.random.key(1), (20, 50))},
    }
    maps = {
        "conv/kernel": specops.Conv((8, 8), layout="*IO"),
        "dense/kernel": specops.Dense(out_axes=(-1,)),
    }
    acting = specops_jax.add_penalty if rule.stage == "gradients" else specops_jax.constrain
    transform = optax.chain(acting(rule, maps))
    state = transform.init(params)
    _, state = transform.update(params, state, params)
    saved = {"params": params, "tx": state}
    path = tmp_path / f"saved.{kind}"
    if kind == "msgpack":
        serialization = pytest.importorskip("flax.serialization")
        path.write_bytes(serialization.to_bytes(saved))
    else:
        orbax = pytest.importorskip("orbax.checkpoint")
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, saved)
    measured, states = of_states(path)
    assert {name.replace("/", ".") for name in measured} == {
        "params.conv.kernel",
        "params.dense.kernel",
    }
    found = specops_jax.find_state(state)
    assert len(states) == sum(map(len, (*found.rules.values(), *found.figures.values()))) > 2
    named = "2: conv.kernel, dense.kernel. If"
    assert said_of(path) == ([] if rule.stage == "weights" else [named])


def test_layers_that_are_called_like_parts_of_a_state_are_weights(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    tensors = {"weights.0.state.left": w, "rules.0.weight": w, "fired.weight": w, "rules.fc.w": w}
    np.savez(tmp_path / "model.npz", **tensors)
    assert of_states(tmp_path / "model.npz") == (set(tensors), [])
