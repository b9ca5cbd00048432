"""Rules of others, what adapters may ask of any rule, and who knows the keys of tracked states."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specops import (
    ClipSpectralNorm,
    Conv,
    Dense,
    Plan,
    SpectralNormalization,
    SpectralNormPenalty,
    StableRankNormalization,
    rules,
)
from specops.errors import AdapterError
from specops.rules import ForwardRule, GradientRule, Rule, WeightRule, completed
from specops.tracking import are_alike, packed, track, unpacked, vectors
from specops.training.assigned import check_stage
from specops.training.plan import Weight

ROOT = Path(__file__).parents[2]
W = np.diag([4.0, 1.0])
STAGES = {"weights": WeightRule, "gradients": GradientRule, "forward": ForwardRule}
OWN = [getattr(rules, name) for name in rules.__all__ if isinstance(getattr(rules, name), type)]


class Halve:
    """What a rule must have, and nothing else."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        return {"seen": np.asarray(0.0)}

    def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return 0.5 * weight, {"seen": state["seen"] + 1}, {"half": 0.5}


class HalveInUse(Halve):
    def apply(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return 0.5 * weight


def members(stage: str) -> set[str]:
    """What the protocol of a stage declares."""
    return {name for name in dir(STAGES[stage]) if not name.startswith("_")}


def plain(stage: str) -> Any:
    return (HalveInUse if stage == "forward" else Halve)(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_minimal_rule_has_every_member_once_completed(stage: str) -> None:
    given = plain(stage)
    rule: Any = completed(given)
    assert members(stage) > {"stage", "init", "update", "obstacle", "tracked", "watch"}
    for name in members(stage):
        assert hasattr(rule, name), name
    assert rule.stage == stage
    assert rule.obstacle(Dense()) == rule.caution(Dense(), (2, 2)) == rule.formula == ""
    assert rule.tracked(Dense()) is None
    assert rule.view(Conv((4,))) == Conv((4,))
    assert not rule.needs_input_size()
    assert not rule.limits_stable_rank
    assert rule.is_scheduled()
    assert rule.watch(W, Dense(), "w") == rule.init(W, Dense(), "w")
    assert completed(rule) is rule
    assert isinstance(rule, Rule)


def test_defaults_are_made_of_what_the_rule_has() -> None:
    state = {"seen": np.asarray(2.0)}
    weights: Any = completed(plain("weights"))
    new, after, figures = weights.enforce(W, Dense(), state, step=3, name="w")
    assert np.array_equal(new, W / 2)
    assert (after["seen"], figures) == (3.0, {"half": 0.5})
    assert not weights.refuses_nonfinite(Dense())

    gradients: Any = completed(plain("gradients"))
    value, term = gradients.penalty(W, Dense(), state)
    assert value == 0.0
    assert np.array_equal(term, W / 2)
    assert gradients.advance(W, Dense(), state) == ({"seen": 3.0}, {"half": 0.5})

    forward: Any = completed(plain("forward"))
    assert forward.arguments(7, "w", Dense()) == {"step": 7}
    assert forward.trained_scale() is None
    assert forward.is_traceable(Dense())
    assert np.array_equal(forward.apply(W, Dense(), state), W / 2)


def test_what_a_rule_has_goes_before_the_default() -> None:
    class Careful(Halve):
        limits_stable_rank = True

        def obstacle(self, geometry: Any) -> str:
            return "too small"

        def enforce(self, weight: Any, *_: Any, **__: Any) -> Any:
            return weight, {}, {}

    rule: Any = completed(Careful("weights"))
    assert rule.obstacle(Dense()) == "too small"
    assert rule.enforce(W, Dense(), {})[0] is W
    assert rule.limits_stable_rank


def test_a_completed_rule_is_as_good_as_the_one_given() -> None:
    class Named(Halve):
        def __repr__(self) -> str:
            return "Named()"

        def __eq__(self, other: object) -> bool:
            return True if isinstance(other, Named) else NotImplemented

        __hash__ = object.__hash__

    given = Named("weights")
    rule = completed(given)
    assert repr(rule) == "Named()"
    assert rule == given
    assert [given].index(rule) == 0  # type: ignore[arg-type]
    assert rule == completed(Named("weights"))
    assert hash(rule) == hash(given)
    half: Any = completed(plain("forward"))
    for other in (copy.copy(half), copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        assert np.array_equal(other.apply(W, Dense(), {}), W / 2)
        assert other.arguments(2, "w", Dense()) == {"step": 2}
    with pytest.raises(AttributeError):
        _ = half.enforce


def test_plans_complete_rules_and_refuse_what_lacks_apply() -> None:
    weight = Weight("w", (2, 2), "float64", Dense())
    (assigned,) = Plan.of(plain("weights")).assign([weight])
    rule: Any = assigned.rule
    assert rule.enforce(W, Dense(), {"seen": 0.0})[2] == {"half": 0.5}
    own = ClipSpectralNorm(1.0)
    assert Plan.of(own).assign([weight])[0].rule is own
    (lacking,) = Plan.of(Halve("forward")).assign([weight])
    with pytest.raises(AdapterError, match="needs a method 'apply'"):
        check_stage(lacking.rule, {"forward": "apply"})


def test_a_class_that_inherits_has_the_defaults() -> None:
    class Third(WeightRule):
        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {}

        def update(
            self, weight: Any, geometry: Any, state: Any, *, step: int = 1, name: str = ""
        ) -> Any:
            return weight / 3, state, {}

    rule = Third()
    assert completed(rule) is rule
    assert rule.stage == "weights"
    assert np.array_equal(rule.enforce(3 * W, Dense(), {})[0], W)


@pytest.mark.parametrize(
    "rule",
    [
        SpectralNormalization(norm="operator"),
        StableRankNormalization(0.5, norm="operator"),
        SpectralNormPenalty(1.0, norm="operator"),
    ],
)
def test_a_subclass_with_methods_of_its_own_has_no_known_formula(rule: Any) -> None:
    assert rule.formula
    kind = type(rule)
    assert type("Same", (kind,), {"__doc__": "as before"}).formula == rule.formula
    methods = {"init", "update", "apply", "advance", "tracked", "arguments", "fixed_scale"}
    for name in methods | {"strength_at", "penalty"}:
        assert type("Other", (kind,), {name: lambda *_: None}).formula == ""
        mixin = type("Mixin", (), {name: lambda *_: None})
        mixed = type("Mixed", (mixin, kind), {})
        assert mixed.formula == type("Below", (mixed,), {}).formula == ""
        assert type("Knows", (mixin, kind), {"formula": rule.formula}).formula == rule.formula
    assert type("Same", (type("Mixin", (), {"other": 1}), kind), {}).formula == rule.formula


@pytest.mark.parametrize("protocol", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("lacking", ["init", "update"])
def test_a_class_that_inherits_needs_what_has_no_default(protocol: Any, lacking: str) -> None:
    has = {name: lambda *_, **__: None for name in {"init", "update", "apply"} - {lacking}}
    with pytest.raises(TypeError, match=f"abstract method.*{lacking}"):
        type("Lacking", (protocol,), has)()


@pytest.mark.parametrize("name", ["init", "update"])
def test_a_completed_rule_is_asked_at_each_call(name: str) -> None:
    given = plain("weights")
    rule: Any = completed(given)
    setattr(given, name, lambda *_, **__: ("another", {}, {}))
    assert getattr(rule, name)(W, Dense(), {})[0] == "another"
    given.enforce = lambda *_, **__: "own"
    assert rule.enforce(W, Dense(), {}) == "own"


@pytest.mark.parametrize("complex_", [False, True])
def test_the_default_of_a_penalty_is_real_and_beside_the_weight(complex_: bool) -> None:
    strict = pytest.importorskip("array_api_strict")
    elsewhere = strict.Device("device1")
    dtype = strict.complex64 if complex_ else strict.float32
    w = strict.ones((2, 2), dtype=dtype, device=elsewhere)
    rule: Any = completed(plain("gradients"))
    value, term = rule.penalty(w, Dense(), {"seen": 0.0})
    assert (value.dtype, value.device, value.shape) == (strict.float32, elsewhere, ())
    assert term.dtype == w.dtype


def test_own_rules_inherit_from_their_protocol() -> None:
    ours = [kind for kind in OWN if not kind.__dict__.get("_is_protocol")]
    ours = [kind for kind in ours if hasattr(kind, "stage")]
    assert len(ours) == 10
    for kind in ours:
        assert STAGES[kind.stage] in kind.__mro__, kind


# What the source says


def sources(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if "/tests/" not in name:
                yield name, ast.parse(path.read_text(encoding="utf-8"))


KEY = re.compile(r"(u|v|p|q|sigma)\d|sigma|axis")
ELSEWHERE = {
    # The stable rank's own state has one vector.
    "specops/projections/matrices/stable_rank.py",
}


def keys_of_states(tree: ast.AST) -> Iterator[str]:
    """Constants that read as a key of a tracked state, whole or made of one and an index."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if KEY.fullmatch(node.value):
                yield node.value
        elif isinstance(node, ast.JoinedStr) and len(node.values) == 2:
            first, second = node.values
            if isinstance(first, ast.Constant) and first.value in ("u", "v", "p", "q", "sigma"):
                yield f"{first.value}{ast.unparse(second)}"
        elif isinstance(node, ast.Subscript):
            index = node.slice
            if isinstance(index, ast.Constant) and index.value in ("u", "v", "p", "q"):
                yield f"[{index.value}]"


def test_nobody_else_knows_the_keys_of_tracked_states() -> None:
    found = {
        name: keys
        for name, tree in sources("specops", "adapters", "examples")
        if not name.startswith(("specops/tracking/", "specops/testing/"))
        and name not in ELSEWHERE
        and (keys := list(keys_of_states(tree)))
    }
    assert not found
    owners = [name for name, tree in sources("specops/tracking") if list(keys_of_states(tree))]
    assert owners == ["specops/tracking/matrices.py", "specops/tracking/operator.py"]


def probes(tree: ast.AST) -> Iterator[str]:
    """``getattr`` and ``hasattr`` of rules, and concrete rules by name."""
    concrete = {kind.__name__ for kind in OWN if "stage" in dir(kind)}
    concrete -= {kind.__name__ for kind in (Rule, *STAGES.values())}
    assert "ClipSpectralNorm" in concrete
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            about = [ast.unparse(argument) for argument in node.args[:1]]
            if node.func.id in ("getattr", "hasattr") and about[0].split(".")[-1] == "rule":
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in concrete)


def test_adapters_probe_no_rule() -> None:
    """But for a method that a stage requires, and that a plain object may lack."""
    found = {
        name: list(probes(tree))
        for name, tree in sources("specops/training", "adapters", "examples/adapter_keras")
    }
    allowed = {"specops/training/assigned.py": ["hasattr(rule, needed)"]}
    assert {name: uses for name, uses in found.items() if uses} == allowed


def asked_of_rules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name == "rule":
                yield node.attr


def test_all_that_adapters_ask_of_rules_is_declared() -> None:
    declared = set().union(*map(members, STAGES))
    asked: dict[str, set[str]] = {}
    for name, tree in sources("specops/training", "adapters", "examples/adapter_keras"):
        for member in asked_of_rules(tree):
            asked.setdefault(member, set()).add(name)
    undeclared = {member: names for member, names in asked.items() if member not in declared}
    assert not undeclared
    assert {"enforce", "watch", "tracked", "formula", "trained_scale", "apply"} <= asked.keys()


# What tracking answers in their place


@pytest.mark.parametrize(
    ("geometry", "norm", "shape"),
    [
        (Dense(), "operator", (5, 3)),
        (Dense(splits=(2, 4)), "operator", (6, 4)),
        (Dense(out_axes=(1,), batch_axes=(0,)), "operator", (2, 4, 3)),
        (Conv((6,)), "reshaped", (3, 2, 3)),
        (Conv((6,)), "operator", (3, 2, 3)),
        (Conv((6,)), "bidirectional", (3, 2, 3)),
    ],
)
@pytest.mark.parametrize("complex_", [False, True])
def test_gradients_are_those_of_the_norms(
    geometry: Any, norm: Any, shape: tuple[int, ...], complex_: bool
) -> None:
    """⟨u, Wv⟩ is linear: differences along any direction are products with the gradient."""
    rng = np.random.default_rng(0)
    w, d = rng.standard_normal((2, *shape))
    if complex_:
        w, d = w + 1j * rng.standard_normal(shape), d + 1j * rng.standard_normal(shape)
    follow = track(geometry, norm)
    state = follow.start(w, "w")
    norms = follow.norms(w, state)
    factors = tuple(rng.standard_normal(n.shape) for n in norms)
    moved = follow.norms(w + d, state)
    expected = sum(np.sum(f * (b - a)) for f, a, b in zip(factors, norms, moved, strict=True))
    gradient = follow.gradient(w, state, factors)
    assert gradient.shape == w.shape
    assert np.vdot(gradient, d).real == pytest.approx(expected, rel=1e-10)
    assert len(follow.gradients(state)) == len(norms)

    lower = follow.subtract(w, state, factors)
    for after, before, factor in zip(follow.norms(lower, state), norms, factors, strict=True):
        assert np.allclose(after, before - factor, rtol=0, atol=1e-10)


def test_vectors_are_all_that_a_state_goes_on_from() -> None:
    rng = np.random.default_rng(1)
    for geometry, shape in ((Dense(), (5, 3)), (Conv((6,)), (3, 2, 3))):
        follow, w = track(geometry, "operator"), rng.standard_normal(shape)
        state = follow.start(w, "w")
        kept = vectors(state)
        assert kept.keys() < state.keys()
        for key, value in follow.advance(w, kept).items():
            assert np.array_equal(value, follow.advance(w, state)[key])


def test_states_of_one_matrix_are_packed_and_unpacked() -> None:
    state = track(Dense(), "operator").start(W, "w")
    pairs = unpacked(state, 0)
    (sigma,) = track(Dense(), "operator").measured(state)
    assert packed(0, pairs, sigma) == state
    assert np.dot(pairs.u, W @ pairs.v) == pytest.approx(4.0)


def test_forward_passes_make_no_keys_of_states() -> None:
    asked: list[str] = []

    class Seen(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            asked.append(key)
            return super().__getitem__(key)

    follow = track(Dense(splits=(1, 1)), "operator")
    state = Seen(follow.start(W, "w"))
    asked.clear()
    for _ in range(2):
        assert len(follow.directions(state)) + len(follow.measured(state)) == 6
    assert all(a is b for a, b in zip(asked[:6], asked[6:], strict=True))


def test_states_that_may_be_of_one_weight() -> None:
    shapes = {"v": (1, 8), "q": (1, 8), "sigma": ()}
    assert are_alike(shapes, shapes | {"v": (1, 18), "q": (1, 18)})
    assert not are_alike(shapes, shapes | {"sigma": (2,)})
    assert not are_alike(shapes, {"v": (1, 8), "q": (1, 8)})
    assert not are_alike({"u0": (3,)}, {"u0": (4,)})
