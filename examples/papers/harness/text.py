"""Characters: scikit-learn's descriptions of its data sets, or .txt files of a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """A text as numbers, one for each character."""

    name: str
    symbols: str
    train: Tensor
    test: Tensor

    def describe(self) -> str:
        """What records say: the name, how many characters."""
        return f"{self.name} {len(self.train)} train, {len(self.test)} test characters"

    def to(self, device: str) -> Text:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def windows(self, part: str, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Pieces of the training or test text, and the same one character on."""
        codes = getattr(self, part)
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(codes) - length, (count, 1), generator=generator)
        places = (starts + torch.arange(length)).to(codes.device)
        return codes[places], codes[places + 1]


def load(folder: Path | None, dataset: str, *, characters: int = 0) -> Text:
    """The first `characters` (0: all), the last tenth of them for testing.

    With a folder the text is all files ``{dataset}*.txt`` in it, in the order of their names.
    """
    text = _descriptions() if folder is None else _files(folder, dataset)
    text = text[: characters or None]
    symbols = "".join(sorted(set(text)))
    number = {symbol: place for place, symbol in enumerate(symbols)}
    codes = torch.tensor([number[symbol] for symbol in text])
    cut = len(codes) * 9 // 10
    name = "descriptions" if folder is None else dataset
    return Text(name, symbols, codes[:cut], codes[cut:])


def _descriptions() -> str:
    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    return "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in names)


def _files(folder: Path, dataset: str) -> str:
    files = sorted(folder.glob(f"{dataset}*.txt"))
    if not files:
        raise SystemExit(f"--data: no file {dataset}*.txt in {folder}")
    return "".join(file.read_text(encoding="utf-8") for file in files)
