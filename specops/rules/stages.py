"""The protocol of each stage: what a rule must have, and all that adapters ask beyond it.

A rule needs `stage`, `init` and `update`, of stage "forward" also `apply`. Every other member
has a default here. A class that inherits from its protocol has the defaults; of any other
object `completed` makes a rule that has them.
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
_SPEAKS_OF = {
    "formula": (
        *("init", "update", "apply", "advance", "tracked"),
        *("arguments", "fixed_scale", "strength_at", "penalty"),
    ),
    "by_products": ("init", "update", "advance", "tracked", "view", "strength_at"),
    "costly_to_compile": ("watch", "update", "view", "numbers_at"),
    "numbers_at": ("init", "watch", "update", "advance", "apply", "strength_at", "fixed_scale"),
}
"""Members that say something of methods, which a subclass may have others of."""


class _AnyStage(Rule, Protocol):
    """What adapters may ask of every rule."""

    limits_stable_rank: ClassVar[bool] = False
    """Whether reports show the stable rank of `view`."""
    formula: ClassVar[Formula] = ""
    """What it computes, where an adapter may do it by fewer operations; "": nobody knows.

    "normalized" is s·W/σ, "rank limited" `StableRankNormalization`, "penalty" λσuvᴴ, with
    vectors that advance by `iterations` steps. A subclass for which a method that takes part is
    another one, of its own or of a mixin, has none, unless it says so.
    """
    iterations: int = 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for member, methods in _SPEAKS_OF.items():
            knowing = [base for base in cls.__mro__ if member in vars(base)]
            if not knowing:
                continue
            if any(getattr(cls, m, None) is not getattr(knowing[0], m, None) for m in methods):
                home = _AnyStage if hasattr(_AnyStage, member) else WeightRule
                setattr(cls, member, getattr(home, member))

    def obstacle(self, geometry: Geometry) -> str:
        """Why the rule cannot act on such a map; "" if it can."""
        return ""

    def caution(self, geometry: Geometry, shape: tuple[int, ...]) -> str:
        """What its user should know of a weight of this shape; "" for nothing."""
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
        """Whether it depends on the weight's name, or its numbers on the step.

        A rule that says no lets compilers make one body for all weights that are alike, which
        is handed the step as ever, but the name of any of them; its `arguments` are not asked.
        Of a rule that does not say, nobody knows: each weight has a body of its own.
        """
        return True

    def numbers_at(self, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
        """Attributes that are schedules, at this step, or arrays: what a program alone may know.

        For who calls back, or makes one body for weights that are alike, with numbers in their
        place: see `with_numbers`. A subclass with methods of its own has none, unless it says so.
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

        A computation that asks for products of the weight with vectors, and returns the new state
        and the figures of a firing that leaves the weight as it is; None where it takes the
        weight itself after all. None instead of a computation: it always does.

        A subclass for which a method that takes part is another one has none, unless it says so.
        """
        return None

    def watch(self, weight: Array, geometry: Geometry, name: str) -> State:
        """The state before the first firing of a compiled loop: keys and shapes stay."""
        return self.init(weight, geometry, name)


class WeightRule(_AnyStage, Protocol):
    """A rule that acts on weights after the optimizer's step."""

    stage: ClassVar[Literal["weights"]] = "weights"

    def enforce(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """As `update`, where its effect must be certain: the last word before an export."""
        return self.update(weight, geometry, state, step=step, name=name)

    def refuses_nonfinite(self, geometry: Geometry) -> bool:
        """Whether it raises `NonFiniteError` itself where any entry is NaN or infinite."""
        return False

    def costly_to_compile(self, geometry: Geometry) -> bool:
        """Whether programs for a CPU had better call `update` back than compile it.

        It is handed NumPy's arrays then, and must not use the library of the program meanwhile. A
        subclass with an `update` of its own is compiled, unless it says so too.
        """
        return False


class GradientRule(_AnyStage, Protocol):
    """A rule that adds to the gradients before the optimizer's step."""

    stage: ClassVar[Literal["gradients"]] = "gradients"

    def penalty(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, Array]:
        """(what it adds to the loss, and to the gradient) with a state that stays as it is.

        For optimizers that evaluate the loss again. The value is the figure ``penalty`` of
        `update`; of a rule without one it is 0, which line searches cannot work with.
        """
        term, _, figures = self.update(weight, geometry, state, step=step, name=name)
        if "penalty" in figures:
            return figures["penalty"], term
        # Real, beside a weight that may be complex.
        return arrays.namespace(weight).abs(arrays.zeros((), weight)), term

    def advance(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[State, Figures]:
        """The state and figures of `update`, for who knows the term by the `formula`."""
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
        """What `apply` is handed at this step beside the name.

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
    """The rule with every member of its stage's protocol, defaults for what it leaves out.

    One that inherits from the protocol comes back as it is; of an unknown stage it has what
    every stage has.

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
    """A rule of others; `_with_members` of its stage's protocol.

    They are methods of a class, which compilers trace, and ask the rule at each call.
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
    """The rule's own, or the default."""
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
