"""`trl-moe plugins`: what is installed, what it provides, and what is wrong with it."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trl_moe_ext.cli.console import show

if TYPE_CHECKING:
    from rich.table import Table

    from trl_moe_ext.plugins import Plugin, PluginHost


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable: a list of objects.")] = False,
) -> None:
    """List the plug-ins: name, version, hooks, status, and what each provides."""
    from trl_moe_ext.plugins import PluginWarning, host

    with warnings.catch_warnings():
        # The table has a column for what the warnings say.
        warnings.simplefilter("ignore", PluginWarning)
        found = host().status()
    if as_json:
        typer.echo(json.dumps([{**asdict(plugin), "status": plugin.status} for plugin in found], indent=2))
        return
    show(_plugins_table(found))
    show(_records_table(found, host()))


def _plugins_table(found: list[Plugin]) -> Table:
    table = _table("plug-in", "distribution", "version", "hooks", "status")
    for plugin in found:
        status = "; ".join([plugin.status, *plugin.errors])
        table.add_row(plugin.name, plugin.distribution, plugin.version, ", ".join(plugin.hooks) or "-", status)
    return table


def _records_table(found: list[Plugin], host: PluginHost) -> Table:
    table = _table("hook", "name", "plug-in", "description")
    for plugin in found:
        for hook_name, names in plugin.records.items():
            for name in names:
                description = getattr(host.records(hook_name)[name], "description", "")
                table.add_row(hook_name, name, plugin.name, description)
    return table


def _table(*columns: str) -> Table:
    """A table whose last column gives way first on a narrow terminal, so that names stay whole."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1])
    return table
