"""The options, versions and machine that the run had, so that it can be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Section

_TITLE = "Settings"

Rows = list[tuple[str, str]]


def section(run: RunFiles) -> Section:
    """Groups of names and values."""
    record = run.record
    groups = {title.capitalize(): _rows(options) for title, options in record.settings.items()}
    groups |= {"Model": _rows(record.model), "Versions": _rows(record.versions), "Machine": _rows(record.machine)}
    groups = {title: rows for title, rows in groups.items() if rows}
    if not groups:
        return Section("settings", _TITLE, missing="Settings and versions are not recorded here.")
    return Section("settings", _TITLE, content={"groups": groups})


def _rows(options: Mapping[str, Any]) -> Rows:
    return [(name, _text(value)) for name, value in options.items() if value not in ("", None, [])]


def _text(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
