"""How well a fresh critic detects generated samples: two losses that papers call by one name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from specops.errors import AdapterError
from specops.geometry.arguments import check_bound, integer
from specops_torch.evaluation import seeded

_AT_ONCE = 1000
"""Generated samples per batch of the critic: a choice, which limits memory."""


def neural_divergence(
    make_critic: Callable[[], nn.Module],
    real: Tensor,
    generated: Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    held_out: float = 0.5,
    seed: int = 0,
) -> float:
    r"""How well a fresh critic tells generated samples from real ones that it has not seen.

    A critic f is trained on one part of both sets, and the value on the other part of

    .. math:: E_{real}\log s(f(x)) + E_{gen}\log(1 - s(f(x))) + 2\log 2,

    s the logistic function, is returned: about 0 where it cannot tell them apart, 2 log 2 ≈ 1.386
    at most, negative where it has overfitted. Held-out real data make memorised samples visible.
    It is a lower bound of twice the Jensen–Shannon divergence, as tight as the critic is good.

    Parameters
    ----------
    make_critic : callable
        Makes an untrained module that maps a batch to an output of shape (n,) or (n, 1).
    real, generated : tensor (n, ...)
        Samples; real ones the generator was *not* trained on.
    steps, batch_size, learning_rate
        Settings of the training by Adam; a batch has `batch_size` samples of each kind.
    held_out : float
        Fraction of both sets that the critic is evaluated on, in (0, 1).
    seed : int
        Seed of the critic's weights, of the division into parts and of the batches.

    Raises
    ------
    ValueError
        `held_out` is outside (0, 1), or a count is below 1.
    AdapterError
        There are too few samples for two parts.

    See Also
    --------
    neural_discriminator_loss : The different number that Sanyal et al. call neural divergence.

    References
    ----------
    Gulrajani, Raffel & Metz 2019, with the logistic in place of the Wasserstein loss, so that
    the value is bounded and zero means equality.
    """
    steps, batch_size = integer(steps, "steps", least=1), integer(batch_size, "batch_size", least=1)
    learning_rate = check_bound(learning_rate, "learning_rate")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out!r}")
    with seeded(seed), torch.enable_grad():
        critic = make_critic().to(real.device).train()
        parts = [_divided(x, held_out) for x in (real, generated.to(real))]
        optimizer = torch.optim.Adam(critic.parameters(), lr=learning_rate)
        for _ in range(steps):
            batches = [x[torch.randint(len(x), (batch_size,))] for x, _ in parts]
            optimizer.zero_grad()
            (-_told_apart(critic, *batches)).backward()
            optimizer.step()
        with torch.no_grad():
            return float(_told_apart(critic.eval(), *(x for _, x in parts)))


def neural_discriminator_loss(
    real: Tensor,
    generated: Tensor | Callable[[int], Tensor],
    *,
    make_critic: Callable[[], nn.Module] | None = None,
    steps: int = 100_000,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    betas: tuple[float, float] = (0.0, 0.9),
    samples: int = 1_000_000,
    seed: int = 0,
) -> float:
    r"""The loss of generated samples under a fresh critic: the neural divergence of Sanyal et al.

    A critic f is trained to tell both sets apart by

    .. math:: E_{gen}\log(1 + e^{f(x)}) + E_{real}\log(1 + e^{-f(x)}),

    and the first term, over generated samples, is returned. *Higher* means a better generator:
    log 2 ≈ 0.69 where f stays at zero, and without a bound where f takes generated samples for
    real ones. It compares generators under one critic and training; it is no distance.

    Parameters
    ----------
    real : tensor (n, ...)
        Samples, of the test set in the paper.
    generated : tensor (m, ...) or callable
        Samples, or, as in the paper, a callable that takes a number and gives so many new ones.
    make_critic : callable, optional
        Makes an untrained module that maps a batch to an output of shape (n,) or (n, 1). None
        makes the paper's, for images (n, channels, height, width): convolutions 5×5 of stride 2
        with 16, 32 and 64 channels, each followed by swish, and a linear layer, all with weights
        drawn from N(0, 0.02²).
    steps, batch_size, learning_rate, betas
        Settings of the training by Adam; a batch has `batch_size` samples of each kind. The
        defaults are the paper's.
    samples : int
        How many new samples the callable is evaluated on; of a tensor all samples are.
    seed : int
        Seed of the critic's weights and the batches. It does not affect what a callable draws.

    Raises
    ------
    ValueError
        A count is below 1, or the learning rate is not positive.
    AdapterError
        There are no samples, or the critic gives more than one number for a sample.

    See Also
    --------
    neural_divergence : Evaluated on held-out samples, and zero for equal distributions.

    References
    ----------
    Sanyal, Torr & Dokania 2020, appendix E.1 and table 4.
    """
    steps, batch_size = integer(steps, "steps", least=1), integer(batch_size, "batch_size", least=1)
    samples = integer(samples, "samples", least=1)
    learning_rate = check_bound(learning_rate, "learning_rate")
    if not len(real) or (isinstance(generated, Tensor) and not len(generated)):
        raise AdapterError("there are no samples of one kind")

    def draw(count: int) -> Tensor:
        if isinstance(generated, Tensor):
            return generated[torch.randint(len(generated), (count,))].to(real)
        with torch.no_grad():
            return generated(count).to(real)

    with seeded(seed), torch.enable_grad():
        critic = _critic_of_sanyal(real) if make_critic is None else make_critic()
        critic = critic.to(real.device).train()
        optimizer = torch.optim.Adam(critic.parameters(), lr=learning_rate, betas=betas)
        for _ in range(steps):
            true = real[torch.randint(len(real), (batch_size,))]
            fake = draw(batch_size)
            optimizer.zero_grad()
            loss = softplus(_scores(critic, fake)).mean() + softplus(-_scores(critic, true)).mean()
            loss.backward()
            optimizer.step()
        critic.eval()
        count = len(generated) if isinstance(generated, Tensor) else samples
        total = 0.0
        with torch.no_grad():
            for at in range(0, count, _AT_ONCE):
                size = min(_AT_ONCE, count - at)
                if isinstance(generated, Tensor):
                    batch = generated[at : at + size].to(real)
                else:
                    batch = draw(size)
                total += float(softplus(_scores(critic, batch)).double().sum())
    return total / count


def _critic_of_sanyal(images: Tensor) -> nn.Module:
    if images.ndim != 4:
        raise AdapterError(
            f"the paper's critic is for images (n, channels, height, width), got "
            f"{tuple(images.shape)}: pass make_critic"
        )
    layers: list[nn.Module] = []
    channels = int(images.shape[1])
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.SiLU()]
        channels = width
    height, breadth = (-(-int(n) // 8) for n in images.shape[2:])
    layers += [nn.Flatten(), nn.Linear(channels * height * breadth, 1)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _scores(critic: nn.Module, x: Tensor) -> Tensor:
    scores: Tensor = critic(x)
    if scores.numel() != len(x):
        raise AdapterError(
            f"a critic gives one number for each sample: got {tuple(scores.shape)} for {len(x)}"
        )
    return scores


def _told_apart(critic: nn.Module, real: Tensor, generated: Tensor) -> Tensor:
    value = (
        logsigmoid(_scores(critic, real)).mean() + logsigmoid(-_scores(critic, generated)).mean()
    )
    return value + 2.0 * torch.log(torch.tensor(2.0))


def _divided(x: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    count = round(len(x) * held_out)
    if not 0 < count < len(x):
        raise AdapterError(f"{len(x)} samples are too few: held_out={held_out} leaves a part empty")
    order = torch.randperm(len(x))
    return x[order[count:]], x[order[:count]]
