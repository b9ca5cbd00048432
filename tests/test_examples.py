"""The main job, in little: its constraint holds in the layers as they compute."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from tests.torch_adapter.test_geometry import layer_matrix  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example() -> dict[str, object]:
    return runpy.run_path(str(EXAMPLE))


def norms(model: torch.nn.Module, size: int) -> list[float]:
    """Explicit matrices of all layers, zero padding included."""
    model = model.double().eval()
    found: list[float] = []

    def measure(layer: torch.nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        handle.pop(layer).remove()
        channels, *grid = args[0].shape[1:]
        matrix = layer_matrix(layer, channels, tuple(grid))
        found.append(float(np.linalg.norm(matrix, 2)))

    handle = {
        layer: layer.register_forward_hook(measure)
        for layer in model.modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    }
    model(torch.zeros(1, 1, size, size, dtype=torch.float64))
    assert not handle
    return found


def test_constraint_holds_for_the_real_layers(example: dict[str, object]) -> None:
    from rich.progress import Progress

    options = example["parse"](["--epochs", "3", "--every", "7"])  # type: ignore[operator]
    data = example["load"]([])  # type: ignore[operator]
    with Progress(disable=True) as progress:
        rule = example["specops"].ClipSpectralNorm(1.0)  # type: ignore[attr-defined]
        clipped = example["train"](data, rule, options, progress)  # type: ignore[operator]
        plain = example["train"](data, None, options, progress)  # type: ignore[operator]
    assert max(norms(clipped.model, 8)) <= 1.0 + 1e-4
    assert min(norms(plain.model, 8)) > 1.0
    assert clipped.accuracy > 0.8


def test_prints_a_table_and_draws(
    example: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for shard in range(2):
        images = rng.integers(0, 256, (40, 10, 12, 3), dtype=np.uint8)
        labels = rng.integers(0, 4, 40).astype(np.uint8)
        np.savez(tmp_path / f"train_{shard}.npz", x_train=images, y_train=labels)
    np.savez(tmp_path / "test.npz", x_test=images, y_test=labels)
    out = tmp_path / "figures" / "values.png"
    files = [str(tmp_path / f) for f in ("train_0.npz", "train_1.npz", "test.npz")]
    arguments = ["--data", *files, "--epochs", "1", "--every", "1", "--out", str(out)]
    example["main"](["--max-norm", "0.5", *arguments])  # type: ignore[operator]
    printed = capsys.readouterr().out
    for text in ("conv 10×12", "operator norm", "reshaped norm", "stable rank", "(hook "):
        assert text in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no file holds x_test, y_test"):
        example["main"](["--data", files[0]])  # type: ignore[operator]
