"""An adapter for the MLPs of scikit-learn: all that a library of plain arrays takes.

Run it: an MLP learns handwritten digits, and no matrix ever has a norm above 1.

A package of your own would name this module in its entry points, in the group "specops"; here
it is registered by hand.
"""

from __future__ import annotations

import sys

from specops import ClipSpectralNorm, Dense, attach
from specops.authors import (
    AdapterError,
    AdapterStatus,
    BaseAdapter,
    BaseAttachment,
    Parameter,
    Weight,
    hookimpl,
    manager,
)

# Which arrays there are.


class Layer(Parameter):
    """One array of ``model.coefs_``, in × out, or of ``model.intercepts_``."""

    def __init__(self, name, array):
        self.array = array
        self.weight = Weight.of(name, array.shape, str(array.dtype), Dense(out_axes=(1,)))

    def read(self):
        return self.array

    def write(self, value):
        self.array[...] = value

    def check_writable(self):
        if not self.array.flags.writeable:
            raise AdapterError(f"{self.weight.name} is read-only: give the MLP a copy of it")

    def identity(self):
        return id(self.array)


# The adapter.


class Attachment(BaseAttachment):
    """Call its `step` after each `partial_fit` of one batch."""

    def __init__(self, optimizer, model, plan, geometries=None, **options):
        super().__init__(plan, geometries, **options)
        if optimizer is not None:
            raise AdapterError("an MLP steps by itself: pass None, and call attachment.step()")
        if not hasattr(model, "coefs_"):
            raise AdapterError("the MLP has no weights yet: call partial_fit once")
        self.model = model
        self.assign()

    def look(self):
        super().look()
        self.assign()  # `fit` makes new arrays, and other layers if asked to

    def parameters(self):
        kinds = ("coefs_", "intercepts_")
        found = {kind: enumerate(getattr(self.model, kind)) for kind in kinds}
        return [Layer(f"{kind}.{i}", w) for kind in kinds for i, w in found[kind]]


class Adapter(BaseAdapter):
    name = "sklearn"
    attachment = Attachment


@hookimpl
def specops_adapter(model):
    networks = sys.modules.get("sklearn.neural_network")
    if networks and isinstance(model, (networks.MLPClassifier, networks.MLPRegressor)):
        return Adapter()
    return None


@hookimpl
def specops_adapter_status():
    return AdapterStatus("sklearn", available=True, supports="weights")


def main():
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    manager().register(sys.modules[__name__], "sklearn")
    x, y = load_digits(return_X_y=True)
    x = x / 16.0
    model = MLPClassifier(hidden_layer_sizes=(64, 64), learning_rate_init=0.01, random_state=0)
    model.partial_fit(x[:200], y[:200], classes=range(10))
    attachment = attach(None, model, ClipSpectralNorm(1.0))
    for _ in range(5):
        for start in range(0, len(x), 200):
            model.partial_fit(x[start : start + 200], y[start : start + 200])
            attachment.step()
    attachment.report().show()
    print(f"accuracy {model.score(x, y):.3f} in {attachment.steps} steps")
    return attachment


if __name__ == "__main__":
    main()
