"""The smallest example of an adapter: its program, and the conformance kit on it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops.geometry import Geometry
from specops.plugins import manager
from specops.testing import AdapterSuite, Capabilities, LayerCase

networks = pytest.importorskip("sklearn.neural_network")

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapter_sklearn.py"
CLIP = specops.ClipSpectralNorm(1.0)


@pytest.fixture(scope="module")
def example() -> Any:
    """The example as a module."""
    spec = spec_from_file_location("adapter_sklearn", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _registered(example: Any) -> Iterator[None]:
    manager().register(example, "sklearn")
    yield
    manager().unregister(example)


def data(outputs: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    return x, 10.0 * rng.standard_normal((8, outputs)).astype(np.float32)


def network(*hidden: int) -> Any:
    """Trained on one batch, then with weights of norms above 1."""
    model = networks.MLPRegressor(
        hidden_layer_sizes=hidden,
        activation="tanh",
        solver="sgd",
        alpha=0.0,
        batch_size=8,
        learning_rate_init=0.1,
        momentum=0.5,
        nesterovs_momentum=False,
        shuffle=False,
        random_state=0,
    )
    model.partial_fit(*data())
    rng = np.random.default_rng(0)
    for array in (*model.coefs_, *model.intercepts_):
        array[...] = rng.standard_normal(array.shape)
    return model


class Training:
    """One batch, again and again."""

    def __init__(self, model: Any, rule_or_plan: Any, **options: Any) -> None:
        self.model = model
        self.attachment = specops.attach(None, model, rule_or_plan, **options)

    def step(self) -> None:
        self.model.partial_fit(*data())
        if self.attachment.is_attached:
            self.attachment.step()

    def weights(self) -> dict[str, np.ndarray]:
        kinds = ("coefs_", "intercepts_")
        return {
            f"{kind}.{i}": w.copy()
            for kind in kinds
            for i, w in enumerate(getattr(self.model, kind))
        }

    def outputs(self) -> np.ndarray:
        return self.model.predict(data()[0])

    def report(self) -> Any:
        return self.attachment.report()

    def history(self) -> list[dict[str, Any]]:
        return self.attachment.history

    def save(self) -> Any:
        return pickle.dumps((self.model, self.attachment.state_dict()))

    def restore(self, saved: Any) -> None:
        model, state = pickle.loads(saved)
        vars(self.model).update(vars(model))
        self.attachment.load_state_dict(state)

    def set_weight(self, name: str, values: np.ndarray) -> None:
        kind, index = name.split(".")
        getattr(self.model, kind)[int(index)][...] = values

    def enforce(self) -> None:
        self.attachment.enforce()

    def detach(self) -> None:
        self.attachment.detach()

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        return self.attachment.geometries()


class TestSklearn(AdapterSuite):
    """Without convolutions, and with a framework that refuses NaN itself."""

    name = "sklearn"
    capabilities = Capabilities(
        stages=("weights",), convolutions=False, refuses_nonfinite=ValueError
    )

    def model(self) -> Any:
        return network(6)

    def layers(self) -> Sequence[LayerCase]:
        model = network()
        return [LayerCase("dense", model, "coefs_.0", (4,), model.predict)]

    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> Training:
        return Training(model, rule_or_plan, **options)

    def array(self, values: np.ndarray) -> np.ndarray:
        return values.copy()

    def numpy(self, x: np.ndarray) -> np.ndarray:
        return x


def test_the_program(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    manager().unregister(example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, example.__name__, example)
        attachment = example.main()
    assert isinstance(attachment, specops.authors.Attachment)
    for w in attachment.weights().values():
        assert np.linalg.norm(w, 2) <= 1.0 + 1e-6
    assert "3 of 6 parameters under a rule" in capsys.readouterr().out


def test_what_it_refuses() -> None:
    with pytest.raises(specops.errors.AdapterError, match="has no weights yet"):
        specops.attach(None, networks.MLPClassifier(), CLIP)
    with pytest.raises(specops.errors.AdapterError, match="steps by itself"):
        specops.attach("adam", network(), CLIP)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("hidden", [(6, 6), (), (7,)], ids=["more", "fewer", "other sizes"])
def test_a_refit_of_other_layers_is_followed(hidden: tuple[int, ...]) -> None:
    model = network(6)
    attachment = specops.attach(None, model, CLIP)
    attachment.step()
    model.set_params(hidden_layer_sizes=hidden, max_iter=1).fit(*data())
    for w in model.coefs_:
        w *= 10.0
    attachment.step()
    assert all(np.linalg.norm(w, 2) <= 1.0 + 1e-6 for w in model.coefs_)
    shapes = {row.name: row.shape for row in attachment.report().constrained}
    assert shapes == {f"coefs_.{i}": w.shape for i, w in enumerate(model.coefs_)}


def test_a_read_only_weight_leaves_the_others_as_they_were() -> None:
    model = network(6)
    model.coefs_[1].flags.writeable = False  # as joblib.load(..., mmap_mode="r") gives it
    before = model.coefs_[0].copy()
    with pytest.raises(specops.errors.AdapterError, match=r"coefs_\.1 is read-only"):
        specops.project(model, CLIP)
    assert np.array_equal(model.coefs_[0], before)


def test_a_second_attachment_is_warned_of() -> None:
    model = network(6)
    first = specops.attach(None, model, CLIP)
    with pytest.warns(specops.errors.CautionWarning, match=r"coefs_\.0 \(and 1 more\) is under"):
        specops.attach(None, model, CLIP)
    assert first.is_attached
