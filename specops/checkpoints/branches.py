"""Finding the tensors in the nested containers of a pickle or msgpack file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from specops.checkpoints.base import PLAIN_VALUE, Entry

_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "params")
_STATES: Final = ("optim", "scheduler")
_PLAIN: Final = (bool, int, float, complex, str, bytes, bytearray, type(None))
_Test = Callable[[Any], bool]


def unwrapped(loaded: Any, is_tensor: _Test, is_weight: _Test) -> Iterator[tuple[str, Any]]:
    """Names and leaves of what a training script saved, those of its model first.

    Parameters
    ----------
    loaded : object
        What the file holds.
    is_tensor : callable
        Whether something is a tensor.
    is_weight : callable
        Whether a tensor may be a model's weight, and no counter or random state.

    Yields
    ------
    tuple of str and object
        As `leaves` yields them. "state_dict" and the like are left out of the names unless another
        branch holds weights too. Names in an optimizer's or scheduler's state begin with
        "optimizer".
    """
    aside: list[tuple[str, Any]] = []
    entered: set[int] = set()
    while isinstance(loaded, Mapping) and id(loaded) not in entered:
        tensors, weights = _reaching(loaded, is_tensor), _reaching(loaded, is_weight)
        main = next((key for key in _WRAPPERS if id(loaded.get(key)) in tensors), None)
        states = {key for key, value in loaded.items() if _is_state(key, value)}
        pairs = {
            key: (f"optimizer.{key}" if key in states - {"optimizer"} else f"{key}", value)
            for key, value in loaded.items()
        }
        rivals = [loaded[key] for key in loaded if key != main and key not in states]
        entered.add(id(loaded))
        if main is None or any(is_weight(value) or id(value) in weights for value in rivals):
            yield from _walk([*pairs.values(), *aside], entered, is_tensor, ".")
            return
        loaded = loaded[main]
        aside = [pairs[key] for key in pairs if key != main] + aside
    yield from _walk([("", loaded), *aside], entered, is_tensor, ".")


def leaves(loaded: Any, is_tensor: _Test, separator: str = ".") -> Iterator[tuple[str, Any]]:
    """Names and leaves of nested dictionaries and sequences.

    Parameters
    ----------
    loaded : object
        What the file holds.
    is_tensor : callable
        Whether something is a tensor.
    separator : str, optional
        What joins the keys on the way to a leaf.

    Yields
    ------
    tuple of str and object
        A container without tensors is one leaf, or none if it is empty.
    """
    return _walk([("", loaded)], set(), is_tensor, separator)


def _walk(
    pairs: list[tuple[str, Any]], entered: set[int], is_tensor: _Test, separator: str
) -> Iterator[tuple[str, Any]]:
    tensors = _reaching([value for _, value in pairs], is_tensor)
    # A pickle can hold a container many times, or within itself: each is entered once.
    pending = pairs[::-1]
    while pending:
        name, thing = pending.pop()
        if is_tensor(thing):
            yield name or "tensor", thing
        elif id(thing) not in tensors:
            if not name or not _is_container(thing) or any(True for _ in _inside(thing)):
                yield name or "file", thing
        elif id(thing) not in entered:
            entered.add(id(thing))
            items = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
            prefix = f"{name}{separator}" if name else ""
            pending += [(f"{prefix}{key}", value) for key, value in list(items)[::-1]]


def no_tensor(name: str, thing: Any, plain: tuple[type, ...] = ()) -> Entry:
    """The entry of a leaf that is no tensor.

    Parameters
    ----------
    name : str
        Its name.
    thing : object
        The leaf.
    plain : tuple of types, optional
        What holds no numbers, besides Python's own values.
    """
    odd = _reaching([thing], lambda value: not _is_container(value) and not _is_plain(value, plain))
    if odd:
        return Entry(name, None, "", f"not a tensor but of type {type(thing).__name__}")
    return Entry(name, None, "", PLAIN_VALUE, harmless=True)


def _is_state(key: Any, value: Any) -> bool:
    """Whether a branch is the state of an optimizer or scheduler, by its key or its entries."""
    if isinstance(value, Mapping) and "state" in value and "param_groups" in value:
        return True
    return _is_container(value) and any(word in str(key).lower() for word in _STATES)


def _is_plain(value: Any, more: tuple[type, ...]) -> bool:
    return isinstance(value, _PLAIN + more)


def _is_container(thing: Any) -> bool:
    return isinstance(thing, Mapping | list | tuple | set | frozenset)


def _inside(thing: Any) -> Iterable[Any]:
    return thing.values() if isinstance(thing, Mapping) else thing


def _reaching(thing: Any, wanted: _Test) -> set[int]:
    """The ids of the containers that hold something wanted, at any depth."""
    holders: dict[int, list[int]] = defaultdict(list)
    found: list[int] = []
    entered, pending = {id(thing)}, [thing] if _is_container(thing) and not wanted(thing) else []
    while pending:
        outer = pending.pop()
        for inner in _inside(outer):
            if wanted(inner):
                found.append(id(outer))
            elif _is_container(inner):
                holders[id(inner)].append(id(outer))
                if id(inner) not in entered:
                    entered.add(id(inner))
                    pending.append(inner)
    reaching: set[int] = set()
    while found:
        at = found.pop()
        if at not in reaching:
            reaching.add(at)
            found += holders[at]
    return reaching
