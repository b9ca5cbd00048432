"""How XLA compiles for tests, where each program runs once or twice."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_PLAIN = "--xla_backend_optimization_level=0"
_OF_SOME = "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
_TRIED = ((0, 5), (0, 10))
"""Versions of jaxlib between which these flags are known. A process ends at one that is not."""


def _flags() -> str:
    try:
        major, minor = map(int, version("jaxlib").split(".")[:2])
    except PackageNotFoundError:
        return _PLAIN
    known = _TRIED[0] <= (major, minor) <= _TRIED[1]
    return f"{_PLAIN} {_OF_SOME}" if known else _PLAIN


XLA_FLAGS = _flags()
"""Without optimisations, in one piece and without the passes that fuse operations: a third of the
time."""
