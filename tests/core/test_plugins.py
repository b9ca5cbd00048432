"""Adapters are found through hooks; a broken one is named and does no harm."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pytest

import specops
from specops import errors, plugins
from specops.hookspecs import AdapterStatus, hookimpl


class FakeEntry:
    """An entry point that loads to whatever it is given, or raises it."""

    def __init__(self, name: str, loaded: Any) -> None:
        self.name = name
        self.loaded = loaded

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend that only these entry points are installed."""

    def pretend(*entries: FakeEntry) -> None:
        monkeypatch.setattr(metadata, "entry_points", lambda group: list(entries))
        plugins.manager.cache_clear()

    yield pretend
    monkeypatch.undo()
    plugins.manager.cache_clear()


def plugin(**hooks: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{name: hookimpl(f) for name, f in hooks.items()})


class GoodAdapter:
    """Knows lists; records what it was asked."""

    name = "good"

    def attach(self, optimizer: Any, model: Any, plan: Any, **options: Any) -> Any:
        return ("attached", optimizer, model, plan, options)

    def project(self, model: Any, plan: Any, **options: Any) -> Any:
        return ("projected", model, plan, options)


def good_plugin() -> types.SimpleNamespace:
    return plugin(
        specops_adapter=lambda model: GoodAdapter() if isinstance(model, list) else None,
        specops_adapter_status=lambda: AdapterStatus("good", True),
    )


def test_built_ins_come_through_the_same_entry_points() -> None:
    names = {entry.name for entry in metadata.entry_points(group="specops")}
    assert {"torch", "jax", "cupy"} <= names
    assert names <= {status.name for status in plugins.statuses()}


def test_third_party_adapter_is_used(install: Any) -> None:
    install(FakeEntry("good", good_plugin()))
    rule = specops.ClipSpectralNorm(2.0)
    kind, optimizer, model, plan, options = specops.attach("opt", [1], rule, every=3, extra=1)
    assert (kind, optimizer, model, options) == (
        "attached",
        "opt",
        [1],
        {"geometries": None, "extra": 1},
    )
    assert plan == specops.Plan([("*", rule)], every=3)
    with pytest.raises(errors.AdapterError, match="arguments are swapped"):
        specops.attach([1], "opt", rule)
    assert specops.project([1], rule)[0] == "projected"


def test_plugin_that_fails_to_import_is_named(install: Any) -> None:
    install(FakeEntry("bad", ImportError("no module named bad")), FakeEntry("good", good_plugin()))
    with pytest.warns(errors.PluginWarning, match="plugin 'bad'.*no module named bad"):
        assert specops.attach(None, [1], specops.Monitor())[0] == "attached"
    bad = next(s for s in plugins.statuses() if s.name == "bad")
    assert not bad.available
    assert "no module named bad" in bad.detail


def test_plugin_that_fails_when_called_is_named_and_left_out(install: Any) -> None:
    def crash(model: Any) -> Any:
        raise ZeroDivisionError("oops")

    install(FakeEntry("good", good_plugin()), FakeEntry("bad", plugin(specops_adapter=crash)))
    with pytest.warns(errors.PluginWarning, match="plugin 'bad'.*oops"):
        specops.attach(None, [1], specops.Monitor())
    specops.attach(None, [1], specops.Monitor())


def test_misspelt_hook_is_named(install: Any) -> None:
    install(FakeEntry("typo", plugin(specops_adaptor=lambda model: None)))
    with pytest.warns(errors.PluginWarning, match="plugin 'typo'.*specops_adaptor"):
        plugins.manager()


@pytest.mark.parametrize(
    "hooks",
    [
        {"specops_adapter": lambda model: 42},
        {"specops_adapter_status": lambda: "fine"},
        {"specops_adapter": lambda: sys.exit(3)},
    ],
)
def test_plugin_that_answers_nonsense_is_named(install: Any, hooks: Any) -> None:
    install(FakeEntry("good", good_plugin()), FakeEntry("bad", plugin(**hooks)))
    use = [lambda: specops.attach(None, [1], specops.Monitor()), plugins.statuses]
    with pytest.warns(errors.PluginWarning, match="plugin 'bad'"):
        results = [function() for function in use]
    assert results[0][0] == "attached"
    assert not next(s for s in results[1] if s.name == "bad").available


def test_plugin_without_a_hook_is_named(install: Any) -> None:
    forgotten = types.SimpleNamespace(specops_adapter=lambda model: GoodAdapter())
    install(FakeEntry("bare", forgotten))
    with pytest.warns(errors.PluginWarning, match="plugin 'bare'.*no hook.*hookimpl"):
        plugins.manager()


def test_plugin_that_answers_with_a_class_is_named(install: Any) -> None:
    install(FakeEntry("kind", plugin(specops_adapter=lambda model: GoodAdapter)))
    with (
        pytest.warns(errors.PluginWarning, match=r"plugin 'kind'.*the class GoodAdapter, .*\(\)"),
        pytest.raises(errors.AdapterError, match="no adapter knows"),
    ):
        specops.attach(None, [1], specops.Monitor())


def test_second_plugin_of_a_name_is_reported(install: Any) -> None:
    install(FakeEntry("good", good_plugin()), FakeEntry("good", plugin()))
    with pytest.warns(errors.PluginWarning, match="another plugin has this name"):
        plugins.manager()


def test_refusal_of_one_adapter_does_not_stop_another(install: Any) -> None:
    def refuse(model: Any) -> Any:
        raise errors.AdapterError("not there yet")

    install(FakeEntry("good", good_plugin()), FakeEntry("no", plugin(specops_adapter=refuse)))
    assert specops.attach(None, [1], specops.Monitor())[0] == "attached"
    with pytest.raises(errors.AdapterError, match="not there yet"):
        specops.attach(None, object(), specops.Monitor())


def test_unknown_model_lists_the_adapters() -> None:
    with pytest.raises(errors.AdapterError, match=r"type builtins.object.*torch"):
        specops.attach(None, object(), specops.Monitor())
    with pytest.raises(errors.AdapterError, match=r"Pass the module, not its arrays"):
        specops.project({"w": np.ones((2, 3))}, specops.Monitor())


def test_missing_framework_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    import specops_cupy.plugin
    import specops_jax.plugin
    import specops_torch.plugin

    monkeypatch.setattr(util, "find_spec", lambda name: None)
    for module, name in [(specops_torch, "torch"), (specops_jax, "jax"), (specops_cupy, "cupy")]:
        status = module.plugin.specops_adapter_status()
        assert not status.available
        assert f"specops[{name}]" in status.detail


def test_jax_has_nothing_to_attach_to_and_says_what_to_use() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(errors.AdapterError, match=r"specops_jax\.constrain"):
        specops.attach(None, {"layer": {"kernel": jax.numpy.ones((2, 2))}}, specops.Monitor())
