"""`AdapterSuite`: every check of the conformance kit."""

from __future__ import annotations

from specops.testing.bad_input import BadInputChecks
from specops.testing.checkpoints import CheckpointChecks
from specops.testing.forward import ForwardChecks
from specops.testing.geometry import GeometryChecks
from specops.testing.gradients import GradientChecks
from specops.testing.histories import HistoryChecks
from specops.testing.laws import LawChecks
from specops.testing.registration import RegistrationChecks
from specops.testing.third_party import ThirdPartyChecks
from specops.testing.weights import WeightChecks


class AdapterSuite(
    RegistrationChecks,
    GeometryChecks,
    WeightChecks,
    GradientChecks,
    ForwardChecks,
    HistoryChecks,
    CheckpointChecks,
    BadInputChecks,
    LawChecks,
    ThirdPartyChecks,
):
    """Everything that specops asks of an adapter. Subclass it in a test module and run pytest.

    Attributes
    ----------
    name : str
        As ``specops adapters`` lists the adapter.
    capabilities : Capabilities
        What the adapter claims; checks of the rest are skipped, with the reason.

    Notes
    -----
    Implement `model`, `layers`, `start`, `array`, `numpy`, and `jit` if you claim it. Implement
    `freeze`, which freezes a weight, or that check is skipped. Two more may be overridden if the
    default does not suit: `project` (``specops.project``) and `examine` (how the kit learns a
    layer's weight and geometry).

    The kit finds wrong maps, rules that act at the wrong time or not at all, state that is lost
    and errors that are swallowed. It does not test tied weights, steps that the framework skips
    (loss scaling) or spreads over several batches, devices other than the one that `array` uses,
    sharded or low-precision weights, or how an adapter copes with compiled, copied or wrapped
    models.

    Examples
    --------
    .. code-block:: python

        class TestMyAdapter(AdapterSuite):
            name = "mine"
            capabilities = Capabilities(stages=("weights",))

            def model(self):
                return mine.Sequential(mine.Conv(1, 4, 3), mine.Dense(16, 3))

            ...
    """
