"""The README's programs for Lightning, Hugging Face and accelerate, on a small network."""

from __future__ import annotations

import re
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops  # noqa: E402

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def programs() -> Any:
    for name in ("lightning", "transformers", "accelerate"):
        pytest.importorskip(name)
    section = README.read_text(encoding="utf-8").split("\n## In training frameworks")[1]
    section = section.split("\n## ")[0]
    module = types.ModuleType("frameworks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in re.findall(r"```python\n(.*?)```", section, re.S):
            exec(compile(block, "README.md", "exec"), vars(module))
    return module


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = 5.0 * torch.randn(96, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.arange(96) % 3)


def loader() -> Any:
    return torch.utils.data.DataLoader(data(), batch_size=8)


def norm(layer: nn.Module) -> float:
    return float(specops.spectral_norm(layer.weight.detach()))


def test_lightning(programs: Any, tmp_path: Path) -> None:
    def trainer(epochs: int) -> Any:
        return programs.lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    torch.manual_seed(0)
    model = programs.Classifier()
    first = trainer(2)
    first.fit(model, loader())
    assert model.attachment.steps == 24
    assert norm(model.net) <= 1.0
    first.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    resumed = programs.Classifier()
    trainer(3).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert resumed.attachment.steps == 36
    assert norm(resumed.net) <= 1.0


def test_hugging_face_trainer(programs: Any, tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model, callback = Network(), programs.Clip()
    options = programs.transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    programs.transformers.Trainer(
        model=model,
        args=options,
        train_dataset=[{"x": x, "labels": y} for x, y in data()],
        callbacks=[callback],
    ).train()
    assert callback.attachment.steps == 12
    assert not callback.attachment.is_attached
    assert norm(model.net) <= 1.0


def test_accelerate(programs: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = programs.train(model, optimizer, loader())
    assert attachment.steps == 12
    assert norm(model) <= 1.0


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Linear(8, 3)
    with SummaryWriter(str(tmp_path)) as writer:
        attachment = specops.attach(None, model, specops.ClipSpectralNorm(0.1), log=writer)
        attachment.step()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("specops/weight/norm_after")
    assert (event.step, event.value) == (1, pytest.approx(0.1, rel=1e-5))
