"""The pictures show what was recorded, for small and for large models."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from trl_moe_ext.router.history import RouterHistory
from trl_moe_ext.router.load_scale import LoadScale
from trl_moe_ext.router.plots import save_heatmap, save_max_vio_curve


def history_of(layers: int, experts: int, records: int = 3) -> RouterHistory:
    history = RouterHistory()
    for step in range(records):
        shares = [(1 + (step if expert == 0 else 0)) / (experts + step) for expert in range(experts)]
        history.append(10 * step, {str(layer): shares for layer in range(layers)})
    return history


def colours_of(path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=10**6)}


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (4, 8), (48, 128), (60, 512)])
@pytest.mark.parametrize("records", [1, 3])
def test_a_heatmap_of_any_size_is_a_picture_that_fits_a_page(tmp_path, layers, experts, records):
    assert save_heatmap(history_of(layers, experts, records), tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
        assert 300 < image.width < 2500
        assert 300 < image.height < 2500


def test_the_heatmap_shows_an_expert_that_has_all_and_those_that_have_nothing(tmp_path):
    balanced, collapsed = RouterHistory(), RouterHistory()
    balanced.append(1, {"0": [0.25] * 4})
    collapsed.append(1, {"0": [1.0, 0.0, 0.0, 0.0]})
    save_heatmap(balanced, tmp_path / "balanced.png")
    save_heatmap(collapsed, tmp_path / "collapsed.png")

    def cells(name: str) -> list[tuple[int, ...]]:
        with Image.open(tmp_path / name) as image:
            row = [image.convert("RGB").getpixel((x, image.height // 2)) for x in range(image.width * 2 // 3)]
        return row

    red, blue = (191, 74, 23), (70, 106, 140)
    assert red in cells("collapsed.png")
    assert blue in cells("collapsed.png")
    assert cells("collapsed.png").index(red) < cells("collapsed.png").index(blue), "the first expert has all"
    assert red not in cells("balanced.png")
    assert blue not in cells("balanced.png")


def test_layers_with_fewer_experts_are_drawn_with_gaps(tmp_path):
    history = RouterHistory()
    history.append(1, {"encoder.0": [0.5, 0.5], "decoder.0": [0.25] * 4})
    history.append(2, {"decoder.0": [0.25] * 4})
    assert save_heatmap(history, tmp_path / "map.png")
    assert (232, 230, 227) in colours_of(tmp_path / "map.png")


def test_nothing_recorded_no_picture(tmp_path):
    assert not save_heatmap(RouterHistory(), tmp_path / "map.png")
    assert not save_max_vio_curve(RouterHistory(), tmp_path / "curve.png")
    assert not save_max_vio_curve([{"step": 1, "loss": 2.0}], tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source",
    [
        history_of(1, 4),
        history_of(48, 8),
        [{"step": 1, "router/max_vio": 0.3}],
        [{"step": n, "router/max_vio": 0.3, "router/max_vio/1": 0.2, "router/max_vio/2": 0.4} for n in range(3)],
    ],
    ids=["one layer", "many layers", "one logged mean", "logged layers"],
)
def test_the_curve_is_a_picture_of_a_history_or_of_a_log(tmp_path, source):
    assert save_max_vio_curve(source, tmp_path / "curve.png")
    assert (191, 74, 23) in colours_of(tmp_path / "curve.png"), "the mean is not drawn"
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (840, 480)


@pytest.mark.parametrize(
    ("loads", "limit"), [([], 2), ([1.0, 0.1], 2), ([1.9], 2), ([2.1, math.nan], 4), ([4.0], 4), ([500.0], 16)]
)
def test_the_scale_is_a_power_of_two_that_holds_the_largest_load(loads, limit):
    scale = LoadScale.of(loads)
    assert scale.limit == limit
    assert (scale.position(1.0), scale.position(limit), scale.position(1 / limit)) == (0.0, 1.0, -1.0)
    assert (scale.position(0.0), scale.position(1e9)) == (-1.0, 1.0)
    assert scale.ticks()[0] == (-1.0, f"1/{limit}\N{MULTIPLICATION SIGN}")
    assert scale.ticks()[-1] == (1.0, f"{limit}\N{MULTIPLICATION SIGN}")
    assert (0.0, "1\N{MULTIPLICATION SIGN}") in scale.ticks()
