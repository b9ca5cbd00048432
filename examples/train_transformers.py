"""A rule in Hugging Face's `Trainer`: a callback attaches it, saves it, and takes it off again.

Trains a small network on scikit-learn's digits and prints the norms.

    python examples/train_transformers.py --quick
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn

import specops


class Constrain(transformers.TrainerCallback):
    """A rule from the first step to the last."""

    def __init__(self, rule: Any, every: int = 10) -> None:
        self.rule, self.every = rule, every

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # that which steps, unwrapped
        self.attachment = specops.attach(optimizer, model, self.rule, every=self.every)
        if state.global_step > 0:  # the run resumes: model and optimizer are loaded by now
            self.attachment.load_state_dict(torch.load(_file(args, state)))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.save(self.attachment.state_dict(), _file(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.attachment.enforce()
        self.report = self.attachment.report()
        self.attachment.detach()


def _file(args: Any, state: Any) -> Path:
    """Where the attachment's state lies in a checkpoint of the trainer."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "specops.pt"


class Network(nn.Module):
    """With the signature that `Trainer` wants: the loss comes from the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main(arguments: list[str] | None = None) -> tuple[Network, Constrain]:
    """Train, and print what was constrained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    options = parser.parse_args(arguments)
    transformers.set_seed(0)
    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 4 - 2
    count = 180 if options.quick else len(images)
    data = [{"x": x, "labels": y} for x, y in zip(images[:count], y[:count], strict=True)]

    model, constrain = Network(), Constrain(specops.ClipSpectralNorm(1.0))
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=5,
            per_device_train_batch_size=64,
            learning_rate=0.01,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=model, args=settings, train_dataset=data, callbacks=[constrain]
        )
        trainer.train()
    print(f"{constrain.attachment.steps} steps")
    constrain.report.show()
    return model, constrain


if __name__ == "__main__":
    main()
