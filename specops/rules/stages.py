"""The protocol of each stage: what a rule must have, and what else adapters may ask of it.

A rule needs `stage`, `init` and `update`; one of stage "forward" also needs `apply`. Every other
member has a default here. A class that inherits from its stage's protocol has the defaults;
`completed` wraps any other object in a rule that has them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from types import FunctionType
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias, cast

from specops import arrays
from specops.geometry import Geometry
from specops.rules.base import Figures, Rule, Stage
from specops.rules.scale import TrainableScale
from specops.tracking import Steps, Tracked
from specops.typing import Array, State

Formula = Literal["", "normalized", "rank limited", "penalty"]
_CLAIMS_ABOUT = {
    "formula": (
        *("init", "update", "apply", "advance", "tracked"),
        *("arguments", "fixed_scale", "strength_at", "penalty"),
    ),
    "by_products": ("init", "update", "advance", "tracked", "view", "strength_at"),
    "costly_to_compile": ("watch", "update", "view", "numbers_at"),
    "numbers_at": (
        *("init", "watch", "update", "advance", "apply"),
        *("fixed_scale", "strength_at", "penalty"),
    ),
}
"""For each member, the methods about which it makes a claim.

A subclass that replaces one of these methods falls back to the default of the member.
"""


class _AnyStage(Rule, Protocol):
    """What adapters may ask of every rule."""

    limits_stable_rank: ClassVar[bool] = False
    """Whether reports show the stable rank of `view`."""
    formula: ClassVar[Formula] = ""
    """What the rule computes, if adapters may compute it by fewer operations; "" if unknown.

    "normalized" is s·W/σ, "rank limited" `StableRankNormalization`, "penalty" λσuvᴴ; the vectors
    advance by `iterations` steps. A subclass that replaces a method on which this depends, by its
    own or by that of a mixin, has "", unless it names a formula itself.
    """
    iterations: int = 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for member, methods in _CLAIMS_ABOUT.items():
            claiming = next((base for base in cls.__mro__ if member in vars(base)), None)
            if claiming is None:
                continue
            if any(getattr(cls, m, None) is not getattr(claiming, m, None) for m in methods):
                home = _AnyStage if hasattr(_AnyStage, member) else WeightRule
                setattr(cls, member, getattr(home, member))

    def obstacle(self, geometry: Geometry) -> str:
        """Why the rule cannot act on such a map; "" if it can."""
        return ""

    def caution(self, geometry: Geometry, shape: tuple[int, ...]) -> str:
        """What the user should know about a weight of this shape under the rule; "" for nothing."""
        return ""

    def view(self, geometry: Geometry) -> Geometry:
        """The map that the rule is about."""
        return geometry

    def tracked(self, geometry: Geometry) -> Tracked | None:
        """The norm that its state follows; None for a state of any other kind."""
        return None

    def needs_input_size(self) -> bool:
        """Whether a convolution must have seen an input first."""
        return False

    def is_scheduled(self) -> bool:
        """Whether the rule depends on the weight's name, or its numbers on the step.

        With False, one compiled function may serve all weights that are alike. It is called with
        the step as usual, but with the name of any of them, and `arguments` is not called. With
        True, the default, each weight has a compiled function of its own.
        """
        return True

    def numbers_at(self, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
        """The values of those attributes that are arrays or, at this step, schedules.

        Only the running program may know them. It sends them along when it calls `update` on the
        host, and to a compiled function that weights which are alike share; there `with_numbers`
        puts them in place. A subclass with methods of its own gives none, unless it overrides this.
        """
        return {}

    def with_numbers(self, numbers: Mapping[str, Any]) -> Self:
        """The same rule with these attributes."""
        rule = copy(self)
        for name, value in numbers.items():
            object.__setattr__(rule, name, value)
        return rule

    def by_products(
        self, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> Steps[tuple[State, Figures] | None] | None:
        """One firing of a weight of which no device holds more than a part.

        The result is a generator that asks for products of the weight with vectors. It returns
        the new state and the figures of a firing that leaves the weight unchanged, or None if the
        firing turns out to need the whole weight. A rule that always needs the whole weight gives
        None instead of a generator, as does a subclass that replaces a method on which the
        generator depends, unless it has a `by_products` of its own.
        """
        return None

    def watch(self, weight: Array, geometry: Geometry, name: str) -> State:
        """The state before a compiled loop, which must not change its keys or shapes."""
        return self.init(weight, geometry, name)


class WeightRule(_AnyStage, Protocol):
    """A rule that acts on weights after the optimizer's step."""

    stage: ClassVar[Literal["weights"]] = "weights"

    def enforce(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """As `update`, but with a certain effect: called last, before an export."""
        return self.update(weight, geometry, state, step=step, name=name)

    def refuses_nonfinite(self, geometry: Geometry) -> bool:
        """Whether `update` itself raises `NonFiniteError` if any entry is NaN or infinite."""
        return False

    def costly_to_compile(self, geometry: Geometry) -> bool:
        """Whether compiled programs on a CPU should call `update` on the host, not compile it.

        `update` then gets NumPy arrays, and must not use the library of the program meanwhile. A
        subclass with an `update` of its own is compiled, unless it has its own answer here too.
        """
        return False


class GradientRule(_AnyStage, Protocol):
    """A rule that adds to the gradients before the optimizer's step."""

    stage: ClassVar[Literal["gradients"]] = "gradients"

    def penalty(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, Array]:
        """(what the rule adds to the loss, what it adds to the gradient); the state stays.

        For optimizers that evaluate the loss several times. The first is the figure ``penalty`` of
        `update`, or 0 if the rule has no such figure, with which line searches cannot work.
        """
        term, _, figures = self.update(weight, geometry, state, step=step, name=name)
        if "penalty" in figures:
            return figures["penalty"], term
        # The loss is real, even where the weight is complex.
        return arrays.namespace(weight).abs(arrays.zeros((), weight)), term

    def advance(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[State, Figures]:
        """The state and figures of `update`, for adapters that get the term from `formula`."""
        return self.update(weight, geometry, state, step=step, name=name)[1:]

    def strength_at(self, step: int, name: str, geometry: Geometry) -> Any:
        """λ of the `formula`."""
        raise NotImplementedError


class ForwardRule(_AnyStage, Protocol):
    """A rule that gives the weight which a layer uses."""

    stage: ClassVar[Literal["forward"]] = "forward"

    @abstractmethod
    def apply(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> Array:
        """The weight that the layer uses: pure and differentiable."""

    def arguments(self, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
        """The keyword arguments of `apply` at this step, besides the name.

        Numbers other than `step` may be handed over as arrays, so that a compiled forward
        pass is not compiled anew.
        """
        return {"step": step}

    def trained_scale(self) -> TrainableScale | None:
        """The factor that is trained; its value is `apply`'s argument ``scale``."""
        return None

    def is_traceable(self, geometry: Geometry) -> bool:
        """Whether compilers can look into `apply`."""
        return True


StagedRule: TypeAlias = WeightRule | GradientRule | ForwardRule


def completed(rule: Rule) -> StagedRule:
    """The rule with every member of its stage's protocol: defaults replace what it leaves out.

    A rule that inherits from the protocol is returned as it is. A rule of an unknown stage gets
    the members that are common to all stages.

    Examples
    --------
    >>> class Double:
    ...     stage = "weights"
    ...
    ...     def init(self, weight, geometry, name):
    ...         return {}
    ...
    ...     def update(self, weight, geometry, state, *, step=1, name=""):
    ...         return 2 * weight, state, {}
    >>> completed(Double()).enforce(3.0, None, {})
    (6.0, {}, {})
    """
    if isinstance(rule, _Completed) or _PROTOCOLS.get(rule.stage, _AnyStage) in type(rule).__mro__:
        return cast(StagedRule, rule)
    return cast(StagedRule, _COMPLETED.get(rule.stage, _OfAnyStage)(rule))


class _Completed:
    """A wrapped third-party rule; subclasses add the members of a stage's protocol.

    These members are methods of a class, so that compilers can trace them. At each call they ask
    the wrapped rule.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @property
    def stage(self) -> Stage:
        return self.rule.stage

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "rule" not in vars(self):
            raise AttributeError(name)
        return getattr(self.rule, name)

    def __reduce__(self) -> Any:
        return completed, (self.rule,)

    def __repr__(self) -> str:
        return repr(self.rule)

    def __eq__(self, other: object) -> bool:
        return bool(self.rule == (other.rule if isinstance(other, _Completed) else other))

    def __hash__(self) -> int:
        return hash(self.rule)


def _with_members(protocol: type) -> type[_Completed]:
    names = [n for n in dir(protocol) if not n.startswith("_") and n != "stage"]
    members = {name: _member(name, getattr(protocol, name)) for name in names}
    return type(f"_Completed{protocol.__name__}", (_Completed,), members)


def _member(name: str, default: Any) -> Any:
    """A member that uses what the wrapped rule has under this name, or else the default."""
    if getattr(default, "__isabstractmethod__", False):
        return property(lambda self: getattr(self.rule, name))
    if not isinstance(default, FunctionType):
        return property(lambda self: getattr(self.rule, name, default))

    def method(self: _Completed, *given: Any, **options: Any) -> Any:
        if hasattr(self.rule, name):
            return getattr(self.rule, name)(*given, **options)
        return default(self, *given, **options)

    return method


_PROTOCOLS: dict[str, type] = {
    "weights": WeightRule,
    "gradients": GradientRule,
    "forward": ForwardRule,
}
_COMPLETED = {stage: _with_members(protocol) for stage, protocol in _PROTOCOLS.items()}
_OfAnyStage = _with_members(_AnyStage)
