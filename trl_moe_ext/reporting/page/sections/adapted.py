"""What was trained, part by part: the table that is printed before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from trl_moe_ext.reporting.numbers import count, share, size
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Section

_TITLE = "What was adapted"


@dataclass(frozen=True)
class PartRow:
    """A row of the table; `per_cent` is the length of its bar."""

    part: str
    modules: str
    parameters: str
    share: str
    per_cent: float


def section(run: RunFiles) -> Section:
    """Trainable parameters of each part of the model."""
    record = run.record
    trained = sum(part.parameters for part in record.adapted)
    if not trained:
        return Section("adapted", _TITLE, missing="It is not recorded here which parts of the model were trained.")
    rows = [
        PartRow(
            part=part.part,
            modules=f"{part.modules:,}" if part.modules else "-",
            parameters=f"{part.parameters:,}" if part.parameters else "-",
            share=share(part.parameters, trained) if part.parameters else "-",
            per_cent=100 * part.parameters / trained,
        )
        for part in record.adapted
    ]
    modules = sum(part.modules for part in record.adapted)
    summary = (
        f"{size(trained)} of {size(record.total_parameters)} parameters were trained "
        f"({share(trained, record.total_parameters)}), in {count(modules, 'module')}."
    )
    summary += "".join(f" Of the {part.part}: {part.detail}." for part in record.adapted if part.detail)
    return Section("adapted", _TITLE, summary, {"rows": rows, "trained": f"{trained:,}", "modules": f"{modules:,}"})
