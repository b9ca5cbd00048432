"""A rule in an accelerate loop: attached to the optimizer inside the prepared one.

Trains on scikit-learn's digits and prints the norms.

    python examples/train_accelerate.py --quick
"""

from __future__ import annotations

import argparse
from typing import Any

import accelerate
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import specops


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, epochs: int = 1) -> Any:
    """A loop as accelerate's guide has it, with two lines more."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    plain = accelerator.unwrap_model(model)
    rule = specops.ClipSpectralNorm(1.0)
    attachment = specops.attach(prepared.optimizer, plain, rule, every=10)
    for _ in range(epochs):
        for x, y in loader:
            prepared.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            prepared.step()
    attachment.enforce()
    return attachment


def main(arguments: list[str] | None = None) -> tuple[nn.Module, Any]:
    """Train, and print what was constrained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    options = parser.parse_args(arguments)
    accelerate.utils.set_seed(0)
    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 4 - 2
    count = 180 if options.quick else len(images)
    loader = DataLoader(
        TensorDataset(images[:count], torch.as_tensor(y[:count])), batch_size=64, shuffle=True
    )

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    attachment = train(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, epochs=5)
    print(f"{attachment.steps} steps")
    attachment.report().show()
    return model, attachment


if __name__ == "__main__":
    main()
