"""Scores of generative models by torchmetrics: Inception score and Fréchet distances."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specops.errors import AdapterError
from specops.geometry.arguments import integer
from specops_torch.evaluation import evaluating, seeded


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the Inception score over the splits.

    Attributes
    ----------
    mean, deviation : float
        Mean and deviation of the scores, which lie between 1 and the number of classes; the
        deviation is NaN for a single split.
    """

    mean: float
    deviation: float


def inception_score(
    images: Iterable[Tensor], classifier: nn.Module, *, splits: int = 10, seed: int = 0
) -> InceptionScore:
    r"""The Inception score of generated images under any classifier.

    .. math:: \exp E_x\,KL(p(y\mid x)\,\|\,p(y))

    It is high if images are classified with confidence and all classes occur. It detects neither
    that images of a class are all alike nor that images are memorised, and only scores from the
    same classifier can be compared.

    Parameters
    ----------
    images : iterable of tensor
        Batches of images.
    classifier : torch.nn.Module
        Maps a batch to logits (n, classes), in evaluation mode; the published figures are
        Inception-v3's.
    splits : int
        Number of parts into which the images are divided, in random order.
    seed : int
        Seed of that order.

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
        # It warns that it keeps all logits in memory; they are few.
        warnings.simplefilter("ignore", UserWarning)
        metric = kind(feature=_LogProbabilities(classifier), splits=splits)
    count = _fill(metric, images)
    if not count or -(-count // -(-count // splits)) != splits:
        raise AdapterError(
            f"{count} images cannot be divided into {splits} splits: give a multiple of it"
        )
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single split has no deviation
        mean, deviation = metric.compute()
    return InceptionScore(float(mean), float(deviation))


def frechet_inception_distance(
    real: Iterable[Tensor], generated: Iterable[Tensor], extractor: nn.Module
) -> float:
    r"""The Fréchet distance between features of real and generated images.

    .. math:: \|\mu_r - \mu_g\|^2
              + \mathrm{tr}\bigl(\Sigma_r + \Sigma_g - 2(\Sigma_r\Sigma_g)^{1/2}\bigr)

    It is small if the means and covariances of the features agree. It is biased for few samples:
    compare at equal numbers, several times the number of features. It does not detect memorised
    images.

    Parameters
    ----------
    real, generated : iterable of tensor
        Batches of images.
    extractor : torch.nn.Module
        Maps a batch to features (n, d), in evaluation mode; the published figures are
        Inception-v3's.

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


class IntraClassFID(NamedTuple):
    """Fréchet distances of a conditional generator.

    Attributes
    ----------
    mean : float
        The mean over the classes, called Intra-FID.
    classes : dict of class to float
        The Fréchet distance within each class.
    """

    mean: float
    classes: dict[Any, float]


def intra_class_fid(
    real: Mapping[Any, Iterable[Tensor]],
    generated: Mapping[Any, Iterable[Tensor]],
    extractor: nn.Module,
) -> IntraClassFID:
    r"""The mean over the classes of the Fréchet distance within each.

    .. math:: \frac1{|C|}\sum_{c\in C} FID(G, c)

    Unlike the distance of all images together it detects images of a wrong class, and classes
    whose images are all alike. Otherwise `frechet_inception_distance` describes its properties;
    each class has far fewer images to estimate a covariance from.

    Parameters
    ----------
    real, generated : mapping of class to iterable of tensor
        Batches of each class, of the same classes.
    extractor : torch.nn.Module
        Maps a batch to features (n, d), in evaluation mode.

    Returns
    -------
    IntraClassFID

    Raises
    ------
    AdapterError
        The two mappings have different classes, or none; a class has fewer than two images; or
        torchmetrics is missing.

    References
    ----------
    Miyato & Koyama 2018; Sanyal, Torr & Dokania 2020, appendix E.1.
    """
    if not real and not generated:
        raise AdapterError("there are no classes")
    if set(real) != set(generated):
        missing = sorted(map(repr, set(real) ^ set(generated)))
        raise AdapterError(f"expected the same classes of both, missing: {', '.join(missing)}")
    found = {}
    for label in real:
        try:
            found[label] = frechet_inception_distance(real[label], generated[label], extractor)
        except AdapterError as error:
            raise AdapterError(f"class {label!r}: {error}") from error
    return IntraClassFID(sum(found.values()) / len(found), found)


class _Features(nn.Module):
    """A classifier or extractor in evaluation, without gradients, as torchmetrics calls it."""

    def __init__(self, module: nn.Module, sample: Tensor | None = None) -> None:
        super().__init__()
        self._held = [module]  # not a submodule: moving the metric must not move it
        if sample is not None:
            # Without it torchmetrics would call the module with an image of Inception's size.
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
    """Logits whose probabilities stay above zero, because torchmetrics takes their logarithm.

    The least probability is the square root of the least normal number, far below rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if not logits.dtype.is_floating_point or logits.dtype.itemsize < 4:
            logits = logits.float()
        least = 0.5 * math.log(torch.finfo(logits.dtype).tiny)
        return logits.log_softmax(dim=1).clamp_min(least)


def _metric(module: str, name: str) -> Any:
    try:
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
