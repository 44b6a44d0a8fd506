"""How far the routing has moved from that of the model without its adapter."""

from __future__ import annotations

from trl_moe_ext.reporting.numbers import figure
from trl_moe_ext.reporting.page.layered_chart import layered_chart
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Section
from trl_moe_ext.router.layer_curves import LayerCurves

_TITLE = "Drift from the base routing"
_MISSING = (
    "The routing was not compared with that of the base model in this run. `--router_metrics full` does it on some "
    "steps, without a gradient."
)


def section(run: RunFiles) -> Section:
    """KL divergence and overlap of the chosen experts, for the same tokens with and without the adapter."""
    rows = run.record.log_history
    kl, overlap = (LayerCurves.from_log(rows, f"router/{name}") for name in ("drift_kl", "topk_overlap"))
    charts = [
        layered_chart("KL divergence", kl, "KL(base || now), nats a token"),
        layered_chart("Choices of experts kept", overlap, "share of those of the base model", names_highest=False),
    ]
    charts = [chart for chart in charts if chart is not None]
    if not charts:
        return Section("drift", _TITLE, missing=_MISSING)
    told = []
    if overlap.mean:
        told.append(f"{overlap.mean[-1][1]:.1%} of the base model's choices of experts are still made at the end.")
    if kl.highest is not None and len(kl.layers) > 1:
        told.append(f"Layer {kl.highest} moved furthest, by {figure(kl.layers[kl.highest][-1][1])} nats a token.")
    return Section("drift", _TITLE, " ".join(told), {"charts": charts})
