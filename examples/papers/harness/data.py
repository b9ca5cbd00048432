"""Images and labels: scikit-learn's digits, or .npz files of a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) in [0, 1] and their labels."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def describe(self) -> str:
        """What records say: the name, the size of an image, how many there are."""
        side = "×".join(map(str, self.shape[1:]))
        return f"{self.name} {side}, {len(self.x_train)} train, {len(self.x_test)} test"

    def standardised(self) -> Images:
        """Zero mean and unit variance of each channel of the training images."""
        mean = self.x_train.mean((0, 2, 3), keepdim=True)
        deviation = self.x_train.std((0, 2, 3), keepdim=True)
        return self._mapped(lambda x: (x - mean) / deviation)

    def symmetric(self) -> Images:
        """In [-1, 1], as generators with tanh make them."""
        return self._mapped(lambda x: 2 * x - 1)

    def centred(self) -> Images:
        """Zero mean of each channel of the training images; distances are those of the pixels."""
        mean = self.x_train.mean((0, 2, 3), keepdim=True)
        return self._mapped(lambda x: x - mean)

    def permuted_classes(self, seed: int) -> Images:
        """The same images, classes renamed at random."""
        generator = torch.Generator().manual_seed(seed)
        names = torch.randperm(self.classes, generator=generator).to(self.y_train.device)
        return replace(self, y_train=names[self.y_train], y_test=names[self.y_test])

    def randomly_labelled(self, seed: int) -> Images:
        """The same images, the labels of training drawn uniformly."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.classes, self.y_train.shape, generator=generator)
        return replace(self, y_train=drawn.to(self.y_train.device))

    def to(self, device: str) -> Images:
        return replace(
            self,
            **{k: getattr(self, k).to(device) for k in ("x_train", "y_train", "x_test", "y_test")},
        )

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Images:
        return replace(self, x_train=function(self.x_train), x_test=function(self.x_test))


def load(
    folder: Path | None, dataset: str, *, train: int = 0, test: int = 0, side: int = 0
) -> Images:
    """The first `train` and `test` images (0: all), pooled to `side` pixels (0: as they are).

    With a folder the data set is all files ``{dataset}*.npz`` in it, with arrays x_train, y_train,
    x_test, y_test of uint8 images (N, H, W) or (N, H, W, C) in any division.
    """
    found = _digits() if folder is None else _files(folder, dataset, train)
    pieces = []
    for part, count in (("train", train), ("test", test)):
        x, y = found[f"x_{part}"], found[f"y_{part}"]
        x, y = x[: count or None], torch.as_tensor(y[: count or None].astype(np.int64))
        images = torch.as_tensor(x.astype(np.float32))
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        if side and side != images.shape[-1]:
            images = adaptive_avg_pool2d(images, side)
        pieces += [images.contiguous(), y]
    top = 16.0 if folder is None else 255.0
    name = "digits" if folder is None else dataset
    return Images(name, pieces[0] / top, pieces[1], pieces[2] / top, pieces[3])


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    names = ("x_train", "x_test", "y_train", "y_test")
    split = train_test_split(
        digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return dict(zip(names, split, strict=True))


def _files(folder: Path, dataset: str, train: int) -> dict[str, np.ndarray]:
    """Reads no more files than it takes."""
    files = sorted(folder.glob(f"{dataset}*.npz"))
    if not files:
        raise SystemExit(f"--data: no file {dataset}*.npz in {folder}")
    parts: dict[str, list[np.ndarray]] = {}
    for file in files:
        with np.load(file) as arrays:
            for part in ("train", "test"):
                have = sum(map(len, parts.get(f"y_{part}", [])))
                if f"x_{part}" in arrays and not (part == "train" and train and have >= train):
                    for key in (f"x_{part}", f"y_{part}"):
                        parts.setdefault(key, []).append(arrays[key])
    missing = {"x_train", "y_train", "x_test", "y_test"} - set(parts)
    if missing:
        raise SystemExit(f"--data: no file {dataset}*.npz holds {', '.join(sorted(missing))}")
    return {key: np.concatenate(values) for key, values in parts.items()}
