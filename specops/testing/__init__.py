"""The conformance kit for adapters: subclass `AdapterSuite`, run pytest.

Needs pytest (``pip install 'specops[testing]'``) and nothing else beyond specops, NumPy and the
adapter's own framework.
"""

from __future__ import annotations

from pkgutil import iter_modules

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "specops.testing needs pytest: pip install 'specops[testing]'", name="pytest"
    ) from error

# Before the import below, or failing checks print no values.
pytest.register_assert_rewrite(*(m.name for m in iter_modules(__path__, "specops.testing.")))

from specops.testing.cases import Capabilities, LayerCase, Training  # noqa: E402
from specops.testing.suite import AdapterSuite  # noqa: E402

__all__ = ["AdapterSuite", "Capabilities", "LayerCase", "Training"]
