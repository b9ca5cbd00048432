"""The factor of an update: α/rank, if the file or peft's settings have α."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from specops.inspection.low_rank.update import Shapes, Tensors

UNSCALED: Final = "not scaled: the file has no α"
_PEFT: Final = "base_model.model."
_IN_SETTINGS: Final = "as adapter_config.json has"


@dataclass(frozen=True)
class Scale:
    """The factor of a low-rank update, and where it comes from.

    Attributes
    ----------
    alpha : str
        The tensor that holds α, which is divided by the rank; "" if there is none.
    rank : int
    factor : float
        The factor, if no tensor holds α.
    words : str
    """

    alpha: str
    rank: int
    factor: float
    words: str

    def of(self, tensors: Tensors) -> float:
        """The factor."""
        if not self.alpha:
            return self.factor
        return float(tensors[self.alpha].reshape(-1)[0]) / self.rank

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that it is computed from."""
        return (self.alpha,) if self.alpha else ()

    @property
    def obstacle(self) -> str:
        """Why an update with this scale cannot be added; "" if it can."""
        return UNSCALED if self.words == UNSCALED else ""


def scale_of(layer: str, rank: int, shapes: Shapes, adapter: Mapping[str, Any]) -> Scale:
    """The scale of an update B·A."""
    if shapes.get(f"{layer}.alpha") in ((), (1,)):
        return Scale(f"{layer}.alpha", rank, 1.0, f"times α/{rank}")
    alpha = _of_pattern(adapter.get("alpha_pattern"), layer, adapter.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        return Scale("", rank, 1.0, UNSCALED)
    below = math.sqrt(rank) if adapter.get("use_rslora") else rank
    return Scale("", rank, alpha / below, f"times {alpha / below:.4g}, {_IN_SETTINGS}")


def scale_of_product(layer: str, rank: int, shapes: Shapes, adapter: Mapping[str, Any]) -> Scale:
    """The scale of an update by LoHa or LoKr; `rank` is 0 if all factors are whole."""
    alpha = _of_pattern(adapter.get("alpha_pattern"), layer, adapter.get("alpha"))
    told = rank_of(layer, adapter)
    if isinstance(alpha, int | float) and told:
        return Scale("", told, alpha / told, f"times {alpha / told:.4g}, {_IN_SETTINGS}")
    if not rank:
        # LyCORIS does not scale updates with whole factors.
        return Scale("", 1, 1.0, "not scaled")
    if shapes.get(f"{layer}.alpha") in ((), (1,)):
        return Scale(f"{layer}.alpha", rank, 1.0, f"times α/{rank}")
    return Scale("", rank, 1.0, UNSCALED)


def rank_of(layer: str, adapter: Mapping[str, Any]) -> int:
    """The rank that peft's settings give a layer; 0 if they give none."""
    rank = _of_pattern(adapter.get("rank_pattern"), layer, adapter.get("r"))
    return rank if type(rank) is int and rank > 0 else 0


def _of_pattern(table: Any, layer: str, otherwise: Any) -> Any:
    """The value of the first key that matches; as in peft, an expression for endings of names."""
    if isinstance(table, dict):
        for key, value in table.items():
            try:
                found = re.match(rf"(.*\.)?({key})$", layer.removeprefix(_PEFT))
            except re.error:
                continue
            if found:
                return value
    return otherwise
