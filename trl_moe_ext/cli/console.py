"""How sub-commands print what rich draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(view: RenderableType, is_folded: bool = True) -> None:
    """Print a view.

    Args:
        view: a table, or several.
        is_folded: whether a narrow terminal may fold it. A pipe or a file has no width: there nothing is folded.
    """
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not (is_folded and console.is_terminal):
        console.width = console.measure(view, options=console.options.update(max_width=100_000)).maximum
    console.print(view)
