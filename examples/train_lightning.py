"""A rule in Lightning: attached in `configure_optimizers`, carried by its checkpoints.

Trains on scikit-learn's digits, resumes from the checkpoint of half-way, and prints the norms.

    python examples/train_lightning.py --quick
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import specops


class Classifier(lightning.LightningModule):
    """A small network whose layers keep operator norms of at most `max_norm`."""

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        self.max_norm = max_norm
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )
        self.attachment: Any = None
        self.saved: dict[str, Any] | None = None

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.attachment is not None:  # of an earlier `fit`, or of a search for a learning rate
            self.attachment.detach()
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rule = specops.ClipSpectralNorm(self.max_norm)
        self.attachment = specops.attach(optimizer, self, rule, every=10)
        return optimizer

    def on_train_start(self) -> None:
        if self.saved is not None:
            self.attachment.load_state_dict(self.saved)
            self.saved = None

    def on_train_end(self) -> None:
        self.attachment.enforce()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["specops"] = self.attachment.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["specops"]


def trainer(epochs: int, folder: str) -> lightning.Trainer:
    """One that prints nothing and leaves nothing behind."""
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(arguments: list[str] | None = None) -> Classifier:
    """Train half of the epochs, save, and train the other half from the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 4 - 2
    count = 180 if options.quick else len(images)
    data = TensorDataset(images[:count], torch.as_tensor(y[:count]))
    loader = DataLoader(data, batch_size=64, shuffle=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        first = trainer(3, folder)
        first.fit(Classifier(), loader)
        first.save_checkpoint(path, weights_only=False)
        model = Classifier()
        trainer(6, folder).fit(model, loader, ckpt_path=path, weights_only=False)
    print(f"{model.attachment.steps} steps, of which {first.global_step} before the checkpoint")
    model.attachment.report().show()
    return model


if __name__ == "__main__":
    main()
