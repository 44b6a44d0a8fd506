"""What a part of the page hands to its template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Figure", "Section"]


@dataclass(frozen=True)
class Figure:
    """A number of the run that stands alone: what it is, the number with its unit, and what to compare it with."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        anchor: its id, and the name of its template.
        title: its heading.
        summary: what it shows, in a sentence or two.
        content: for the template.
        missing: why there is nothing to show, and how to get it; the template is then not used.
    """

    anchor: str
    title: str
    summary: str = ""
    content: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""
