"""Which tensors of a checkpoint are states of specops' own rules, saved beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def rule_states(names: Iterable[str]) -> set[str]:
    """Those of a checkpoint's names that belong to the state of an attachment, or of JAX's rules.

    Such a state says of each weight, by the weight's own name, whether its vectors are behind it
    ("drifting"), or when its rule fired last. That tells it from layers of a model that are called
    alike.
    """
    plain = {name: name.replace("/", ".") for name in names}
    present = set(plain.values())
    return {name for name, dotted in plain.items() if not present.isdisjoint(_beside(dotted))}


def _beside(name: str) -> Iterator[str]:
    """What stands beside a tensor if it belongs to the state of a rule.

    Names of weights and of a state's arrays have dots of their own, so that all parts are tried.
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        ahead, rest = parts[:at], parts[at + 1 :]
        if part == "state" and "weights" in ahead and rest:
            yield ".".join([*ahead, "drifting"])
        if part in ("rules", "figures"):
            for end in range(1, len(rest)):
                yield ".".join([*ahead, "fired", *rest[:end]])
