"""Rules on dicts of arrays that are written to in place."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest

import specops
from specops import arrays
from specops.errors import (
    AdapterError,
    CautionWarning,
    GeometryError,
    NonFiniteError,
    NonFiniteWarning,
    PlanError,
    UnsupportedGeometryError,
)
from specops.geometry import Conv, Dense
from specops.rules import (
    ClipSpectralNorm,
    Monitor,
    SpectralNormalization,
    SpectralNormPenalty,
    TrainableScale,
)
from specops_cupy import attach
from specops_cupy.adapter import CupyAdapter
from specops_cupy.arrays import Entry

CLIP = ClipSpectralNorm(1.0)
NORMALIZED = SpectralNormalization(norm="operator", scale=2.0)
PENALTY = SpectralNormPenalty(0.5, norm="reshaped")
MAPS = {"a.w": Dense(), "k": Conv((5, 5), padding=1)}


def model(xp: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "a": {"w": xp.asarray(rng.standard_normal((6, 4))), "b": xp.asarray(np.ones(6))},
        "k": xp.asarray(rng.standard_normal((3, 2, 3, 3)).astype(np.float32)),
        "rate": 0.1,
    }


def host(x: Any) -> np.ndarray:
    return np.array(arrays.to_numpy(x))


def norm(x: Any, geometry: Any) -> float:
    return float(specops.spectral_norm(host(x), geometry))


def test_weights_are_projected_in_place(xp: Any) -> None:
    arrays = model(xp)
    w, k, before = arrays["a"]["w"], arrays["k"], model(xp)
    attachment = attach(None, arrays, CLIP, geometries=MAPS)
    assert repr(attachment) == "<Attachment: 2 weights, step 0, attached>"
    assert np.array_equal(host(w), host(before["a"]["w"]))
    attachment.step()
    assert arrays["a"]["w"] is w
    assert arrays["k"] is k
    assert norm(w, Dense()) == pytest.approx(1.0)
    assert 0.5 < norm(k, MAPS["k"]) <= 1.0 + 1e-6
    assert np.array_equal(host(arrays["a"]["b"]), np.ones(6))
    expected = specops.project_spectral_ball(before["a"]["w"], 1.0)
    assert np.allclose(host(w), host(expected))


def test_report_accounts_for_every_entry(xp: Any) -> None:
    arrays = model(xp)
    arrays |= {
        "tied": arrays["a"]["w"],
        "i": xp.asarray(np.eye(2, dtype=int)),
        "scalar": np.float64(1),
    }
    arrays["empty"] = xp.asarray(np.ones((0, 3)))
    plan = specops.Plan([("a.*", CLIP), ("*", Monitor(), 5)])
    report = attach(None, arrays, plan, geometries=MAPS).report()
    assert [row.name for row in report.constrained] == ["a.w", "k"]
    assert report["a.w"].norm == pytest.approx(norm(arrays["a"]["w"], Dense()))
    assert report["a.w"].norm_is == "exact"
    assert report["k"].norm_is == "exact"
    assert report["k"].norm == pytest.approx(norm(arrays["k"], MAPS["k"]))
    assert "every 5" in report["k"].rule
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons == {
        "a.b": "1-d: a bias or scale, no matrix",
        "rate": "no array but float",
        "scalar": "no array but float64",
        "tied": "tied to a.w",
        "i": "dtype int64 cannot be measured: keep a float32 weight",
        "empty": "empty",
    }


def test_maps_are_never_guessed(xp: Any) -> None:
    arrays = model(xp)
    with pytest.raises(PlanError, match=r"a\.w: a bare array does not say which linear map"):
        attach(None, arrays, CLIP)
    named = specops.Plan([("a.w", CLIP), ("*", Monitor())])
    with pytest.raises(PlanError, match=r"a\.w .*shape \(6, 4\).*geometries=\{'a\.w'"):
        attach(None, arrays, named, geometries={"k": MAPS["k"]})
    report = attach(None, arrays, CLIP, geometries={"k": MAPS["k"]}).report()
    assert report["a.w"].reason.startswith("a bare array")
    with pytest.raises(PlanError, match="no matrix"):
        attach(None, arrays, CLIP, geometries={"nothing": Dense()})
    with pytest.raises(GeometryError, match=r"a\.w"):
        attach(None, arrays, CLIP, geometries={"a.w": Conv((5,))})


def test_a_geometry_does_not_make_integers_measurable(xp: Any) -> None:
    arrays = {"i": xp.asarray(np.eye(2, dtype=int)), "w": xp.asarray(np.eye(2))}
    maps = {"*": Dense()}
    assert "int64" in attach(None, arrays, CLIP, geometries=maps).report()["i"].reason
    with pytest.raises(PlanError, match="dtype int64"):
        attach(None, arrays, specops.Plan([("i", CLIP)]), geometries=maps)


def test_tied_arrays_count_once(xp: Any) -> None:
    shared = xp.asarray(np.diag([4.0, 0.5]))
    arrays = {"first": shared, "again": shared}
    attachment = attach(None, arrays, CLIP, geometries={"again": Dense()})
    assert attachment.report()["again"].reason == "tied to first"
    attachment.step()
    assert len(attachment.history) == 1
    assert np.allclose(host(shared), np.diag([1.0, 0.5]))
    attachment = attach(None, arrays, NORMALIZED, geometries={"first": Dense()})
    used = attachment.normalized()
    assert used["again"] is used["first"]
    assert used["first"] is not shared


def test_views_of_the_same_memory_are_tied() -> None:
    shared = np.diag([4.0, 0.5])
    arrays = {"first": shared, "view": shared[:], "turned": shared.T, "part": shared[:1]}
    report = attach(None, arrays, CLIP, geometries={"*": Dense()}).report()
    assert [row.name for row in report.constrained] == ["first", "turned", "part"]


def test_gradients_are_added_to_in_place(xp: Any) -> None:
    arrays = model(xp)
    plan = specops.Plan([("a.w", PENALTY, 2), ("k", PENALTY)])
    attachment = attach(None, arrays, plan, geometries=MAPS)
    w = host(arrays["a"]["w"])
    given = xp.asarray(np.ones((6, 4), np.float32))
    gradients = {"a": {"w": given, "b": xp.asarray(np.ones(6))}, "rate": None}
    attachment.before_step(gradients)
    assert np.array_equal(host(given), np.ones((6, 4)))
    assert attachment.history == [{"step": 1, "name": "k", "skipped": "no gradient"}]
    attachment.step()
    attachment.before_step({"a.w": given})
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    assert np.allclose(host(given), 1.0 + 0.5 * s[0] * np.outer(u[:, 0], vh[0]), atol=1e-3)
    assert host(given).dtype == np.float32
    assert np.array_equal(host(arrays["a"]["w"]), w)
    assert {r["name"] for r in attachment.history if "penalty" in r} == {"a.w"}


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": {"v": np.ones((6, 4))}}, r"a\.v has a gradient but is no entry"),
        ({"a.w": np.ones((4, 6))}, r"a\.w has shape \(6, 4\), but its gradient \(4, 6\)"),
        ({"a.w": np.ones((6, 4), int)}, r"gradient of a\.w has dtype int64, .* float64: cast it"),
        ({"a.w": np.ones((6, 4), complex)}, r"gradient of a\.w has dtype complex128"),
        ({"a.w": [1.0]}, r"gradient of a\.w is a builtins\.list, no array of numpy"),
        ([np.ones((6, 4))], "expected a dict of arrays, got builtins.list"),
    ],
)
def test_gradients_that_do_not_fit(gradients: Any, message: str) -> None:
    arrays = model(np)
    k = np.ones((3, 2, 3, 3), np.float32)
    attachment = attach(None, arrays, PENALTY, geometries=MAPS)
    with pytest.raises(AdapterError, match=message):
        attachment.before_step(gradients if isinstance(gradients, list) else {"k": k, **gradients})
    assert np.all(k == 1.0)
    k.flags.writeable = False
    with pytest.raises(AdapterError, match="gradient of k is read-only"):
        attachment.before_step({"k": k})


def test_forward_rules_give_arrays_in_use(xp: Any) -> None:
    arrays, plain = model(xp), model(xp)
    plan = specops.Plan([("a.w", None), ("*", NORMALIZED)])
    attachment = attach(None, arrays, plan, geometries=MAPS)
    used, again = attachment.normalized(), attachment.normalized()
    assert norm(used["k"], MAPS["k"]) == pytest.approx(2.0, rel=1e-3)
    assert used["a"]["w"] is arrays["a"]["w"]
    assert used["rate"] == 0.1
    assert np.array_equal(host(used["k"]), host(again["k"]))
    assert np.array_equal(host(arrays["k"]), host(plain["k"]))
    assert attachment.report()["k"].norm == pytest.approx(2.0, rel=0.2)
    assert not attachment.history
    attachment.step()
    assert [r["name"] for r in attachment.history] == ["k"]


def test_vectors_advance_in_steps_only() -> None:
    arrays = {"w": np.random.default_rng(3).standard_normal((30, 30))}
    attachment = attach(None, arrays, NORMALIZED, geometries={"w": Dense()})
    arrays["w"] += 0.01 * np.random.default_rng(4).standard_normal((30, 30))
    before = attachment.state_dict()["weights"]["w"]["state"]["u0"]
    attachment.step()
    after = attachment.state_dict()["weights"]["w"]["state"]["u0"]
    attachment.normalized()
    assert np.array_equal(attachment.state_dict()["weights"]["w"]["state"]["u0"], after)
    assert not np.array_equal(before, after)


def test_an_array_written_to_from_outside_is_measured_anew(xp: Any) -> None:
    arrays = {"w": xp.asarray(np.diag([4.0, 0.5]))}
    attachment = attach(None, arrays, NORMALIZED, geometries={"w": Dense()})
    arrays["w"][...] = xp.asarray(np.diag([0.1, 8.0]))
    assert np.allclose(host(attachment.normalized()["w"]), np.diag([0.025, 2.0]))


@pytest.mark.parametrize("norm_is", ["operator", "reshaped", "bidirectional"])
@pytest.mark.parametrize("resumed", ["", "before", "after"])
def test_an_array_loaded_between_firings_is_measured_anew(norm_is: Any, resumed: str) -> None:
    rng = np.random.default_rng(0)
    arrays, maps = {"k": rng.standard_normal((6, 4, 3, 3))}, {"k": Conv((7, 7), padding=1)}
    rule = SpectralNormalization(norm=norm_is)
    attachment = attach(None, arrays, rule, every=5, geometries=maps)
    for _ in range(3):
        arrays["k"] -= 0.01 * rng.standard_normal(arrays["k"].shape)
        attachment.step()
    followed = attachment.normalized()["k"]

    def resume() -> None:
        nonlocal attachment
        state = attachment.state_dict()
        attachment.detach()
        attachment = attach(None, arrays, rule, every=5, geometries=maps)
        attachment.load_state_dict(state)

    if resumed == "before":
        resume()
    assert np.array_equal(attachment.normalized()["k"], followed)
    arrays["k"][...] = 3.0 * rng.standard_normal(arrays["k"].shape)
    if resumed == "after":
        resume()
    used = attachment.normalized()["k"]
    reshaped = [np.linalg.norm(used.reshape(6, -1), 2)]
    reshaped += [np.linalg.norm(used.swapaxes(0, 1).reshape(4, -1), 2)]
    norms = {
        "operator": norm(used, maps["k"]),
        "reshaped": reshaped[0],
        "bidirectional": np.mean(reshaped),
    }
    assert norms[norm_is] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("every", [1, 4])
def test_an_array_that_was_zero_has_no_directions_yet(xp: Any, every: int) -> None:
    arrays = {"w": xp.asarray(np.zeros((8, 12)))}
    attachment = attach(None, arrays, NORMALIZED, every=every, geometries={"w": Dense()})
    for _ in range(2):
        arrays["w"] += xp.asarray(np.random.default_rng(0).standard_normal((8, 12)))
        attachment.step()
        assert norm(attachment.normalized()["w"], Dense()) == pytest.approx(2.0, rel=1e-5)


def test_between_firings_vectors_wait() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    attachment = attach(None, arrays, NORMALIZED, every=3, geometries={"w": Dense()})
    attachment.step()
    arrays["w"][...] = np.diag([3.0, 5.0])
    attachment.step()
    # A step explains the change: the norm is followed along the old vectors.
    assert np.allclose(attachment.normalized()["w"], np.diag([2.0, 10.0 / 3.0]))


def test_scale_schedules_and_trainable_scales() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    rule = SpectralNormalization(norm="operator", scale=lambda step, name, geometry: 10.0 * step)
    attachment = attach(None, arrays, rule, geometries={"w": Dense()})
    assert np.linalg.norm(attachment.normalized()["w"], 2) == pytest.approx(10.0)
    attachment.step()
    assert np.linalg.norm(attachment.normalized()["w"], 2) == pytest.approx(20.0)
    rule = SpectralNormalization(norm="operator", scale=TrainableScale(1.0))
    with pytest.raises(AdapterError, match="give a number or a schedule"):
        attach(None, arrays, rule, geometries={"w": Dense()})


@pytest.mark.parametrize("rule", [NORMALIZED, SpectralNormPenalty(1.0, norm="operator")])
def test_an_operators_norm_needs_a_size(rule: Any) -> None:
    arrays, maps = model(np), {"a.w": Dense(), "k": Conv(None, padding=1)}
    report = attach(None, arrays, rule, geometries=maps).report()
    assert "name the input_shape" in report["k"].reason
    with pytest.raises(PlanError, match=r"k: .* cannot act on it: the operator's norm depends"):
        attach(None, arrays, specops.Plan([("k", rule), ("*", rule)]), geometries=maps)
    attachment = attach(None, arrays, CLIP, geometries=maps)
    attachment.step()
    assert specops.spectral_norm_bounds(arrays["k"], maps["k"]).upper <= 1.0 + 1e-4


@pytest.mark.parametrize(
    ("policy", "expected"), [("raise", NonFiniteError), ("warn", NonFiniteWarning), ("skip", None)]
)
def test_arrays_that_are_not_finite(xp: Any, policy: Any, expected: Any) -> None:
    arrays = model(xp)
    k = host(arrays["k"])
    k[0, 0, 0, 0] = np.nan
    arrays["k"][...] = xp.asarray(k)
    attachment = attach(None, arrays, CLIP, geometries=MAPS, on_nonfinite=policy)
    before = host(arrays["a"]["w"])
    if policy == "raise":
        with pytest.raises(expected, match=r"k holds NaN or infinity at step 1 \(shape"):
            attachment.step()
        assert np.array_equal(host(arrays["a"]["w"]), before)
        return
    if policy == "warn":
        with pytest.warns(expected, match="k holds NaN"):
            attachment.step()
    else:
        attachment.step()
    assert norm(arrays["a"]["w"], Dense()) == pytest.approx(1.0)
    assert np.array_equal(host(arrays["k"]), k, equal_nan=True)
    assert attachment.history[-1] == {"step": 1, "name": "k", "skipped": "not finite"}
    assert attachment.report()["k"].norm_is == "not finite"


@pytest.mark.parametrize("rule", [NORMALIZED, PENALTY, Monitor()])
def test_every_stage_tells_of_nan(rule: Any) -> None:
    arrays = {"fine": np.eye(2), "w": np.full((2, 2), np.nan)}
    attachment = attach(None, arrays, rule, geometries={"*": Dense()})
    gradients = {"fine": np.zeros((2, 2)), "w": np.zeros((2, 2))}
    if rule is NORMALIZED:
        assert attachment.normalized()["w"] is arrays["w"]
    with pytest.raises(NonFiniteError, match="w holds NaN"):
        attachment.before_step(gradients) if rule is PENALTY else attachment.step()
    assert not gradients["fine"].any()


def test_nothing_is_written_when_one_fails() -> None:
    def bound(step: int, name: str, geometry: Any) -> float:
        if name == "z":
            raise RuntimeError("no bound")
        return 1.0

    arrays = {"a": np.diag([4.0, 0.5]), "z": np.diag([4.0, 0.5])}
    attachment = attach(None, arrays, ClipSpectralNorm(bound), geometries={"*": Dense()})
    with pytest.raises(RuntimeError, match="no bound") as caught:
        attachment.step()
    assert "acted on z at step 1" in caught.value.__notes__[0]
    assert arrays["a"][0, 0] == 4.0
    read_only = {"a": np.diag([4.0, 0.5]), "z": np.diag([4.0, 0.5])}
    read_only["z"].flags.writeable = False
    attachment = attach(None, read_only, CLIP, geometries={"*": Dense()})
    with pytest.raises(AdapterError, match="z is read-only, so no array was changed"):
        attachment.step()
    assert read_only["a"][0, 0] == 4.0
    attachment.detach()
    attach(None, read_only, Monitor(), geometries={"*": Dense()}).step()


def test_a_firing_reads_a_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = Entry.read
    monkeypatch.setattr(Entry, "read", lambda entry: reads.append(entry.weight.name) or read(entry))
    attachment = attach(None, {"w": np.eye(3)}, Monitor(), geometries={"w": Dense()})
    attachment.step()
    assert reads == ["w"]


def test_rules_without_a_method_for_a_map() -> None:
    class Picky:
        stage = "weights"

        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {}

        def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            if isinstance(geometry, Conv):
                raise UnsupportedGeometryError("no convolutions")
            return 0.5 * weight, state, {}

    arrays = model(np)
    attachment = attach(None, arrays, Picky(), geometries=MAPS)
    attachment.step()
    assert attachment.report()["k"].reason == "no convolutions"
    assert attachment.history[-1]["skipped"] == "no convolutions"
    attachment.detach()
    plan = specops.Plan([("k", Picky()), ("*", Picky())])
    w = arrays["a"]["w"].copy()
    with pytest.raises(UnsupportedGeometryError, match="k at step 1: no convolutions"):
        attach(None, arrays, plan, geometries=MAPS).step()
    assert np.array_equal(arrays["a"]["w"], w)


def test_intervals_and_enforce() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    plan = specops.Plan([("w", CLIP)], every=2, start=1, stop=4)
    attachment = attach(None, arrays, plan, geometries={"w": Dense()})
    fired = []
    for _ in range(6):
        arrays["w"][0, 0] = 4.0
        attachment.step()
        fired.append(arrays["w"][0, 0] < 2.0)
    assert fired == [False, False, True, False, False, False]
    attachment.enforce()
    assert arrays["w"][0, 0] == pytest.approx(1.0)
    assert attachment.history[-1]["step"] == 6


def test_enforcing_is_certified() -> None:
    class Careful:
        stage = "weights"

        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {}

        def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight, state, {"certified": 0.0}

        def enforce(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight, state, {"certified": 1.0}

    attachment = attach(None, {"w": np.eye(2)}, Careful(), geometries={"w": Dense()})
    attachment.step()
    attachment.enforce()
    assert [record["certified"] for record in attachment.history] == [0.0, 1.0]


def test_state_goes_on_where_it_was(xp: Any) -> None:
    plan = specops.Plan([("a.w", CLIP), ("k", NORMALIZED)])

    def train(attachment: Any, arrays: Any, seeds: range) -> Any:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            for array in (arrays["a"]["w"], arrays["k"]):
                noise = 0.1 * rng.standard_normal(array.shape)
                array += xp.asarray(noise.astype(host(array).dtype))
            attachment.step()
        return host(attachment.normalized()["k"]), host(arrays["a"]["w"])

    arrays = model(xp)
    attachment = attach(None, arrays, plan, geometries=MAPS)
    train(attachment, arrays, range(3))
    saved = copy.deepcopy((arrays, attachment.state_dict()))
    whole = train(attachment, arrays, range(3, 6))
    resumed = attach(None, saved[0], plan, geometries=MAPS)
    resumed.load_state_dict(saved[1])
    assert resumed.steps == 3
    for got, expected in zip(train(resumed, saved[0], range(3, 6)), whole, strict=True):
        assert np.array_equal(got, expected)


def test_states_are_copies() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    attachment = attach(None, arrays, NORMALIZED, geometries={"w": Dense()})
    state = attachment.state_dict()
    for _ in range(2):
        state["weights"]["w"]["state"]["u0"][...] = 0.0
        good = attachment.state_dict()
        assert abs(good["weights"]["w"]["state"]["u0"][0]) == pytest.approx(1.0)
        attachment.load_state_dict(good)
        state = good


def test_state_may_come_from_the_host(xp: Any) -> None:
    attachment = attach(None, model(xp), NORMALIZED, geometries=MAPS)
    state = attachment.state_dict()
    for entry in state["weights"].values():
        entry["state"] = {k: host(v) for k, v in entry["state"].items()}
    before = attachment.normalized()
    attachment.load_state_dict(state)
    after = attachment.normalized()
    assert type(after["k"]) is type(before["k"])
    assert np.array_equal(host(after["k"]), host(before["k"]))


def test_states_of_other_models_are_refused() -> None:
    arrays = model(np)
    attachment = attach(None, arrays, NORMALIZED, geometries=MAPS)
    state = attachment.state_dict()
    with pytest.raises(AdapterError, match="unknown version 2"):
        attachment.load_state_dict({**state, "version": 2})
    renamed = {"a.w": state["weights"]["a.w"], "z": state["weights"]["k"]}
    with pytest.raises(AdapterError, match=r"missing \['k'\], unexpected \['z'\]"):
        attachment.load_state_dict({**state, "weights": renamed})
    exchanged = dict(zip(("k", "a.w"), state["weights"].values(), strict=True))
    with pytest.raises(AdapterError, match=r"a\.w: the state has .* expected"):
        attachment.load_state_dict({**state, "steps": 9, "weights": exchanged})
    broken = {name: {"state": 3} for name in state["weights"]}
    with pytest.raises(AdapterError, match="no dict of arrays under the entry 'state'"):
        attachment.load_state_dict({**state, "weights": broken})
    assert attachment.steps == 0


def test_the_dict_is_looked_at_anew() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    attachment = attach(None, arrays, CLIP, geometries={"*": Dense()})
    attachment.step()
    arrays["w"] = np.diag([5.0, 0.5])
    attachment.step()
    assert arrays["w"][0, 0] == pytest.approx(1.0)
    arrays["v"] = np.diag([6.0, 0.5])
    attachment.step()
    assert arrays["v"][0, 0] == pytest.approx(1.0)
    assert [row.name for row in attachment.report().constrained] == ["w", "v"]
    del arrays["w"]
    attachment.step()
    assert [row.name for row in attachment.report().constrained] == ["v"]
    arrays["v"] = np.ones(3)
    with pytest.raises(PlanError, match="which no matrix matches"):
        attachment.step()
    assert attachment.steps == 4


def test_an_array_of_another_shape_starts_anew() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    attachment = attach(None, arrays, NORMALIZED, geometries={"w": Dense()})
    arrays["w"] = np.ones((3, 2))
    assert np.linalg.norm(attachment.normalized()["w"], 2) == pytest.approx(2.0)
    arrays["w"] = np.ones((3, 2, 2))
    with pytest.raises(GeometryError, match="w"):
        attach(None, arrays, NORMALIZED, geometries={"w": Dense((0,), (1,))})


def test_detaching_lets_go_of_the_arrays() -> None:
    arrays = {"w": np.diag([4.0, 0.5])}
    attachment = attach(None, arrays, CLIP, geometries={"w": Dense()})
    attachment.step()
    kept = weakref.ref(arrays["w"])
    attachment.detach()
    del arrays
    gc.collect()
    assert kept() is None


def test_detach(xp: Any) -> None:
    arrays = model(xp)
    attachment = attach(None, arrays, NORMALIZED, geometries=MAPS)
    used = host(attachment.normalized()["k"])
    assert attachment.is_attached
    attachment.detach()
    assert not attachment.is_attached
    assert np.array_equal(host(arrays["k"]), host(model(xp)["k"]))
    assert [row.norm for row in attachment.report().rows] == [None] * 4
    for call in (attachment.step, attachment.normalized, attachment.state_dict):
        with pytest.raises(AdapterError, match="attach again"):
            call()
    again = attach(None, arrays, NORMALIZED, geometries=MAPS)
    again.detach(fold=True)
    assert np.array_equal(host(arrays["k"]), used)


def test_project_once(xp: Any) -> None:
    arrays = model(xp)
    plan = specops.Plan([("a.*", CLIP, 7), ("k", NORMALIZED)], every=5, start=2)
    report = CupyAdapter().project(arrays, plan, geometries=MAPS)
    assert norm(arrays["a"]["w"], Dense()) == pytest.approx(1.0)
    assert norm(arrays["k"], MAPS["k"]) == pytest.approx(2.0, rel=1e-3)
    assert report["a.w"].norm == pytest.approx(1.0)
    with pytest.raises(AdapterError, match="acts on gradients"):
        CupyAdapter().project(arrays, specops.Plan.of(PENALTY), geometries=MAPS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.eye(2)], r"expected a dict of arrays, got builtins\.list"),
        ({}, "holds no arrays"),
        ({"a": {"b": np.eye(2)}, "a.b": np.eye(2)}, "two entries of the dict have the path 'a.b'"),
    ],
)
def test_what_is_no_dict_of_arrays(arrays: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(None, arrays, CLIP, geometries={"*": Dense()})


def test_one_library_at_a_time() -> None:
    strict = pytest.importorskip("array_api_strict")
    arrays = {"host": np.eye(2), "other": strict.eye(2)}
    with pytest.raises(AdapterError, match=r"host is numpy's, other is array_api_strict's"):
        attach(None, arrays, CLIP, geometries={"*": Dense()})


def test_options() -> None:
    arrays, told = {"w": np.diag([4.0, 0.5])}, []
    with pytest.raises(ValueError, match="on_nonfinite"):
        attach(None, arrays, CLIP, geometries={"w": Dense()}, on_nonfinite="ignore")
    attachment = attach(
        None, arrays, CLIP, geometries={"w": Dense()}, every=2, history=1, log=told.append
    )
    for _ in range(4):
        attachment.step()
    assert [record["step"] for record in told] == [2, 4]
    assert [record["step"] for record in attachment.history] == [4]

    class Odd:
        stage = "backward"

        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {}

        def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight, state, {}

    with pytest.raises(AdapterError, match="stage 'backward'"):
        attach(None, arrays, Odd(), geometries={"w": Dense()})


def test_a_second_attachment_is_warned_of() -> None:
    model = {"w": 2 * np.eye(3)}
    first = attach(None, model, CLIP, geometries={"w": Dense()})
    with pytest.warns(CautionWarning, match="w is under ClipSpectralNorm.* already"):
        attach(None, model, CLIP, geometries={"w": Dense()})
    assert first.is_attached
