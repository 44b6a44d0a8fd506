"""What a profile says, for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from trl_moe_ext.errors import some_of
from trl_moe_ext.profiles.coverage import LayerCoverage
from trl_moe_ext.profiles.profile import ExpertProfile

__all__ = ["left_out_lines", "profile_table"]


def profile_table(layers: Sequence[LayerCoverage]) -> Table:
    """One row a layer: the most used expert, and how few experts get most of the choices."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True, vertical="bottom")
    for column in ("experts", "most used", "its share", "experts\nfor 50 %", "experts\nfor 90 %", "unused"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for layer in layers:
        counts = (layer.experts_for_50, layer.experts_for_90, layer.unused)
        share = f"{layer.largest_share:.1%}"
        table.add_row(layer.label, str(layer.num_experts), str(layer.most_used), share, *map(str, counts))
    return table


def left_out_lines(profile: ExpertProfile) -> Iterator[str]:
    """A line for each reason why modules of experts are not in the profile."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in profile.left_out.items():
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        yield f"Not in the profile: {some_of(names)}: {reason}."
