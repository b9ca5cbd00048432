"""Finding adapters: entry points of group "specops", loaded one by one and never fatal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pluggy

from specops import hookspecs
from specops.errors import AdapterError, PluginWarning, SpecopsError
from specops.hookspecs import Adapter, AdapterStatus
from specops.warned import warn

_broken: dict[str, str] = {}


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager: every entry point that loads."""
    from importlib import metadata  # a fifth of the package's import time

    pm = pluggy.PluginManager(hookspecs.PROJECT)
    pm.add_hookspecs(hookspecs.Specs)
    _broken.clear()
    for entry in metadata.entry_points(group=hookspecs.PROJECT):
        if pm.has_plugin(entry.name):
            _report_broken(entry.name, ImportError("another plugin has this name already"))
            continue
        try:
            pm.register(entry.load(), name=entry.name)
            pm.check_pending()
            if not pm.get_hookcallers(pm.get_plugin(entry.name)):
                raise TypeError("it has no hook: mark its functions with specops.authors.hookimpl")
        except (Exception, SystemExit) as error:
            if pm.has_plugin(entry.name):
                pm.unregister(name=entry.name)
            _report_broken(entry.name, error)
    return pm


def find_adapter(model: Any, optimizer: Any = None) -> Adapter:
    """The adapter that knows this model; `AdapterError` naming the candidates if none does."""
    refusals: list[SpecopsError] = []
    for found in answers("specops_adapter", Adapter, refusals, model=model, optimizer=optimizer):
        return found  # type: ignore[no-any-return]
    if refusals:
        raise refusals[0]
    for _ in answers("specops_adapter", Adapter, [], model=optimizer, optimizer=None):
        raise AdapterError("the arguments are swapped: attach(optimizer, model, rule_or_plan)")
    known = statuses()
    listed = "; ".join(f"{s.name} ({s.detail})" if s.detail else s.name for s in known)
    remedy = "" if any(s.available for s in known) else ". For torch: pip install 'specops[torch]'"
    if isinstance(model, Mapping):
        remedy = (
            ". Pass the module, not its arrays; or each array to a function, such as "
            "specops.project_spectral_ball"
        )
    raise AdapterError(
        f"no adapter knows a model of type {type(model).__module__}.{type(model).__name__}. "
        f"Installed adapters: {listed or 'none'}{remedy}"
    )


def statuses() -> list[AdapterStatus]:
    """The status of every installed adapter; of a broken one, why it is broken."""
    found = list(answers("specops_adapter_status", AdapterStatus, []))
    failed = [AdapterStatus(name, False, reason) for name, reason in _broken.items()]
    return sorted(found + failed, key=lambda status: status.name)


def answers(hook: str, kind: type, refusals: list[SpecopsError], **arguments: Any) -> Iterator[Any]:
    """Results of every implementation in turn; one that fails is reported and left out.

    Errors of specops itself are an adapter's answer to the user and go into `refusals`.
    """
    pm = manager()
    for implementation in reversed(getattr(pm.hook, hook).get_hookimpls()):
        try:
            chosen = {name: arguments[name] for name in implementation.argnames}
            result = implementation.function(**chosen)
            if result is not None and not isinstance(result, kind):
                raise TypeError(f"{hook} returned {result!r}, no {kind.__name__}")
            if isinstance(result, type):  # a class passes the protocol's check for methods, too
                name = result.__name__
                raise TypeError(f"{hook} returned the class {name}, no instance: {name}()")
        except SpecopsError as error:
            refusals.append(error)
        except (Exception, SystemExit) as error:
            _report_broken(implementation.plugin_name, error)
            pm.unregister(implementation.plugin)
        else:
            if result is not None:
                yield result


def _report_broken(name: str, error: BaseException) -> None:
    _broken[name] = f"{type(error).__name__}: {error}"
    warn(f"the specops plugin {name!r} failed and is ignored ({_broken[name]})", PluginWarning)
