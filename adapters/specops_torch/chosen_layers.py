"""The layers of a model that a caller names, or all of some kinds."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import nn

from specops.errors import AdapterError

Chosen = list[tuple[str, nn.Module]]


def chosen_layers(
    model: nn.Module,
    names: Sequence[str] | None,
    kinds: tuple[type[nn.Module], ...],
    *,
    with_last: bool = True,
) -> Chosen:
    """(name, layer) of the named layers, in that order, or of all layers of these kinds.

    Raises
    ------
    AdapterError
        A name is not one of the model's, or there is no such layer at all.
    """
    known = dict(model.named_modules())
    if names is None:
        names = [name for name, module in known.items() if isinstance(module, kinds)]
        names = names if with_last else names[:-1]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise AdapterError(f"no such modules: {', '.join(unknown)}" if unknown else "no layers")
    return [(name, known[name]) for name in names]


def check_all_ran(layers: Chosen, ran: Container[str]) -> None:
    """Raise `AdapterError` if a forward pass left one of the layers out."""
    missing = [name for name, _ in layers if name not in ran]
    if missing:
        raise AdapterError(f"{', '.join(missing)} did not run")
