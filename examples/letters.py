"""What the examples on several devices share: a text to learn letter by letter, their options.

Nothing here knows the framework that trains.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Letters:
    """A text, as the numbers of its letters."""

    names: list[str]
    numbers: np.ndarray

    def batch(self, options: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
        """Sequences of letters, each with the one that follows, (batch, length + 1)."""
        starts = rng.integers(len(self.numbers) - options.length, size=(options.batch, 1))
        return self.numbers[starts + np.arange(options.length + 1)]


def load(file: str | None) -> Letters:
    """The text of a file, or lines of sums."""
    if file:
        text = Path(file).read_text(encoding="utf-8")
    else:
        numbers = random.Random(0)
        pairs = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(20_000)]
        text = "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)
    names = sorted(set(text))
    number = {name: i for i, name in enumerate(names)}
    return Letters(names, np.asarray([number[letter] for letter in text]))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of network and training; `parsed` reads them."""
    result = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    result.add_argument("--data", metavar="FILE", help="a text to learn instead")
    result.add_argument("--max-norm", type=float, default=4.0)
    result.add_argument("--size", type=int, default=128)
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--length", type=int, default=64)
    result.add_argument("--batch", type=int, default=16, help="sequences of each process")
    result.add_argument("--steps", type=int, default=100)
    result.add_argument("--quick", action="store_true", help="one layer, ten steps")
    return result


def parsed(options: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = options.parse_args(arguments)
    if found.quick:
        found.size, found.layers, found.length, found.steps = 32, 1, 16, 10
    return found
