"""The plug-in host: takes the named records that the hooks of plug-ins return, and looks them up by name.

The built-ins come first, then what is installed (`plugin_loading`). A record of a third-party plug-in that cannot be
taken is reported and left out, as is a plug-in that cannot be loaded. Only registration is guarded in this way: what a
record does later, in training, is never caught here.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_moe_ext import hookspecs
from trl_moe_ext.errors import PluginError, near_matches
from trl_moe_ext.plugin_loading import Plugin, PluginsFound, PluginWarning

__all__ = ["BUILTINS", "Plugin", "PluginHost", "PluginWarning", "host"]

# Name of the plug-in and its module, which is imported when the first record is asked for.
BUILTINS = (
    ("builtin_kernels", "trl_moe_ext.kernels.builtin"),
    ("builtin_families", "trl_moe_ext.experts.families"),
    ("builtin_router_losses", "trl_moe_ext.router.builtin"),
    ("builtin_rollout_backends", "trl_moe_ext.grpo.backends.builtin"),
)


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
        self._record_types = record_types
        self._plugins = PluginsFound(builtins, record_types)
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
        failed = [f"plug-in {plugin}: {error}" for plugin in self._plugins.by_key.values() for error in plugin.errors]
        raise PluginError(f"{message}. Left out: {'; '.join(failed)}" if failed else message)

    def status(self) -> list[Plugin]:
        """Every plug-in, after each of its hooks was called once."""
        for hook_name in self._record_types:
            self.records(hook_name)
        return list(self._plugins.by_key.values())

    def _collect(self, hook_name: str) -> dict[str, Any]:
        records: dict[str, Any] = {}
        owners: dict[str, Plugin] = {}
        for key, plugin in self._plugins.by_key.items():
            offered: Sequence[Any] = ()
            if hook_name in plugin.hooks:
                with self._plugins.guarded(plugin):
                    offered = self._call(hook_name, key)
            for record in offered:
                with self._plugins.guarded(plugin):
                    if record.name in records:
                        raise PluginError(f"{hook_name}: the name {record.name!r} is taken by {owners[record.name]}")
                    records[record.name], owners[record.name] = record, plugin
                    plugin.records.setdefault(hook_name, []).append(record.name)
        return records

    def _call(self, hook_name: str, key: str) -> Sequence[Any]:
        """Calls the hook of one plug-in; raises PluginError unless the result is a sequence of the hook's records."""
        result, *more = self._plugins.call(hook_name, key) or (None,)
        expected = pkgutil.resolve_name(self._record_types[hook_name])
        wanted = f"{hook_name} must return one sequence of {expected.__name__}"
        if more or isinstance(result, str) or not isinstance(result, Sequence):
            raise PluginError(f"{wanted}, not {type(result).__name__}")
        for record in result:
            if not isinstance(record, expected) or not isinstance(record.name, str):
                raise PluginError(f"{wanted} with a name each, not of {record!r}")
        return result


@functools.cache
def host() -> PluginHost:
    """The host of this process. `host.cache_clear()` makes the next call discover anew."""
    return PluginHost()
