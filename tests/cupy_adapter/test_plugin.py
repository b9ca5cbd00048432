"""What the plugin claims and says, with a fake of the cupy module."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import specops
import specops_cupy
from specops import plugins
from specops.errors import AdapterError, UnsupportedArrayError
from specops.rules import ClipSpectralNorm
from specops_cupy import device
from specops_cupy.plugin import specops_adapter, specops_adapter_status
from tests.cupy_adapter.libraries import absent, fake_cupy

RULE = ClipSpectralNorm(1.0)
MAPS = {"layer.w": specops.Dense()}


def test_status_names_version_and_device(cupy: Any) -> None:
    status = specops_adapter_status()
    assert (status.name, status.available) == ("cupy", True)
    assert status.detail == "cupy 99.0, Fake 9000"
    assert status in plugins.statuses()


def test_status_counts_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(devices=2))
    assert specops_adapter_status().detail == "cupy 99.0, 2 × Fake 9000"


def test_status_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(devices=0))
    status = specops_adapter_status()
    assert not status.available
    assert "cupy 99.0 is installed, but there is no device" in status.detail
    assert "nvidia-smi" in status.detail


def test_status_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    with absent(monkeypatch):
        status = specops_adapter_status()
    assert not status.available
    assert "pip install 'specops[cupy]'" in status.detail


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13: cannot open\nmore lines"), RuntimeError()]
)
def test_status_of_a_broken_installation(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(device, "import_module", fail)
    status = specops_adapter_status()
    assert not status.available
    assert f"does not load ({type(error).__name__}" in status.detail
    assert "more lines" not in status.detail
    assert "wheel" in status.detail


def test_warnings_of_the_import_stay_quiet(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(name: str) -> Any:
        import warnings

        warnings.warn("CUDA path could not be detected", stacklevel=2)
        return cupy

    monkeypatch.setattr(device, "import_module", warn)
    assert specops_adapter_status().available


def test_dicts_with_a_cupy_array_are_claimed(cupy: Any) -> None:
    array = cupy.asarray(np.eye(2))
    for model in ({"w": array}, {"lr": 0.1, "layer": {"b": None, "w": array}}):
        adapter = plugins.find_adapter(model)
        assert adapter.name == "cupy"


@pytest.mark.parametrize("model", [{"w": np.eye(2)}, {}, [1], {"a": {"b": 1}}, None])
def test_other_models_are_not(cupy: Any, model: Any) -> None:
    assert specops_adapter(model=model) is None


def test_nothing_is_claimed_before_cupy_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert specops_adapter(model={"w": np.eye(2)}) is None
    assert "cupy" not in sys.modules


def test_bare_array_is_told_what_to_pass(cupy: Any) -> None:
    with pytest.raises(AdapterError, match=r"pass a dict, \{\"w\": array\}"):
        specops.attach(None, cupy.asarray(np.eye(2)), RULE)


def test_attach_and_project_come_through_the_plugin(cupy: Any) -> None:
    model = {"layer": {"w": cupy.asarray(np.diag([4.0, 0.5]))}}
    attachment = specops.attach(None, model, RULE, geometries=MAPS, on_nonfinite="skip")
    assert isinstance(attachment, specops_cupy.Attachment)
    attachment.step()
    assert np.allclose(model["layer"]["w"], np.diag([1.0, 0.5]))
    model["layer"]["w"][0, 0] = 3.0
    report = specops.project(model, RULE, geometries=MAPS)
    assert report["layer.w"].norm == pytest.approx(1.0)
    assert np.allclose(model["layer"]["w"], np.diag([1.0, 0.5]))
    with pytest.raises(AdapterError, match=r"call attachment\.step"):
        specops.attach(object(), model, RULE, geometries=MAPS)


def test_work_is_done_on_the_arrays_device(cupy: Any) -> None:
    model = {"layer": {"w": cupy.asarray(np.diag([4.0, 0.5]))}}
    attachment = specops.attach(None, model, RULE, geometries=MAPS)
    del cupy.entered[:]
    attachment.step()
    assert cupy.entered[:2] == [3, None]
    assert specops_cupy.spectral_norm(cupy.asarray(np.diag([4.0, 0.5]))) == 4.0
    assert cupy.entered[-2:] == [3, None]


@pytest.mark.parametrize("name", [n for n in specops_cupy.__all__ if hasattr(specops, n)])
def test_functions_take_cupy_arrays_only(cupy: Any, name: str) -> None:
    if name == "attach":
        return
    function = getattr(specops_cupy, name)
    assert function.__doc__ == getattr(specops, name).__doc__
    with pytest.raises(UnsupportedArrayError, match=rf"specops\.{name} takes it where it is"):
        function(np.eye(2))


def test_functions_without_cupy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with absent(monkeypatch), pytest.raises(AdapterError, match=r"specops\[cupy\]"):
        specops_cupy.spectral_norm(np.eye(2))


def test_every_name_is_there() -> None:
    assert specops_cupy.__all__ == sorted(specops_cupy.__all__)
    assert set(specops_cupy.__all__) <= set(dir(specops_cupy))
    for name in specops_cupy.__all__:
        assert getattr(specops_cupy, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        specops_cupy.nonsense  # noqa: B018
