"""Scores of generative models: Inception score and FID by torchmetrics, neural divergence."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specops.errors import AdapterError
from specops.geometry.arguments import check_bound, integer
from specops_torch.evaluation import evaluating


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits.

    Attributes
    ----------
    mean, deviation : float
        Of the scores, which lie between 1 and the number of classes; no deviation (NaN) of a
        single split.
    """

    mean: float
    deviation: float


def inception_score(
    images: Iterable[Tensor], classifier: nn.Module, *, splits: int = 10, seed: int = 0
) -> InceptionScore:
    r"""The Inception score of generated images under any classifier.

    .. math:: \exp E_x\,KL(p(y\mid x)\,\|\,p(y))

    High where images are classified surely and all classes occur. It does not see whether
    images of a class differ, nor memorised ones, and only scores of one classifier compare.

    Parameters
    ----------
    images : iterable of tensor
        Batches.
    classifier : torch.nn.Module
        Batch → logits (n, classes), in evaluation; the published figures are Inception-v3's.
    splits : int
        Parts that the images, in random order, are divided into.
    seed : int
        Of the order.

    Raises
    ------
    AdapterError
        torchmetrics is missing, or there are fewer images than splits.

    References
    ----------
    Salimans et al. 2016.
    """
    splits = integer(splits, "splits", least=1)
    kind = _metric("inception", "InceptionScore")
    with warnings.catch_warnings():
        # That it keeps all logits is known, and they are few.
        warnings.simplefilter("ignore", UserWarning)
        metric = kind(feature=_LogProbabilities(classifier), splits=splits)
    count = _fill(metric, images)
    if not count or -(-count // -(-count // splits)) != splits:
        raise AdapterError(
            f"{count} images cannot be divided into {splits} splits: give a multiple of it"
        )
    with _seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a single split's deviation
        mean, deviation = metric.compute()
    return InceptionScore(float(mean), float(deviation))


def frechet_inception_distance(
    real: Iterable[Tensor], generated: Iterable[Tensor], extractor: nn.Module
) -> float:
    r"""The Fréchet distance between features of real and generated images.

    .. math:: \|\mu_r - \mu_g\|^2
              + \mathrm{tr}\bigl(\Sigma_r + \Sigma_g - 2(\Sigma_r\Sigma_g)^{1/2}\bigr)

    Small where first and second moments agree. Biased for few samples: compare at equal
    numbers, several times the number of features. It does not see memorised images.

    Parameters
    ----------
    real, generated : iterable of tensor
        Batches.
    extractor : torch.nn.Module
        Batch → features (n, d), in evaluation; the published figures are Inception-v3's.

    Raises
    ------
    AdapterError
        torchmetrics is missing, or there are fewer than two images of a kind.

    References
    ----------
    Heusel et al. 2017.
    """
    real, generated = list(real), list(generated)
    if min(sum(map(len, real)), sum(map(len, generated))) < 2:
        raise AdapterError("covariances need two images or more of each kind")
    kind = _metric("fid", "FrechetInceptionDistance")
    metric = kind(feature=_Features(extractor, real[0]), normalize=True)
    for batches, is_real in ((real, True), (generated, False)):
        _fill(metric, batches, real=is_real)
    return float(metric.compute())


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
    at most, negative where it has learnt by heart. Held-out real data make memorised samples
    visible. It is a lower bound of twice the Jensen–Shannon divergence, as good as the critic.

    Parameters
    ----------
    make_critic : callable
        Makes an untrained module, batch → (n,) or (n, 1).
    real, generated : tensor (n, ...)
        Samples; real ones the generator was *not* trained on.
    steps, batch_size, learning_rate
        Of training, by Adam; each batch has so many of both kinds.
    held_out : float
        Share of both that the critic is judged on, in (0, 1).
    seed : int
        Of the critic's weights, the division and the batches.

    Raises
    ------
    ValueError
        A share outside (0, 1), or a count below 1.
    AdapterError
        Too few samples for both parts.

    References
    ----------
    Gulrajani, Raffel & Metz 2019, with the logistic in place of the Wasserstein loss, so that
    the value is bounded and zero means equality.
    """
    steps, batch_size = integer(steps, "steps", least=1), integer(batch_size, "batch_size", least=1)
    learning_rate = check_bound(learning_rate, "learning_rate")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out!r}")
    with _seeded(seed), torch.enable_grad():
        critic = make_critic().to(real.device).train()
        parts = [_divided(x, held_out) for x in (real, generated)]
        optimizer = torch.optim.Adam(critic.parameters(), lr=learning_rate)
        for _ in range(steps):
            batches = [x[torch.randint(len(x), (batch_size,))] for x, _ in parts]
            optimizer.zero_grad()
            (-_told_apart(critic, *batches)).backward()
            optimizer.step()
        with torch.no_grad():
            return float(_told_apart(critic.eval(), *(x for _, x in parts)))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A seed whose generators, those of devices too, are put back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _told_apart(critic: nn.Module, real: Tensor, generated: Tensor) -> Tensor:
    log_sigmoid = nn.functional.logsigmoid
    told = [critic(x) for x in (real, generated)]
    for x, score in zip((real, generated), told, strict=True):
        if score.numel() != len(x):
            raise AdapterError(
                f"a critic gives one number for each sample: got {tuple(score.shape)} for {len(x)}"
            )
    value = log_sigmoid(told[0]).mean() + log_sigmoid(-told[1]).mean()
    return value + 2.0 * torch.log(torch.tensor(2.0))


def _divided(x: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    count = round(len(x) * held_out)
    if not 0 < count < len(x):
        raise AdapterError(f"{len(x)} samples are too few: held_out={held_out} leaves a part empty")
    order = torch.randperm(len(x))
    return x[order[count:]], x[order[:count]]


class _Features(nn.Module):
    """A classifier or extractor in evaluation, without gradients, as torchmetrics calls it."""

    def __init__(self, module: nn.Module, sample: Tensor | None = None) -> None:
        super().__init__()
        self._held = [module]  # not a submodule: moving the metric must not move it
        if sample is not None:
            # Or torchmetrics asks with an image of Inception's size.
            self.num_features = int(self(sample[:1]).shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self._held
        with evaluating(module), torch.no_grad():
            result: Tensor = module(x)
        if result.ndim != 2:
            raise AdapterError(
                f"expected (n, features), got {tuple(result.shape)} from "
                f"{type(module).__name__}: flatten its output"
            )
        return result


class _LogProbabilities(_Features):
    """Logits whose probabilities stay above zero, of which torchmetrics takes the logarithm.

    By less than rounding: by the root of the least normal number.
    """

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if not logits.dtype.is_floating_point or logits.dtype.itemsize < 4:
            logits = logits.float()
        least = 0.5 * math.log(torch.finfo(logits.dtype).tiny)
        return logits.log_softmax(dim=1).clamp_min(least)


def _metric(module: str, name: str) -> Any:
    try:
        from importlib import import_module

        return getattr(import_module(f"torchmetrics.image.{module}"), name)
    except ImportError as error:
        raise AdapterError(
            f"{name} is torchmetrics': pip install 'specops[generative]' ({error})"
        ) from error


def _fill(metric: Any, batches: Iterable[Tensor], **options: Any) -> int:
    count = 0
    for batch in batches:
        metric.to(batch.device).update(batch, **options)
        count += len(batch)
    return count
