"""A chart of a measure of the routers: every layer faint, the mean of them all in front."""

from __future__ import annotations

from trl_moe_ext.reporting.page.chart import Chart, Line, line_chart
from trl_moe_ext.router.layer_curves import LayerCurves

__all__ = ["layered_chart"]


def layered_chart(title: str, curves: LayerCurves, unit: str, names_highest: bool = True) -> Chart | None:
    """Lay out a chart of the layers and their mean.

    Args:
        title: what the values are.
        curves: of the layers and their mean.
        unit: of the values.
        names_highest: whether the layer that ends highest is drawn apart and named.

    Returns:
        None if there is no curve.
    """
    highest = curves.highest if names_highest and len(curves.layers) > 1 else None
    lines = [Line("", curve, style="faint") for label, curve in curves.layers.items() if label != highest]
    if highest is not None:
        lines.append(Line(f"layer {highest}", curves.layers[highest], style="second"))
    name = "mean of the layers" if curves.layers else ""
    return line_chart(title, [*lines, Line(name, curves.mean)], unit)
