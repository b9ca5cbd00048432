"""Checks that specops finds the adapter, and that the model suits the kit."""

from __future__ import annotations

import numpy as np
import pytest

from specops import plugins
from specops.errors import AdapterError
from specops.geometry import Conv, Dense
from specops.hookspecs import Adapter
from specops.rules import Monitor
from specops.testing.base import BOUND, SuiteBase, changed, listed, norms_of

_UNRULED_STEPS = 8


class RegistrationChecks(SuiteBase):
    """The plugin's two hooks, and the assumptions of all other checks."""

    def test_the_plugin_is_available(self) -> None:
        """``specops adapters`` lists it as usable."""
        self._needs_registration()
        found = {status.name: status for status in plugins.statuses()}
        assert self.name in found, (
            f"no adapter is called {self.name!r}; installed are {sorted(found)}. Likely cause: "
            f"the entry point in the group 'specops' is missing, or name= differs from the one "
            f"in AdapterStatus"
        )
        assert found[self.name].available, (
            f"{self.name} says that it is not available here: {found[self.name].detail}"
        )

    def test_the_plugin_knows_the_model(self) -> None:
        """The hook claims the suite's model, and no other object."""
        self._needs_registration()
        adapter = plugins.find_adapter(self.model())
        assert isinstance(adapter, Adapter)
        assert adapter.name == self.name, (
            f"specops_adapter(model) is answered by {adapter.name!r}, not by {self.name!r}: "
            f"another plugin claims this model first"
        )
        with pytest.raises(AdapterError, match="no adapter knows"):
            plugins.find_adapter(object())

    def test_the_model_suits_the_kit(self) -> None:
        """Dense and convolution, a bias, norms above the bound that grow, repeatable."""
        training, again = (self.start(self.model(), Monitor()) for _ in range(2))
        training.step()
        geometries = dict(training.geometries)
        names, listed_names = set(geometries), set(self.constrained(training))
        assert names == listed_names, (
            f"geometries lists {sorted(names)}, the report has rules on {sorted(listed_names)}"
        )
        kinds = {type(g) for g in geometries.values()}
        assert kinds == ({Dense, Conv} if self.capabilities.convolutions else {Dense}), (
            f"model() needs a dense layer and, unless the capabilities deny convolutions, one of "
            f"them; it has {geometries}"
        )
        unsized = [n for n, g in geometries.items() if not g.has_size]
        assert not unsized, (
            f"after one step the input sizes of {unsized} are not known: the geometry has "
            f"input_shape=None. Learn it in the forward pass, or take geometries= from the user"
        )
        assert set(training.weights()) - names, "model() needs a parameter without a rule (a bias)"
        again.step()
        different = changed(again.weights(), training.weights())
        assert not different, (
            f"two runs differ in {listed(different)}: model() and start() must give the same "
            f"values and data at every call"
        )
        for _ in range(_UNRULED_STEPS):
            training.step()
        ended = [n for n, w in training.weights().items() if not np.all(np.isfinite(w))]
        assert not ended, (
            f"{ended} are not finite after {_UNRULED_STEPS} steps: start() with a lower rate"
        )
        inside = {n: s for n, s in norms_of(training).items() if s <= BOUND * 1.01}
        assert not inside, (
            f"without a rule the norms of {listed(inside)} are at most {BOUND} after "
            f"{_UNRULED_STEPS} steps: checks of the bound could not fail. Begin with larger "
            f"weights, or a higher rate"
        )

    def _needs_registration(self) -> None:
        if not self.capabilities.registered:
            pytest.skip("a run on a stand-in, which the plugin does not claim")
