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
    result = argparse.ArgumentParser(
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--data", metavar="FILE", help="a text to learn, instead of lines of sums")
    add("--max-norm", type=float, default=4.0, help="bound on the norm of every matrix")
    add("--size", type=int, default=128, help="width of the network")
    add("--layers", type=int, default=4, help="of the transformer")
    add("--length", type=int, default=64, help="letters of a sequence")
    add("--batch", type=int, default=16, help="sequences of each process")
    add("--steps", type=int, default=100, help="of the optimizer")
    add("--quick", action="store_true", help="one layer of width 32, ten steps")
    return result


def parsed(options: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = options.parse_args(arguments)
    if found.quick:
        found.size, found.layers, found.length, found.steps = 32, 1, 16, 10
    return found
