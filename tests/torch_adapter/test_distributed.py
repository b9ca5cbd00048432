"""Rules on several ranks; each number of ranks is one group, in which all its cases run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    pytest.skip("older fully_shard needs streams of a device", allow_module_level=True)

from tests.torch_adapter.distributed import loading, meshes, rules, training  # noqa: E402
from tests.torch_adapter.distributed.models import load  # noqa: E402
from tests.torch_adapter.distributed.ranks import run  # noqa: E402

pytestmark = pytest.mark.slow


def check(cases: Any, folder: Path) -> None:
    """All cases of a module end as they should, in one group of as many ranks as it says."""
    failures = {name: end for name, end in run(cases.CASES, cases.RANKS, folder).items() if end}
    assert failures == getattr(cases, "ENDS", {}), "\n\n".join(
        f"{name}: {failure}" for name, failure in failures.items()
    )


def test_rules(tmp_path: Path) -> None:
    check(rules, tmp_path)


def test_meshes(tmp_path: Path) -> None:
    check(meshes, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_training_and_its_checkpoints(tmp_path: Path) -> None:
    """What two ranks have saved is loaded on three, and by this process."""
    check(training, tmp_path)
    check(loading, tmp_path)
    load(tmp_path, lambda model: model)
