"""Remarks on an inspection, beside its figures."""

from __future__ import annotations

from specops.inspection.configuration import Configuration
from specops.inspection.figures import BOUNDED, LANCZOS, Method
from specops.inspection.results import WeightFigures
from specops.inspection.spectrum import CIRCULAR, RESHAPED

_NAMED = 3
_SPEAKERS = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM")
"""Endings of architectures that have a matrix of outputs."""
_TOKENS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")


def grouped_problems(weights: list[WeightFigures]) -> list[str]:
    """A line for each reason why weights that should have been measured were not."""
    found: dict[str, list[str]] = {}
    for weight in weights:
        if weight.skipped and not weight.harmless:
            found.setdefault(weight.skipped, []).append(weight.name)
    lines = []
    for reason, names in found.items():
        lines.append(f"{_some(list(map(repr, names)))}: {reason}")
    return lines


def notes_on(measured: list[WeightFigures], method: Method) -> list[str]:
    """What to know about the figures."""
    notes = []
    for convolutions, what in (
        (True, "--groups, --stride or --input-size decide"),
        (False, "the model's configuration beside the file, if it is put there, decides"),
    ):
        ambiguous = [
            w.name
            for w in measured
            if w.readings and convolutions == any("conv" in r.geometry for r in w.readings)
        ]
        if ambiguous:
            notes.append(
                f"ambiguous, {len(ambiguous)}: nothing in the file decides between the maps that "
                f"these may be, so σ_max has the value of each; {what}: {_some(ambiguous)}"
            )
    if _beside(measured, RESHAPED):
        notes.append(
            "convolutions without an input size: σ_max is the supremum over all sizes, or [lower, "
            "upper] around it, at stride 1 unless known (at other strides it is no larger); "
            "figures marked ʳ are of the kernel reshaped to a matrix, outputs × (inputs·taps), "
            "not of the convolution"
        )
    beside = _beside(measured, CIRCULAR)
    if beside:
        notes.append(
            "figures marked ᶜ are of the same layer with circular padding, whose values are known "
            f"exactly: {_some(beside)}"
        )
    bounded = [w.name for w in measured if (f := w.figures) and BOUNDED in f.method]
    if bounded:
        why = "asked for" if method == "bounds" else "too large: --method exact decomposes them"
        notes.append(f"certified bounds of σ_max alone ({why}) of {len(bounded)}: {_some(bounded)}")
    large = [w for w in measured if (f := w.figures) and LANCZOS in f.method]
    if large:
        costs = _some([f"{w.name}, {w.figures.cost}" for w in large if w.figures], "; ")
        notes.append(
            f"σ_max by Lanczos at this input size, not all singular values, of {len(large)}: "
            f"their matrices would have to be decomposed ({costs})"
        )
    return notes


def _beside(measured: list[WeightFigures], of: str) -> list[str]:
    """Weights with figures of another map, `of`, in at least one of their readings."""
    return [
        w.name
        for w in measured
        if any(f.beside_of == of for f in (w.figures, *(r.figures for r in w.readings)) if f)
    ]


def tied_note(names: list[str], configuration: Configuration) -> list[str]:
    """A remark on the matrix that a model of Hugging Face shares with its table of tokens."""
    tied = configuration.value("tie_word_embeddings")
    heads = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
    kinds = configuration.value("architectures")
    speaks = isinstance(kinds, list) and any(str(kind).endswith(_SPEAKERS) for kind in kinds)
    if tied is not True or not speaks or any(name.endswith(heads) for name in names):
        return []
    tables = [name for name in names if name.endswith(_TOKENS)]
    if len(tables) != 1:
        return []
    return [f"{tables[0]} is the matrix of the outputs too (tie_word_embeddings in config.json)"]


def followed_note(names: list[str]) -> list[str]:
    """A remark on parameters that layers under a forward rule do not compute with as they are."""
    if not names:
        return []
    return [
        f"σ_max is of the parameters as stored, and specops followed the norms of {len(names)}: "
        f"{_some(names)}. If by SpectralNormalization or StableRankNormalization, layers compute "
        f"with other weights: save those, after detach(fold=True) or from normalize_params, to "
        f"measure them"
    ]


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more
