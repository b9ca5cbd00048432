"""Names of the arrays in a pytree: the path's keys, joined by "/"."""

from __future__ import annotations

from typing import Any

import jax

_COLLECTION = "params"
_UNWRAPPED = ("value", "raw_value")


def named_leaves(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """((name, leaf) for every leaf, the tree's structure).

    The leading key of flax's collection of parameters is left out, and so is the attribute in
    which its variables hold their value.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(params)
    return [(name_of(path), leaf) for path, leaf in found], structure


def masked_names(params: Any) -> list[str]:
    """Names of the parameters that `optax.masked` and `optax.multi_transform` hide."""
    import optax

    nodes = (optax.MaskedNode,)
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, nodes))
    return [name_of(path) for path, leaf in found[0] if isinstance(leaf, nodes)]


def name_of(path: tuple[Any, ...]) -> str:
    """A path of keys as one name."""
    parts = [_key(entry) for entry in path]
    if len(parts) > 1 and parts[0] == _COLLECTION:
        parts = parts[1:]
    last = path[-1] if path else None
    if len(parts) > 1 and parts[-1] in _UNWRAPPED and not isinstance(last, jax.tree_util.DictKey):
        parts = parts[:-1]
    return "/".join(parts)


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
