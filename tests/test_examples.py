"""The examples, in little: their constraints hold in the layers as they compute."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.progress import Progress  # noqa: E402

import specops  # noqa: E402
from specops import ClipSpectralNorm  # noqa: E402
from tests.torch_adapter.test_geometry import layer_matrix  # noqa: E402

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """An example, imported as a script finds its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def in_torch() -> ModuleType:
    return load("train_digits")


@pytest.fixture(scope="module")
def in_jax(in_torch: ModuleType) -> ModuleType:
    """The JAX example, starting from the torch example's initial weights."""
    for needed in ("jax", "optax", "flax"):
        pytest.importorskip(needed)
    module = load("train_digits_jax")

    def initial(network: Any, data: Any, options: Any) -> Any:
        torch.manual_seed(options.seed)
        model = in_torch.network(data.x_train.shape[-1], data.classes)
        weights = [p.detach().numpy() for p in model.parameters() if p.ndim > 1]
        variables = plain(network, data, options)
        params = {name: dict(layer) for name, layer in variables["params"].items()}
        for index, w in enumerate(weights[:-1]):
            assert params[f"Conv_{index}"]["kernel"].shape == w.transpose(2, 3, 1, 0).shape
            params[f"Conv_{index}"]["kernel"] = w.transpose(2, 3, 1, 0)
        params["Dense_0"] = {"kernel": weights[-1].T, "bias": model[-1].bias.detach().numpy()}
        return {**variables, "params": params}

    plain, module.initial = module.initial, initial
    return module


Runs = dict[str, Any]


def both(example: ModuleType, rule: ClipSpectralNorm, progress: Progress) -> Runs:
    """A plain run and a clipped one: 84 steps, of which the last is a seventh one."""
    options = example.parse(["--every", "7", "--epochs", "4"])
    data = example.digits.load([])
    return {
        "plain": example.train(data, None, options, progress),
        "clipped": example.train(data, rule, options, progress),
    }


@pytest.fixture(scope="module")
def torch_runs(in_torch: ModuleType) -> Runs:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield both(in_torch, ClipSpectralNorm(1.0), Progress(disable=True))
    torch.set_num_threads(threads)


class Compilations(Progress):
    """How many compilations of JAX each task of a progress bar has seen by each step."""

    def __init__(self) -> None:
        import jax

        super().__init__(disable=True)
        self.total = 0
        self.by_task: dict[Any, list[int]] = {}
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event: str, *_: Any, **__: Any) -> None:
        self.total += "backend_compile" in event

    def advance(self, task: Any, *_: Any) -> None:
        self.by_task.setdefault(task, []).append(self.total)


@pytest.fixture(scope="module")
def compilations(in_jax: ModuleType) -> Compilations:
    return Compilations()


@pytest.fixture(scope="module")
def jax_runs(in_jax: ModuleType, compilations: Compilations) -> Runs:
    return both(in_jax, in_jax.clip(in_jax.parse([])), compilations)


def norm(matrix: np.ndarray) -> float:
    """Of a matrix in double precision, from the smaller of its Gram matrices."""
    assert matrix.dtype == np.float64
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    return float(np.sqrt(np.linalg.eigvalsh(gram)[-1]))


def torch_norms(model: torch.nn.Module, size: int) -> list[float]:
    """Explicit matrices of all layers, zero padding included."""
    model = model.double().eval()
    found: list[float] = []

    def measure(layer: torch.nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        handle.pop(layer).remove()
        channels, *grid = args[0].shape[1:]
        matrix = layer_matrix(layer, channels, tuple(grid))
        found.append(norm(matrix))

    handle = {
        layer: layer.register_forward_hook(measure)
        for layer in model.modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    }
    model(torch.zeros(1, 1, size, size, dtype=torch.float64))
    assert not handle
    return found


def jax_norms(network: Any, size: int) -> list[float]:
    """The same of a network of flax."""
    import jax.numpy as jnp
    from flax import linen as nn

    module, variables = network.unbind()
    met: list[tuple[Any, Any, tuple[int, ...]]] = []

    def look(function: Any, args: Any, given: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Conv | nn.Dense):
            own = context.module.variables
            met.append((context.module.clone(parent=None), own, args[0].shape[1:]))
        return function(*args, **given)

    with nn.intercept_methods(look):
        module.apply(variables, jnp.zeros((1, size, size, 1)), train=False)
    found = []
    for layer, own, shape in met:
        n = int(np.prod(shape))
        zero, out = (
            np.asarray(layer.apply(own, x.reshape(-1, *shape)), dtype=np.float64)
            for x in (jnp.zeros(n), jnp.eye(n))
        )
        found.append(norm((out - zero).reshape(n, -1)))
    return found


def test_constraint_holds_for_the_real_layers(torch_runs: Runs) -> None:
    clipped = torch_norms(torch_runs["clipped"].network, 8)
    assert len(clipped) == 5
    assert max(clipped) <= 1.0 + 1e-4
    assert min(torch_norms(torch_runs["plain"].network, 8)) > 1.0
    assert torch_runs["clipped"].accuracy > 0.8


def test_constraint_holds_in_jax(jax_runs: Runs) -> None:
    clipped = jax_norms(jax_runs["clipped"].network, 8)
    assert len(clipped) == 5
    assert max(clipped) <= 1.0 + 1e-4
    assert min(jax_norms(jax_runs["plain"].network, 8)) > 1.0


@pytest.mark.parametrize("run", ["plain", "clipped"])
def test_jax_is_as_accurate(run: str, torch_runs: Runs, jax_runs: Runs) -> None:
    assert jax_runs[run].accuracy >= torch_runs[run].accuracy - 0.01


def test_both_frameworks_take_the_same_steps(in_torch: ModuleType, in_jax: ModuleType) -> None:
    """Data, order, network, loss, optimizer and schedules agree, or the weights would not."""
    found = {}
    for example in (in_torch, in_jax):
        options = example.parse(["--epochs", "1"])
        with Progress(disable=True) as progress:
            run = example.train(example.digits.load([]), None, options, progress)
        found[example] = [w for w, _ in run.layers.values()]
    for w, other in zip(found[in_torch], found[in_jax], strict=True):
        other = other.transpose(3, 2, 0, 1) if other.ndim == 4 else other.T
        assert np.linalg.norm(w - other) < 2e-3 * np.linalg.norm(w)


def test_no_step_of_jax_compiles_anew(jax_runs: Runs, compilations: Compilations) -> None:
    """Nothing is compiled between the first step and the last, clipping included."""
    assert len(compilations.by_task) == 2
    for counts in compilations.by_task.values():
        assert len(counts) == 84
        assert 0 < counts[0] == counts[-1]


@pytest.mark.parametrize("name", ["in_torch", "in_jax"])
def test_evaluates_with_statistics_of_the_weights_that_were_projected(
    name: str, request: pytest.FixtureRequest
) -> None:
    """After one pass the last projection moves weights far: with old statistics 10 % are right."""
    example = request.getfixturevalue(name)
    options = example.parse(["--epochs", "1"])
    rule = ClipSpectralNorm(1.0, screen=False)
    data = example.digits.load([])
    run = example.train(data, rule, options, Progress(disable=True))
    assert run.accuracy > 0.8
    assert max(specops.spectral_norm(w, map_) for w, map_ in run.layers.values()) <= 1.0 + 1e-4


@pytest.mark.parametrize(("every", "steps"), [(7, 84), (10, 84), (1, 3), (100, 84)])
def test_last_step_is_clipped(every: int, steps: int, in_jax: ModuleType) -> None:
    plan = in_jax.last_step_included(ClipSpectralNorm(1.0), every, steps)
    fired = [step for step in range(1, steps + 1) if plan.fires(step)]
    assert fired[-1] == steps
    assert len(fired) == max(1, steps // every)


@pytest.mark.parametrize("name", ["in_torch", "in_jax"])
def test_prints_a_table_and_draws(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = request.getfixturevalue(name)
    rng = np.random.default_rng(0)
    for shard in range(2):
        images = rng.integers(0, 256, (40, 6, 7, 3), dtype=np.uint8)
        labels = rng.integers(0, 4, 40).astype(np.uint8)
        np.savez(tmp_path / f"train_{shard}.npz", x_train=images, y_train=labels)
    np.savez(tmp_path / "test.npz", x_test=images, y_test=labels)
    out = tmp_path / "figures" / "values.png"
    files = [str(tmp_path / f) for f in ("train_0.npz", "train_1.npz", "test.npz")]
    arguments = ["--data", *files, "--epochs", "1", "--every", "1", "--out", str(out)]
    example.main(["--max-norm", "0.5", *arguments])
    printed = capsys.readouterr().out
    for text in ("conv 6×7", "operator norm", "reshaped norm", "stable rank", " s clipped ("):
        assert text in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no file holds x_test, y_test"):
        example.main(["--data", files[0]])


@pytest.mark.parametrize("name", ["in_torch", "in_jax"])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--device=nowhere", "--device nowhere"),
        ("--every=0", "--every must be at least 1, got 0"),
        ("--max-norm=-1", "--max-norm must be positive and finite, got -1"),
        ("--out=figure", "--out must end in one of"),
    ],
)
def test_arguments_are_checked(
    name: str,
    argument: str,
    message: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        request.getfixturevalue(name).parse([argument])
    assert message in capsys.readouterr().err


def norms_of_recipe(net: torch.nn.Module) -> list[float]:
    """Explicit matrices of a recipe's network, which works on images of 8×8."""
    norms = torch_norms(net, 8)
    assert len(norms) == 2
    return norms


def was_at_work(attachment: Any) -> bool:
    """Whether the constraint moved a weight, or norms inside it prove nothing."""
    return max(record["norm_before"] for record in attachment.history) > 1.05


@pytest.mark.filterwarnings("ignore")
def test_lightning_carries_the_rule_through_its_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lightning")
    model = load("train_lightning").main(["--quick"])
    assert model.attachment.steps == 18
    assert "18 steps, of which 9 before the checkpoint" in capsys.readouterr().out
    assert was_at_work(model.attachment)
    assert max(norms_of_recipe(model.net)) <= 1.0 + 1e-4


@pytest.mark.filterwarnings("ignore", "error::specops.errors.CautionWarning")
def test_lightning_may_fit_again(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from torch.utils.data import DataLoader, TensorDataset

    example = load("train_lightning")
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8)), batch_size=4)
    model, path = example.Classifier(), tmp_path / "first.ckpt"
    first = example.trainer(2, str(tmp_path))
    first.fit(model, loader)
    first.save_checkpoint(path, weights_only=False)
    earlier = model.attachment
    example.trainer(3, str(tmp_path)).fit(model, loader, ckpt_path=path, weights_only=False)
    assert (earlier.is_attached, model.attachment.steps) == (False, 6)
    example.trainer(1, str(tmp_path)).fit(model, loader)
    assert model.attachment.steps == 2


@pytest.mark.filterwarnings("ignore")
def test_a_callback_constrains_in_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, callback = load("train_transformers").main(["--quick"])
    assert callback.attachment.steps == 15
    assert not callback.attachment.is_attached
    assert "2 of 4 parameters under a rule" in capsys.readouterr().out
    assert was_at_work(callback.attachment)
    assert max(norms_of_recipe(model.net)) <= 1.0 + 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_callback_resumes_with_the_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    example = load("train_transformers")
    data = [{"x": torch.randn(1, 8, 8), "labels": torch.tensor(i % 10)} for i in range(12)]
    rule = specops.SpectralNormalization(norm="operator")

    def trained(resume: str | None = None) -> tuple[Any, Any]:
        transformers.set_seed(0)
        model, constrain = example.Network(), example.Constrain(rule, every=3)
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, settings, train_dataset=data, callbacks=[constrain])
        trainer.train(resume_from_checkpoint=resume)
        return model, constrain.attachment

    (whole, attachment), (resumed, later) = trained(), trained(str(tmp_path / "checkpoint-4"))
    assert attachment.steps == later.steps == 8
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_steps_the_optimizer_inside(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    model, attachment = load("train_accelerate").main(["--quick"])
    assert attachment.steps == 15
    assert "15 steps" in capsys.readouterr().out
    assert was_at_work(attachment)
    assert max(norms_of_recipe(model)) <= 1.0 + 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_distributed_alone() -> None:
    """Without torchrun it is the only process; on two ranks: tests/torch_adapter/distributed."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("older fully_shard needs streams of a device")
    _, attachment, losses = load("train_distributed").main(["--quick"])
    assert attachment.steps == 10
    assert losses[-1] < losses[0]
