"""Inception score and Fréchet distance by a classifier that is trained here.

The published figures are of Inception-v3's weights, which are not at hand: the classifier is the
VGG-like network of `networks`, trained on the same images, and only figures of the same data
and preset compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import specops_torch

from . import classify, networks
from .data import Images


@dataclass(frozen=True)
class Judge:
    """The classifier, and its features before the last layer."""

    classifier: nn.Module
    features: nn.Module
    accuracy: float
    real: Tensor
    """Test images that the classifier was not trained on, in [-1, 1]."""

    def score(self, generated: Tensor) -> dict[str, float]:
        """Of images in [-1, 1]."""
        inception = specops_torch.inception_score(generated.split(250), self.classifier, splits=2)
        count = min(len(self.real), len(generated))
        distance = specops_torch.frechet_inception_distance(
            self.real[:count].split(250), generated[:count].split(250), self.features
        )
        return {"inception_score": inception.mean, "fid": distance}


def judge_of(images: Images, width: int, epochs: int) -> Judge:
    """The same one for all runs of a program on these images."""
    key = (images.name, tuple(images.x_train.shape), str(images.x_train.device), width, epochs)
    _waiting[key] = images
    return _judge(key)


_waiting: dict[tuple[object, ...], Images] = {}


@cache
def _judge(key: tuple[object, ...]) -> Judge:
    images, (*_, width, epochs) = _waiting.pop(key).symmetric(), key
    torch.manual_seed(0)
    network = networks.vgg(images.shape[0], images.classes, width=width).to(images.x_train.device)
    recipe = classify.Recipe(epochs=epochs, rate=0.05, decay=5e-4, measure_every=epochs)
    trained = classify.train(network, images, recipe)
    return Judge(network, network[:-1], trained.last["test_accuracy"], images.x_test)
