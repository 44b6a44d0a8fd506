"""The plug-in host: finds plug-ins, keeps the broken ones apart, and looks records up by name.

A hook returns named records. The built-ins come first, then every installed distribution that has an entry point in
the group `trl_moe_ext`, by distribution and name. A third-party plug-in that cannot be loaded, or whose records cannot
be taken, is reported once as a `PluginWarning` and the others go on; an error in a built-in is our own and is raised.
Only registration is guarded in this way: what a record does later, in training, is never caught here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pluggy

from trl_moe_ext import hookspecs
from trl_moe_ext._version import __version__
from trl_moe_ext.errors import PluginError, near_matches

__all__ = ["BUILTINS", "Plugin", "PluginHost", "PluginWarning", "host"]

# Name of the plug-in and its module, which is imported when the first record is asked for.
BUILTINS = (
    ("builtin_kernels", "trl_moe_ext.kernels.builtin"),
    ("builtin_families", "trl_moe_ext.experts.families"),
    ("builtin_router_losses", "trl_moe_ext.router.builtin"),
    ("builtin_rollout_backends", "trl_moe_ext.grpo.backends.builtin"),
)


class PluginWarning(UserWarning):
    """A third-party plug-in, or one of its records, was left out."""


@dataclass
class Plugin:
    """One plug-in as `trl-moe plugins` shows it.

    Attributes:
        hooks: the hooks that it implements.
        records: hook name -> names of the records that were taken.
        errors: what was left out and why.
    """

    name: str
    distribution: str
    version: str
    builtin: bool = False
    hooks: list[str] = field(default_factory=list)
    records: dict[str, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`"ok"` if all that it offers was taken, else `"error"`."""
        return "error" if self.errors else "ok"

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


class PluginHost:
    """Loads the plug-ins at the first question and remembers the answers.

    Args:
        builtins: pairs of plug-in name and module name.
        record_types: hook name -> `"module:Class"` of its records.
    """

    def __init__(
        self,
        builtins: Iterable[tuple[str, str]] = BUILTINS,
        record_types: Mapping[str, str] = hookspecs.RECORD_TYPES,
    ) -> None:
        self._builtins = tuple(builtins)
        self._record_types = record_types
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._records: dict[str, dict[str, Any]] = {}

    def records(self, hook_name: str) -> dict[str, Any]:
        """All records of a hook by name. A name that is taken is refused to whoever comes later.

        Raises:
            PluginError: there is no such hook.
        """
        if hook_name not in self._record_types:
            raise PluginError(f"{hook_name!r} is not a hook; {near_matches(hook_name, self._record_types)}")
        if hook_name not in self._records:
            self._records[hook_name] = self._collect(hook_name)
        return dict(self._records[hook_name])

    def lookup(self, hook_name: str, name: str) -> Any:
        """The record called `name`.

        Raises:
            PluginError: there is none. The message has the near matches and what was left out of plug-ins.
        """
        records = self.records(hook_name)
        if name in records:
            return records[name]
        message = f"{hook_name} has no {name!r}; {near_matches(name, records)}"
        failed = [f"plug-in {plugin}: {error}" for plugin in self._plugins.values() for error in plugin.errors]
        raise PluginError(f"{message}. Left out: {'; '.join(failed)}" if failed else message)

    def status(self) -> list[Plugin]:
        """Every plug-in, after each of its hooks was called once."""
        for hook_name in self._record_types:
            self.records(hook_name)
        return list(self._plugins.values())

    @functools.cached_property
    def _plugins(self) -> dict[str, Plugin]:
        """Every plug-in that was found, registered or not, by the name under which pluggy knows it."""
        plugins = {}
        for name, module in self._builtins:
            plugins[name] = Plugin(name, hookspecs.PROJECT, __version__, builtin=True)
            self._register(name, plugins[name], importlib.import_module(module))
        for entry_point in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=_origin):
            key = ":".join(_origin(entry_point))
            plugins[key] = Plugin(entry_point.name, *_distribution(entry_point))
            with self._guarded(plugins[key]):
                self._register(key, plugins[key], entry_point.load())
        return plugins

    def _register(self, key: str, plugin: Plugin, implementation: object) -> None:
        """Hands a loaded plug-in to pluggy, whole or not at all."""
        if self._manager.is_registered(implementation):
            raise PluginError(f"the same object is registered as {self._manager.get_name(implementation)}")
        try:
            self._manager.register(implementation, name=key)
            plugin.hooks = self._known_hooks(implementation)
        except Exception:
            # pluggy before 1.7 leaves a plug-in that fails its validation half registered.
            if self._manager.is_registered(implementation):
                self._manager.unregister(implementation)
            raise

    def _known_hooks(self, implementation: object) -> list[str]:
        """The hooks that a plug-in implements; raises PluginError if it has none, or one that does not exist."""
        known = []
        for caller in self._manager.get_hookcallers(implementation) or ():
            if caller.has_spec():
                known.append(caller.name)
            elif not all(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is implementation):
                raise PluginError(f"{caller.name} is not a hook; {near_matches(caller.name, self._record_types)}")
        if not known:
            raise PluginError("it implements no hook; decorate its functions with trl_moe_ext.hookspecs.hookimpl")
        return sorted(known)

    def _collect(self, hook_name: str) -> dict[str, Any]:
        records: dict[str, Any] = {}
        owners: dict[str, Plugin] = {}
        for key, plugin in self._plugins.items():
            offered: Sequence[Any] = ()
            if hook_name in plugin.hooks:
                with self._guarded(plugin):
                    offered = self._call(hook_name, key)
            for record in offered:
                with self._guarded(plugin):
                    if record.name in records:
                        raise PluginError(f"{hook_name}: the name {record.name!r} is taken by {owners[record.name]}")
                    records[record.name], owners[record.name] = record, plugin
                    plugin.records.setdefault(hook_name, []).append(record.name)
        return records

    def _call(self, hook_name: str, key: str) -> Sequence[Any]:
        """Calls the hook of one plug-in; raises PluginError unless the result is a sequence of the hook's records."""
        others = [other for name, other in self._manager.list_name_plugin() if name != key]
        result, *more = self._manager.subset_hook_caller(hook_name, remove_plugins=others)() or (None,)
        expected = pkgutil.resolve_name(self._record_types[hook_name])
        wanted = f"{hook_name} must return one sequence of {expected.__name__}"
        if more or isinstance(result, str) or not isinstance(result, Sequence):
            raise PluginError(f"{wanted}, not {type(result).__name__}")
        for record in result:
            if not isinstance(record, expected) or not isinstance(record.name, str):
                raise PluginError(f"{wanted} with a name each, not of {record!r}")
        return result

    @contextmanager
    def _guarded(self, plugin: Plugin) -> Iterator[None]:
        """Turns an error of a third-party plug-in into one report; an error of a built-in passes."""
        try:
            yield
        except Exception as error:
            if plugin.builtin:
                raise
            plugin.errors.append(str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}")
            warnings.warn(f"plug-in {plugin} was left out: {plugin.errors[-1]}", PluginWarning, stacklevel=2)


def _origin(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return _distribution(entry_point)[0], entry_point.name


def _distribution(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that declares the entry point."""
    return (entry_point.dist.name, entry_point.dist.version) if entry_point.dist else ("unknown", "unknown")


@functools.cache
def host() -> PluginHost:
    """The host of this process. `host.cache_clear()` makes the next call discover anew."""
    return PluginHost()
