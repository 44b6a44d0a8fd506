"""Finds plug-ins, and keeps the broken ones apart.

The built-ins come first, then every installed distribution that has an entry point in the group `trl_moe_ext`, by
distribution and name. A third-party plug-in that fails is reported once as a `PluginWarning` and the others go on; an
error in a built-in is our own and is raised.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pluggy

from trl_moe_ext import hookspecs
from trl_moe_ext._version import __version__
from trl_moe_ext.errors import PluginError, near_matches

__all__ = ["Plugin", "PluginWarning", "PluginsFound"]


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


class PluginsFound:
    """The plug-ins of this process, loaded at the first question.

    Args:
        builtins: pairs of plug-in name and module name.
        hook_names: that a plug-in may implement.
    """

    def __init__(self, builtins: Iterable[tuple[str, str]], hook_names: Collection[str]) -> None:
        self._builtins = tuple(builtins)
        self._hook_names = hook_names
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    @functools.cached_property
    def by_key(self) -> dict[str, Plugin]:
        """Every plug-in that was found, registered or not, by the name under which pluggy knows it."""
        plugins = {}
        for name, module in self._builtins:
            plugins[name] = Plugin(name, hookspecs.PROJECT, __version__, builtin=True)
            self._register(name, plugins[name], importlib.import_module(module))
        for entry_point in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=_origin):
            key = ":".join(_origin(entry_point))
            plugins[key] = Plugin(entry_point.name, *_distribution(entry_point))
            with self.guarded(plugins[key]):
                self._register(key, plugins[key], entry_point.load())
        return plugins

    def call(self, hook_name: str, key: str) -> list[Any]:
        """What the hook of one plug-in gives, a result for each of its implementations that is not None."""
        others = [other for name, other in self._manager.list_name_plugin() if name != key]
        results: list[Any] = self._manager.subset_hook_caller(hook_name, remove_plugins=others)()
        return results

    @contextmanager
    def guarded(self, plugin: Plugin) -> Iterator[None]:
        """Turns an error of a third-party plug-in into one report; an error of a built-in passes."""
        try:
            yield
        except Exception as error:
            if plugin.builtin:
                raise
            plugin.errors.append(str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}")
            warnings.warn(f"plug-in {plugin} was left out: {plugin.errors[-1]}", PluginWarning, stacklevel=2)

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
                raise PluginError(f"{caller.name} is not a hook; {near_matches(caller.name, self._hook_names)}")
        if not known:
            raise PluginError("it implements no hook; decorate its functions with trl_moe_ext.hookspecs.hookimpl")
        return sorted(known)


def _origin(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return _distribution(entry_point)[0], entry_point.name


def _distribution(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that declares the entry point."""
    return (entry_point.dist.name, entry_point.dist.version) if entry_point.dist else ("unknown", "unknown")
