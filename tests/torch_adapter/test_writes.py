"""What tells a parameter that was written to from its copy."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from specops_torch.writes import fingerprint  # noqa: E402

SHAPE = (1500, 2000)
"""Of more entries than are widened together."""


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that operations make beside a tensor's own."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.own, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
        if storage is not None and storage.data_ptr() != self.own:
            self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_a_copy_has_the_same_numbers_and_what_was_written_to_has_others(dtype: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).to(dtype)
    before = fingerprint(weight)
    assert fingerprint(weight.clone()) == before
    swapped = weight.clone()
    # Entries of two parts change places, which sums alone do not show.
    swapped[0, 0], swapped[-1, -1] = weight[-1, -1], weight[0, 0]
    assert fingerprint(swapped) != before
    for index in ((0, 0), (700, 3), (-1, -1)):
        changed = weight.clone()
        changed[index] += 0.5
        assert fingerprint(changed) != before


def test_it_makes_nothing_as_large_as_the_weight() -> None:
    weight = torch.zeros(SHAPE)
    with Largest(weight) as largest:
        fingerprint(weight)
    assert 0 < largest.bytes < weight.nbytes
