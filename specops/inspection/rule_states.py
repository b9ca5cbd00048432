"""Which tensors of a checkpoint are states of specops' own rules, saved beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from specops.tracking import NORM_KEYS


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


def followed(names: Sequence[str]) -> list[str]:
    """The weights, in order and by their own names, whose state is vectors along a norm.

    That is how forward rules keep them, and penalties. Names do not tell which of the two it is.
    """
    states, found = rule_states(names), dict[str, None]()
    for state in (name for name in names if name in states):
        *ahead, key = state.replace("/", ".").split(".")
        if key not in NORM_KEYS or ahead[-1] == "tracked":
            continue
        if ahead[-1] == "state" and "weights" in ahead:
            found[".".join(ahead[ahead.index("weights") + 1 : -1])] = None
        elif "rules" in ahead:
            found[".".join(ahead[ahead.index("rules") + 1 :])] = None
    return [*found]
