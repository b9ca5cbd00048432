"""The papers' programs in little: resumed, scored by the stated criterion, by their own rules."""

from __future__ import annotations

import importlib
import json
import math
import re
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
PROGRAMS = sorted(p.stem for p in PAPERS.glob("*.py") if "PROGRAM.main()" in p.read_text("utf-8"))


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


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (148.3, 3, "148"),
        (14.2, 1, "10"),
        (0.0345, 1, "0.03"),
        (2500.0, 4, "2500"),
        (2e-7, 1, "2e-07"),
    ],
)
def test_numbers_are_rounded_without_powers_of_ten(value: float, digits: int, text: str) -> None:
    assert statistics.rounded(value, digits) == text


def test_a_setting_has_one_colour_in_all_panels() -> None:
    from specops import plots

    figures = load("harness.figures")
    axes = plots.singular_values({str(i): [1.0] for i in range(6)})
    assert [line.get_color() for line in axes.lines] == list(figures.COLORS[:6])
    figures.of_quantiles(axes, "layer")
    assert "60 quantiles" in axes.get_xlabel()


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


@pytest.mark.parametrize(("program", "key"), [("sanyal", "gan_networks"), ("lin", "networks")])
def test_programs_play_with_residual_networks_and_labels(program: str, key: str) -> None:
    module, parts = load(program), load("harness.program")
    sizes = {**module.PRESETS["quick"], key: "residual", "gan_width": 0.05, "width": 0.05}
    assert module.PRESETS["quick"][key] == "small"
    data = module.PROGRAM.load(None, "digits", **sizes["data"])
    (job,) = [j for j in module.jobs(sizes) if j.label in ("SRN-50", "BSN")]
    found = module.run(job, parts.Context(data, sizes, 0, "cpu", lambda share: None))
    scores = {k: v for k, v in found.items() if isinstance(v, float)}
    assert {"fid", "inception_score"} <= set(scores)
    assert all(map(math.isfinite, scores.values())), scores


def test_results_are_generated_from_the_lines() -> None:
    """The committed table, and the README's summary of it, are those of the committed lines."""
    results = load("results")
    written = (PAPERS / "RESULTS.md").read_text(encoding="utf-8")
    assert results.document(results.RESULTS) == written
    readme = (PAPERS.parents[1] / "README.md").read_text(encoding="utf-8")
    lines = results.summary(results.RESULTS)
    assert len(lines) == 5
    assert "\n".join(lines) in readme
    stale = readme.replace(lines[-1], "- Beyond the four: 99 not run")
    assert results.renewed(stale, lines) == readme


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


def test_a_figure_is_compared_with_a_number_or_another() -> None:
    comparisons = load("harness.comparisons")
    runs = {"a": [{"seed": s, "results": {"x": x, "y": 1.0}} for s, x in enumerate((3, None, 5))]}
    assert comparisons.Threshold("a", "x", 4).differences(runs) == [-1, 1]
    assert comparisons.Threshold("a", "x", 4, above=False).differences(runs) == [1, -1]
    assert comparisons.Comparison("a", "a", "x", "y", factor=2).differences(runs) == [1, 3]


def test_an_average_is_as_far_off_as_its_vectors_are_short() -> None:
    averages, networks = load("averages"), load("harness.networks")
    torch.manual_seed(0)
    x, y = torch.randn(5, 1, 2, 2), torch.arange(5) % 3
    average, exact = (networks.residual_mlp((1, 2, 2), 3, width=4, depth=4) for _ in range(2))
    for layer in averages.linear_layers(average).values():
        torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=200)
    average(x)  # in training: finds the vectors
    found = averages.compared(average, exact, x, y)
    assert found["error"] < 1e-5
    assert math.isclose(found["largest_norm"], 1.0, rel_tol=1e-5)
    for name, vector in average.named_buffers():
        if name.endswith("_u"):
            vector.mul_(0.5)
    found = averages.compared(average, exact, x, y)
    assert math.isclose(found["largest_norm"], 2.0, rel_tol=1e-5)
    assert found["error"] > 1


def test_an_alarm_is_early_by_the_steps_to_the_rise() -> None:
    warning = load("early_warning")

    def curve(*points: tuple[float, float, float]) -> list[dict[str, float]]:
        names = ("loss", "rank", "gradient")
        return [
            dict(zip(("step", *names), (10 * n, *p), strict=True)) for n, p in enumerate(points, 1)
        ]

    calm = [(2.0, 0.9, 1.0), (1.0, 0.8, 0.5)]
    found = warning.alarms(curve(*calm, (1.05, 0.2, 1.4), (1.2, 0.3, 1.6)), steps=40)
    assert (found["rise"], found["rank_lead"], found["gradient_lead"]) == (40, 10, 0)
    found = warning.alarms(curve(*calm, (1.2, 0.6, 0.6)), steps=40)
    assert (found["rank_alarm"], found["rank_lead"]) == (0.0, 30 - 41)
    found = warning.alarms(curve(*calm), steps=40)
    assert (found["loss_rose"], found["rank_lead"]) == (0.0, None)


def test_runs_without_a_headline_have_a_row_all_the_same() -> None:
    program = load("early_warning").PROGRAM
    (experiment,) = program.headline
    runs = [{"experiment": experiment, "label": label, "results": {}} for label in ("a", "b")]
    table = program._table(runs)
    assert [list(column.cells) for column in table.columns][1:4:2] == [["a", "b"], ["–", "–"]]


def test_a_text_is_numbered_and_cut(tmp_path: Path) -> None:
    text = load("harness.text")
    (tmp_path / "book1.txt").write_text("abcabcabca")
    (tmp_path / "book2.txt").write_text("zzz")
    words = text.load(tmp_path, "book", characters=10)
    assert words.describe() == "book 9 train, 1 test characters"
    x, y = words.windows("train", 4, 5, seed=0)
    assert x.shape == y.shape == (4, 5)
    assert torch.equal((x + 1) % 3, y)
    assert torch.equal(words.windows("train", 4, 5, seed=0)[0], x)
    with pytest.raises(SystemExit, match=r"no file other\*\.txt"):
        text.load(tmp_path, "other")


def test_classes_are_renamed_alike_for_training_and_testing() -> None:
    data = load("harness.data")
    labels = torch.arange(12) % 4
    images = data.Images("images", torch.rand(12, 1, 2, 2), labels, torch.rand(12, 1, 2, 2), labels)
    renamed = images.permuted_classes(1)
    assert torch.equal(renamed.y_train, renamed.y_test)
    assert not torch.equal(renamed.y_train, labels)
    assert sorted(set(zip(labels.tolist(), renamed.y_train.tolist(), strict=True))) == sorted(
        zip(range(4), renamed.y_train[:4].tolist(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_print_and_draw(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("sanyal", "lin"):
        pytest.importorskip("torchmetrics")
    threads, program = torch.get_num_threads(), load(name).PROGRAM
    found = program.main(["--quick", "--results", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert len(found) == len(program.jobs(program.presets["quick"])) > 1
    assert f"{name}: {len(found)} runs left" in printed
    assert all(program.headline[r["experiment"]] in r["results"] for r in found)
    figures = [Path(figure) for figure in re.findall(r"figure: (.*)", printed)]
    assert sorted(figures) == sorted(tmp_path.glob("*.png")) != []
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


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
