"""Train a GAN on handwritten digits in a minute, its discriminator spectrally normalised or not.

    python examples/train_gan.py
    python examples/train_gan.py --normalisation BSN --scale 1.4
    python examples/train_gan.py --normalisation none

The switch is the rule that one call of `specops.attach` is given. Prints the Fréchet distance to
real digits, by the features of a small classifier that is trained first, and draws samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from papers.harness import adversarial, gan_networks, scores
from papers.harness.data import load
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import specops
from specops import plots

RULES = {
    "none": lambda scale: None,
    "SN": lambda scale: specops.SpectralNormalization(norm="reshaped", scale=scale),
    "SN_conv": lambda scale: specops.SpectralNormalization(norm="operator", scale=scale),
    "BSN": lambda scale: specops.SpectralNormalization(norm="bidirectional", scale=scale),
    "SRN": lambda scale: specops.StableRankNormalization(0.7, norm="reshaped"),
}


def draw(images: torch.Tensor, title: str, out: Path) -> Path:
    """A square of images in [-1, 1]."""
    side = int(len(images) ** 0.5)
    n = images.shape[-1]
    grid = images[: side * side, 0].reshape(side, side, n, n)
    grid = torch.nn.functional.pad(grid, (0, 1, 0, 1), value=-1.0)
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid.permute(0, 2, 1, 3).reshape(side * (n + 1), -1).numpy(), cmap="gray_r")
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)
    return plots.save(figure, out)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--normalisation", choices=RULES, default="SN", help="of the discriminator")
    parser.add_argument("--scale", type=float, default=1.0, help="its norm; SRN has none")
    parser.add_argument("--steps", type=int, default=1500, help="of the generator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="seconds, and no digits yet")
    parser.add_argument("--out", type=Path, default=Path("generated_digits.png"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps = 20
    if options.steps < 1 or not 0 < options.scale < float("inf"):
        parser.error("--steps must be at least 1, --scale positive and finite")
    return options


def main(arguments: list[str] | None = None) -> adversarial.Game:
    """Train, score, draw."""
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    console, images = Console(), load(None, "digits")
    with console.status("training the classifier that judges"):
        judge = scores.judge_of(images, width=8, epochs=1 if options.quick else 10)
    real = images.symmetric()
    recipe = adversarial.Recipe(steps=options.steps, rate_g=1e-3, rate_d=1e-3)
    generator = gan_networks.small_generator(real.shape, recipe.latent, 0.25)
    discriminator = gan_networks.small_discriminator(real.shape, 0.25)
    rule = RULES[options.normalisation](options.scale)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(options.normalisation, total=1.0)
        game = adversarial.train(
            generator,
            discriminator,
            real.x_train,
            recipe,
            rule=rule,
            seed=options.seed,
            tick=lambda share: progress.update(task, completed=share),
        )
    found = judge.score(game.images(400))
    title = f"{options.normalisation}: Fréchet distance {found['fid']:.1f}"
    console.print(
        f"{title}, Inception score {found['inception_score']:.2f} (own classifier, "
        f"{judge.accuracy:.1%} right on real digits)\nsamples: "
        f"{draw(game.images(64, seed=1), title, options.out)}",
        highlight=False,
    )
    return game


if __name__ == "__main__":
    main()
