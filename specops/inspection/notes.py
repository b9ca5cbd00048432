"""What is said of an inspection beside its figures."""

from __future__ import annotations

from specops.inspection.figures import BOUNDED, LANCZOS, Method
from specops.inspection.results import WeightFigures

_NAMED = 3


def grouped_problems(weights: list[WeightFigures]) -> list[str]:
    """A line for each reason why what should have been measured was not."""
    found: dict[str, list[str]] = {}
    for weight in weights:
        if weight.skipped and not weight.harmless:
            found.setdefault(weight.skipped, []).append(weight.name)
    lines = []
    for reason, names in found.items():
        shown = ", ".join(map(repr, names[:_NAMED]))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"{shown}{more}: {reason}")
    return lines


def notes_on(measured: list[WeightFigures], method: Method) -> list[str]:
    """What to know about the figures."""
    notes = []
    if any(w.geometry.startswith(("conv any", "transposed conv any")) for w in measured):
        notes.append(
            "convolutions without an input size: σ_max is the supremum over all sizes, [lower, "
            "upper], at stride 1 unless given, in one group unless they look depthwise; the "
            "other figures are of the reshaped kernel"
        )
    texts = {
        BOUNDED: "certified bounds of σ_max alone",
        LANCZOS: "σ_max by Lanczos at this input size, not all singular values",
    }
    for key, text in texts.items():
        names = [w.name for w in measured if w.figures is not None and key in w.figures.method]
        if names:
            why = "asked for" if method == "bounds" else "too large: --method exact insists"
            notes.append(f"{text} ({why}) of {len(names)}: {', '.join(names)}")
    return notes
