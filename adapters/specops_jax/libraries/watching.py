"""Tracing a module, and watching the inputs of its layers meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import jax


def trace(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """The shapes of ``function(*inputs)``: arrays are traced, other arguments are constants."""
    leaves, structure = jax.tree.flatten(inputs)
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def call(arrays: list[Any]) -> Any:
        given = iter(arrays)
        merged = [next(given) if a else x for x, a in zip(leaves, is_array, strict=True)]
        return function(*jax.tree.unflatten(structure, merged))

    return jax.eval_shape(call, [x for x, a in zip(leaves, is_array, strict=True) if a])


@contextmanager
def watched(kinds: Iterable[type], seen: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call ``seen(layer, input)`` at every call of a layer of these classes."""
    with ExitStack() as stack:
        for kind in kinds:
            plain = kind.__call__

            def call(self: Any, *args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
                seen(self, args[0] if args else next(iter(kwargs.values())))
                return _plain(self, *args, **kwargs)

            stack.enter_context(patch.object(kind, "__call__", call))
        yield
