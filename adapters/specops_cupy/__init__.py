"""CuPy adapter: core functions on a device's arrays, and rules on dicts of them.

cupy is imported when it is first needed, not with this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops_cupy.attachment import Attachment, attach
    from specops_cupy.functions import (
        clip_singular_values,
        condition_number,
        effective_rank,
        linear_operator,
        polar_factor,
        project_schatten_ball,
        project_spectral_ball,
        project_stable_rank,
        singular_values,
        spectral_norm,
        spectral_norm_bounds,
        stable_rank,
        top_singular_triplets,
    )
    from specops_cupy.interchange import from_torch, to_torch

__all__ = [
    "Attachment",
    "attach",
    "clip_singular_values",
    "condition_number",
    "effective_rank",
    "from_torch",
    "linear_operator",
    "polar_factor",
    "project_schatten_ball",
    "project_spectral_ball",
    "project_stable_rank",
    "singular_values",
    "spectral_norm",
    "spectral_norm_bounds",
    "stable_rank",
    "to_torch",
    "top_singular_triplets",
]

_HOMES = {
    "attachment": ("Attachment", "attach"),
    "interchange": ("from_torch", "to_torch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"specops_cupy.{_HOME_OF.get(name, 'functions')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
