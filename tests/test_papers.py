"""The papers' programs in little: resumed, scored by the stated criterion, by their own rules."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import specops  # noqa: E402

PAPERS = Path(__file__).parents[1] / "examples" / "papers"


def load(name: str) -> ModuleType:
    """A program, or a part of the harness, imported as a script finds its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(PAPERS), *sys.path])
        return importlib.import_module(name)


statistics = load("harness.statistics")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], "reproduced"),
        ([1.0, -0.2, 0.1], "same direction"),
        ([-1.0, 0.2, 0.1], "not seen"),
        ([0.0, 0.0, 0.0], "not seen"),
        ([-1.0, -1.1, -0.9], "contradicted"),
        ([1.0, 1.0], "not run"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    assert statistics.verdict(differences) == verdict


def test_the_weakest_comparison_counts() -> None:
    assert statistics.weakest(["reproduced", "not seen", "same direction"]) == "not seen"
    assert statistics.weakest(["reproduced", "not run"]) == "not run"
    assert statistics.weakest([]) == "not run"


def test_interval_is_students() -> None:
    assert math.isclose(statistics.half_interval([1.0, 2.0, 3.0]), 4.302653 / 3**0.5, rel_tol=1e-6)
    assert math.isnan(statistics.half_interval([1.0]))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    parts = load("harness.program")
    ran: list[tuple[str, int]] = []

    def run(job: Any, context: Any) -> dict[str, Any]:
        ran.append((job.label, context.seed))
        return {"score": len(ran) / 3, "lost": math.nan}

    program = parts.Program(
        paper="paper",
        about="A paper.",
        presets={"digits": {"data": {"train": 20, "test": 10}}},
        jobs=lambda sizes: [parts.Job("e", "a"), parts.Job("e", "b", {"bound": 0.5})],
        run=run,
        plot=lambda found, out: [],
        headline={"e": "score"},
    )
    threads, file = torch.get_num_threads(), tmp_path / "paper.jsonl"
    arguments = ["--seeds", "2", "--results", str(tmp_path)]
    program.main(arguments)
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    lines = file.read_text().splitlines()
    assert [json.loads(line)["results"]["lost"] for line in lines] == [None] * 4
    file.write_text("\n".join(lines[:3]) + "\n")
    assert len(program.main(arguments)) == 4
    assert ran[4:] == [("b", 1)]
    assert file.read_text().splitlines()[:3] == lines[:3]
    assert len(program.main(["plot", *arguments])) == 4
    torch.set_num_threads(threads)
    assert len(ran) == 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"rule": "operator", "bound": 0.5}, specops.ClipSpectralNorm(0.5)),
        ({"rule": "reshaped", "bound": 0.2}, specops.ClipSpectralNorm(0.2, norm="reshaped")),
        ({"rule": "one round", "bound": 0.5}, specops.ClipAndCut(0.5)),
    ],
)
def test_convolutions_have_the_rule_and_the_head_has_none(settings: Any, expected: Any) -> None:
    sedghi = load("sedghi")
    network = load("harness.networks").resnet(1, 10, depth=8, width=4, norm=True)
    plan = sedghi.rule_of(settings, network)
    if expected is None:
        assert plan is None
        return
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.zeros(2, 1, 8, 8))
    attachment = specops.attach(optimizer, network, plan)
    assert set(attachment.weights()) == set(load("harness.networks").convolutions(network))
    assert plan.entries[0][1] == expected
    attachment.detach()


def test_gradients_are_by_the_weights_in_use() -> None:
    """For a linear discriminator and hinge losses they do not depend on the weights."""
    adversarial, gan_networks = load("harness.adversarial"), load("harness.gan_networks")

    def make() -> Any:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1, bias=False))

    found = []
    for scale in (1e-3, 1e-2):
        torch.manual_seed(0)
        critic = make()
        torch.nn.init.normal_(critic[1].weight, std=5.0)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
        rule = specops.SpectralNormalization(norm="reshaped", scale=scale)
        attachment = specops.attach(optimizer, critic, rule)
        generator = gan_networks.small_generator((1, 8, 8), 10, 0.1)
        recipe = adversarial.Recipe(steps=1, latent=10)
        game = adversarial.Game(generator, critic, recipe, attachment)
        torch.manual_seed(1)
        x = torch.rand(16, 1, 8, 8)
        found.append(adversarial.gradients_by_weights_in_use(game, make, x)["1.weight"])
    assert math.isclose(*found, rel_tol=1e-4)
    assert found[0] > 0.1


@pytest.mark.parametrize("loss", ["hinge", "non-saturating", "wgan-gp"])
def test_conditional_networks_play_by_every_loss(loss: str) -> None:
    adversarial, gan_networks = load("harness.adversarial"), load("harness.gan_networks")
    shape, recipe = (1, 8, 8), adversarial.Recipe(steps=2, batch=8, latent=10, loss=loss, n_dis=2)
    torch.manual_seed(0)
    generator = gan_networks.ResidualGenerator(shape, 10, 3, width=0.02)
    before = generator.last.weight.detach().clone()
    game = adversarial.train(
        generator,
        gan_networks.ProjectionDiscriminator(shape, 3, width=0.25),
        torch.rand(20, *shape) * 2 - 1,
        recipe,
        labels=torch.arange(20) % 3,
        rule=specops.SpectralNormalization(norm="reshaped"),
    )
    assert game.attachment.steps == 4
    assert game.images(5).shape == (5, *shape)
    assert not torch.equal(before, generator.last.weight)


def test_results_are_generated_from_the_lines() -> None:
    """The committed table is that of the committed lines."""
    results = load("results")
    written = (PAPERS / "RESULTS.md").read_text(encoding="utf-8")
    assert results.document(results.RESULTS) == written


def test_a_claim_is_judged_by_its_records() -> None:
    results, claims = load("results"), load("claims")
    claim = claims.Claim("p", "table 1", "a is better", "e", claims.chain("score", "a", "b"))

    def records(seeds: int) -> list[dict[str, Any]]:
        return [
            {
                "experiment": "e", "label": label, "preset": "small", "data": "d", "seed": seed,
                "command": "c", "hardware": "h", "seconds": 30.0,
                "results": {"score": seed + (label == "a") + 0.01 * seed},
            }
            for label in "ab"
            for seed in range(seeds)
        ]  # fmt: skip

    (row,) = results.rows(claim, records(3))
    assert row[-1] == "**reproduced**"
    assert row[3] == "score: a 2.01 ± 0.6, b 1.01 ± 0.6"
    assert "3 seeds of each setting; h; 3.0 min" in row[2]
    assert results.rows(claim, records(2))[0][-1] == "**not run**"
    assert results.rows(claim, [])[0][-1] == "**not run**"
    assert json.dumps(records(1))


@pytest.mark.slow
def test_a_gan_draws_its_samples(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(PAPERS.parent), *sys.path])
        example = importlib.import_module("train_gan")
    threads, out = torch.get_num_threads(), tmp_path / "samples.png"
    game = example.main(["--quick", "--normalisation", "BSN", "--scale", "1.5", "--out", str(out)])
    torch.set_num_threads(threads)
    assert out.read_bytes().startswith(b"\x89PNG")
    for w in game.attachment.weights().values():
        norms = [float(specops.spectral_norm(m, specops.Dense())) for m in reshapings(w.detach())]
        assert math.isclose(sum(norms) / 2, 1.5, rel_tol=0.1)


def reshapings(w: Any) -> tuple[Any, Any]:
    """A kernel as the matrices (out, in·k) and (in, out·k)."""
    return w.flatten(1), w.transpose(0, 1).flatten(1)
