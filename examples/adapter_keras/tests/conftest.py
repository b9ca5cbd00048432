"""What every test needs to know of Keras."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of Keras itself about NumPy 2."""
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")
