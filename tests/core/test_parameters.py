"""What authors of adapters and of rules get wrong is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import specops
from specops.authors import AdapterError, BaseAttachment, Parameter, UnsupportedArrayError, Weight
from specops.testing import Capabilities

CLIP = specops.ClipSpectralNorm(1.0)


class Entry(Parameter):
    """One array of a dict."""

    def __init__(self, arrays: dict[str, np.ndarray], key: str, name: str) -> None:
        self.arrays, self.key = arrays, key
        shape, dtype = arrays[key].shape, str(arrays[key].dtype)
        self.weight = Weight.of(name, shape, dtype, specops.Dense())

    def read(self) -> np.ndarray:
        return self.arrays[self.key]

    def write(self, value: np.ndarray) -> None:
        self.read()[...] = value


class Listed(BaseAttachment[Any]):
    """Of the parameters that it is given."""

    def __init__(self, parameters: Sequence[Entry], rule: Any = CLIP) -> None:
        super().__init__(specops.Plan([("*", rule)]))
        self.listed = parameters

    def parameters(self) -> Sequence[Entry]:
        return self.listed


def test_two_parameters_of_one_name_are_refused() -> None:
    arrays = {"a": 2 * np.eye(3), "b": 3 * np.eye(3)}
    attachment = Listed([Entry(arrays, key, "w") for key in arrays])
    with pytest.raises(AdapterError, match=r"two parameters are called 'w'"):
        attachment.assign()
    assert arrays["a"][0, 0] == 2


def test_an_attachment_that_was_not_assigned_says_so() -> None:
    attachment = Listed([Entry({"a": np.eye(3)}, "a", "a")])
    for act in (attachment.step, attachment.report, attachment.state_dict):
        with pytest.raises(AdapterError, match=r"no weights yet.*assign\(\)"):
            act()
    attachment.assign()
    attachment.step()
    attachment.detach()
    with pytest.raises(AdapterError, match="detached"):
        attachment.step()


@pytest.mark.parametrize("stages", [(), ("weight",), "weights"], ids=["none", "typo", "no tuple"])
def test_stages_that_there_are_not_are_refused(stages: Any) -> None:
    message = r"stages must be a tuple of 'weights', 'gradients' and 'forward', got"
    attachment = Listed([Entry({"a": np.eye(3)}, "a", "a")])
    attachment.stages = stages
    with pytest.raises(TypeError, match=message):
        attachment.assign()
    with pytest.raises(TypeError, match=message):
        Capabilities(stages=stages)


class Gives:
    """A rule of others that returns what it should not, of one weight."""

    def __init__(self, stage: str, wrong: Any) -> None:
        self.stage, self.wrong = stage, wrong

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        return {}

    def update(self, weight: Any, geometry: Any, state: Any, *, name: str = "", **_: Any) -> Any:
        return self.wrong if name == "b" else 0.5 * weight, state, {}


WRONG = {"turned": np.ones((4, 3)), "a row": np.ones(4), "a number": 0.5, "a list": [[1.0]]}


@pytest.mark.parametrize("stage", ["weights", "gradients"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_what_a_rule_gives_has_the_shape_of_the_weight(stage: str, wrong: Any) -> None:
    arrays = {key: np.ones((3, 4)) for key in "ab"}
    attachment = Listed([Entry(arrays, key, key) for key in arrays], Gives(stage, wrong))
    attachment.stages = (stage,)
    attachment.assign()
    gradients = {key: np.zeros((3, 4)) for key in arrays}
    message = r"^b at step 1: .*Gives.* gave .* for a weight of shape \(3, 4\)"
    with pytest.raises(UnsupportedArrayError, match=message):
        attachment.step() if stage == "weights" else attachment.before_step(gradients)
    assert all(np.all(a == 1.0) for a in arrays.values())
    assert not any(g.any() for g in gradients.values())


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(
    ("number", "said"), [(1e38, "numbers too large for their norm"), (np.nan, "NaN or infinity")]
)
def test_norms_beyond_the_precision_are_told_from_nan(number: float, said: str) -> None:
    w = np.full((8, 8), number, np.float32)
    rule = specops.NormalizeIfAbove(1.0, norm="reshaped")
    attachment = Listed([Entry({"a": w}, "a", "a")], rule)
    attachment.assign()
    with pytest.raises(specops.errors.NonFiniteError, match=f"^a holds {said} at step 1"):
        attachment.step()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_a_rule_makes_not_finite_is_not_written(bad: float) -> None:
    arrays = {key: np.ones((3, 4)) for key in "ab"}
    rule = Gives("weights", np.full((3, 4), bad))
    attachment = Listed([Entry(arrays, key, key) for key in arrays], rule)
    attachment.assign()
    with pytest.raises(UnsupportedArrayError, match=r"^b at step 1: .*Gives.* gave NaN or infin"):
        attachment.step()
    assert all(np.all(a == 1.0) for a in arrays.values())
