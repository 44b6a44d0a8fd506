"""What one model type is, and which promises hold on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.experts.census.tensors import inputs
from trl_moe_ext.experts.census.tiny import skeleton
from trl_moe_ext.experts.finding import find_experts
from trl_moe_ext.experts.reading import read_block_parts


@dataclass(frozen=True)
class TypeReport:
    """The outcome for one type.

    Attributes:
        experts: ``stacks``, ``rows`` (stacks that are called with sorted rows) or ``Linears`` (ordinary LoRA).
        read_from: what told the layout: ``interface``, ``record`` or ``structure``.
        results: check -> None if it holds, else the error.
        not_run: why no check could be run, if none could.
    """

    model_type: str
    experts: str
    read_from: str
    results: dict[str, str | None] = field(default_factory=dict)
    not_run: str | None = None

    @property
    def failed(self) -> dict[str, str]:
        """The checks that do not hold, with their errors."""
        return {check: error for check, error in self.results.items() if error is not None}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def report_type(model_type: str, checks: Mapping[str, Callable[[str], None]]) -> TypeReport:
    """Run `checks` on a type. Whatever goes wrong is the type's result: one family must not stop the others."""
    try:
        model = skeleton(model_type)
        kind = _kind(dict(model.named_modules()))
        inputs(model)
    except MoeExtError as error:
        return TypeReport(model_type, "-", "-", not_run=str(error))
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check(model_type)
            results[name] = None
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return TypeReport(model_type, *kind, results)


def _kind(modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The form of the experts, and what told it."""
    found = find_experts(modules)
    layouts = [*found.stacks.values(), *found.other_modality.values()]
    if layouts:
        told_by = ", ".join(sorted({layout.read_from for layout in layouts}))
        return "rows" if any(layout.takes_rows for layout in layouts) else "stacks", told_by
    if not found.linears:
        return "unread", "-"
    return "Linears", "record" if any(read_block_parts(module) for module in modules.values()) else "structure"
