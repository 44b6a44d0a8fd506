"""An inspection for the terminal: what the model is, its routed experts, and what each word of moe_target trains."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trl_moe_ext.reporting.inspection.experts import RoutedExperts
from trl_moe_ext.reporting.inspection.layer_ranges import ranges
from trl_moe_ext.reporting.inspection.model import Inspection
from trl_moe_ext.reporting.inspection.router import RouterKind
from trl_moe_ext.reporting.inspection.submodels import Submodel
from trl_moe_ext.reporting.inspection.unread import UnreadExperts
from trl_moe_ext.reporting.numbers import share, size

Rows = list[tuple[str, str]]


def inspection_view(inspection: Inspection) -> Group:
    """Everything in `inspection` as text and tables, for a console without markup."""
    parts: list[RenderableType] = [
        _heading(f"{inspection.model_class} ({inspection.model_type})"),
        _facts(_model_rows(inspection)),
    ]
    for experts in inspection.experts:
        parts += [
            _heading(f"Routed experts: {', '.join(experts.modules)}"),
            _facts(_experts_rows(experts, inspection.layers)),
        ]
    for unread in inspection.unread_experts:
        parts += [_heading(f"Experts that cannot be read: {unread.name}"), _facts(_unread_rows(unread))]
    ranks = f"r={inspection.r}" + (f", expert_r={inspection.expert_r}" if inspection.expert_r else "")
    return Group(*parts, _heading(f"What each moe_target trains, {ranks}"), _adapters_table(inspection))


def _heading(text: str) -> Padding:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))


def _facts(rows: Rows) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return Padding(table, (0, 0, 0, 2))


def _model_rows(inspection: Inspection) -> Rows:
    total, routed = size(inspection.parameters), size(inspection.routed_expert_parameters)
    of_experts = f", {routed} of them in routed experts" if inspection.experts else ""
    rows = [("parameters", total + of_experts), ("active for a token", _active(inspection))]
    rows += [("layers", f"{count} in {stack}") for stack, count in inspection.layers.items()]
    rows += [("adapted by default", _submodel(part)) for part in inspection.text_models]
    rows += [("other modalities", f"{_submodel(part)}, not adapted by default") for part in inspection.other_models]
    if inspection.stored_quantised:
        remedy = "load it dequantised, experts are adapted in bfloat16"
        rows.append(("stored quantised", f"{inspection.stored_quantised}: {remedy}"))
    if not inspection.has_routed_experts:
        rows.append(("routed experts", "none: moe_lora trains ordinary LoRA, and experts means the dense MLP"))
    return rows


def _active(inspection: Inspection) -> str:
    if inspection.active_parameters is None:
        return "unknown"
    return ("at most " if inspection.is_active_at_most else "") + size(inspection.active_parameters)


def _submodel(part: Submodel) -> str:
    return f"{part.name} ({part.class_name}), {size(part.parameters)}"


def _experts_rows(experts: RoutedExperts, layers: dict[str, int]) -> Rows:
    rows = [("class", ", ".join(experts.class_names))]
    if experts.layers:
        stack = f" in {experts.stack}" if len(layers) > 1 else ""
        count = f"{len(experts.layers)} of {experts.stack_layers}"
        all_or_some = f"all {experts.stack_layers}" if len(experts.layers) == experts.stack_layers else count
        rows.append(("layers", f"{all_or_some}{stack}: {ranges(experts.layers)}"))
    return [
        *rows,
        ("experts a layer", _values(experts.num_experts)),
        ("chosen for a token", _values(experts.top_k)),
        ("shared experts", ", ".join(experts.shared_experts) or "none"),
        ("router", _router(experts.router)),
        ("layout", "; ".join(experts.layout)),
        ("read from", experts.read_from),
        *([("other modality", "not adapted by default")] if experts.other_modality else []),
    ]


def _values(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "unknown"


def _router(router: RouterKind | None) -> str:
    if router is None:
        return "none found"
    bias = "with" if router.has_correction_bias else "no"
    return f"{router.class_name}; scores: {router.scoring}; {bias} correction bias"


def _unread_rows(unread: UnreadExperts) -> Rows:
    shapes = "; ".join(f"{name} {tuple(shape)}" for name, shape in unread.parameters.items())
    return [
        ("class", f"{unread.class_name}, {unread.occurrences} in the model"),
        ("parameters", shapes),
        ("called as", unread.forward),
        *(("missing", each) for each in unread.missing),
    ]


def _adapters_table(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("moe_target", no_wrap=True)
    for column in ("modules", "trainable", "share", "in fp32"):
        table.add_column(column, justify="right", no_wrap=True)
    for cells in _adapter_rows(inspection):
        table.add_row(*cells)
    return table


def _adapter_rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    for adapter in inspection.adapters:
        words = " ".join(adapter.moe_target) + (" (default)" if len(adapter.moe_target) > 1 else "")
        if adapter.parameters:
            counts = f"{adapter.modules:,}", f"{adapter.parameters:,}"
            yield words, *counts, share(adapter.share), size(adapter.bytes_fp32, "B")
        else:
            is_unread = adapter.moe_target == ["experts"] and bool(inspection.unread_experts)
            yield words, "cannot be read" if is_unread else "-", "-", "-", "-"
