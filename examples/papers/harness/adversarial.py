"""Training a generator against a discriminator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

import specops
from specops import measures

from .gan_networks import Make


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam, `n_dis` steps of the discriminator to one of the generator."""

    steps: int
    """Of the generator."""
    batch: int = 64
    latent: int = 100
    rate_g: float = 2e-4
    rate_d: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    n_dis: int = 1
    loss: str = "hinge"
    """Or "non-saturating", or "wgan-gp"."""
    gradient_penalty: float = 10.0
    """Its weight in wgan-gp."""
    measure_every: int = 100


@dataclass
class Game:
    """Both networks, in training or after it."""

    generator: nn.Module
    discriminator: nn.Module
    recipe: Recipe
    attachment: Any = None
    classes: int = 0
    """Of conditional networks, which take a label as their second argument; else 0."""

    def sample(self, count: int, seed: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Generated images and their labels, in the generator's own mode."""
        device = next(self.generator.parameters()).device
        random = None if seed is None else torch.Generator().manual_seed(seed)
        z = 2 * torch.rand(count, self.recipe.latent, generator=random) - 1
        y: tuple[Tensor, ...] = ()
        if self.classes:
            y = (torch.randint(self.classes, (count,), generator=random).to(device),)
        return self.generator(z.to(device), *y), y

    @torch.no_grad()
    def images_and_labels(self, count: int, seed: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `sample`, in evaluation."""
        self.generator.eval()
        found = self.sample(count, seed)
        self.generator.train()
        return found

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Generated images alone, in evaluation."""
        return self.images_and_labels(count, seed)[0]


def train(
    generator: nn.Module,
    discriminator: nn.Module,
    x: Tensor,
    recipe: Recipe,
    *,
    labels: Tensor | None = None,
    rule: Any = None,
    seed: int = 0,
    tick: Callable[[float], None] = lambda share: None,
    observe: Callable[[int, Game], None] = lambda step, game: None,
) -> Game:
    """Train on images in [-1, 1]; `observe` sees the game each `measure_every` steps.

    The rule is the discriminator's. With labels both networks take one.
    """
    torch.manual_seed(seed)
    given = () if labels is None else (labels[:2],)
    with torch.no_grad():
        discriminator(x[:2], *given)  # layers learn the size of their inputs
    classes = 0 if labels is None else int(labels.max()) + 1
    adam = {"betas": recipe.betas}
    step_d = torch.optim.Adam(discriminator.parameters(), recipe.rate_d, **adam)
    step_g = torch.optim.Adam(generator.parameters(), recipe.rate_g, **adam)
    attachment = None if rule is None else specops.attach(step_d, discriminator, rule)
    game = Game(generator, discriminator, recipe, attachment, classes)
    for step in range(1, recipe.steps + 1):
        for _ in range(recipe.n_dis):
            chosen = torch.randint(len(x), (recipe.batch,)).to(x.device)
            real_y = () if labels is None else (labels[chosen],)
            with torch.no_grad():
                fake, fake_y = game.sample(recipe.batch)
            loss = discriminator_loss(discriminator, recipe, x[chosen], real_y, fake, fake_y)
            step_d.zero_grad()
            loss.backward()
            step_d.step()
        fake, fake_y = game.sample(recipe.batch)
        score = discriminator(fake, *fake_y)
        loss = (softplus(-score) if recipe.loss == "non-saturating" else -score).mean()
        step_g.zero_grad()
        loss.backward()
        step_g.step()
        if step % 10 == 0 or step == recipe.steps:
            tick(step / recipe.steps)
        if step % recipe.measure_every == 0 or step == recipe.steps:
            observe(step, game)
    return game


def discriminator_loss(
    discriminator: nn.Module,
    recipe: Recipe,
    real: Tensor,
    real_y: tuple[Tensor, ...],
    fake: Tensor,
    fake_y: tuple[Tensor, ...],
) -> Tensor:
    """What the discriminator minimises."""
    on_real, on_fake = discriminator(real, *real_y), discriminator(fake, *fake_y)
    if recipe.loss == "hinge":
        return relu(1 - on_real).mean() + relu(1 + on_fake).mean()
    if recipe.loss == "non-saturating":
        return softplus(-on_real).mean() + softplus(on_fake).mean()
    if recipe.loss != "wgan-gp":
        raise ValueError(f"no loss {recipe.loss!r}: hinge, non-saturating or wgan-gp")
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(
        discriminator(between, *real_y).sum(), between, create_graph=True
    )
    excess = slope.flatten(1).norm(dim=1) - 1
    return on_fake.mean() - on_real.mean() + recipe.gradient_penalty * excess.square().mean()


def gradients_by_weights_in_use(
    game: Game, make: Make, x: Tensor, labels: Tensor | None = None
) -> dict[str, float]:
    """Norms of the discriminator loss's gradients, layer by layer, by the weights in use.

    `make` gives an untrained network of the discriminator's kind, which takes those weights.
    """
    copy = make().to(x.device)
    state = dict(game.discriminator.state_dict())
    if game.attachment is not None:
        state |= {name: w.detach() for name, w in game.attachment.weights().items()}
    copy.load_state_dict(state)
    with torch.no_grad():
        fake, fake_y = game.sample(len(x))
    real_y = () if labels is None else (labels,)
    discriminator_loss(copy, game.recipe, x, real_y, fake, fake_y).backward()
    return measures.gradient_norms({n: p.grad for n, p in copy.named_parameters() if p.ndim > 1})


def parameter_variances(game: Game) -> float:
    """The product over layers of the variance of the entries of the weights in use."""
    weights = dict(game.discriminator.named_parameters())
    if game.attachment is not None:
        weights |= game.attachment.weights()
    variances = [w.detach().var() for w in weights.values() if w.ndim > 1]
    return float(torch.stack(variances).log().sum())
