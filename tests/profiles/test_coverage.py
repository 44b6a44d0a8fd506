"""Coverage curves, and what is made of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from tests.profiles.made import layer_use, profile_of
from trl_moe_ext.profiles.coverage import coverage_curve, coverage_of, judgement, mean_curve, quarter
from trl_moe_ext.profiles.plots import save_profile_plot
from trl_moe_ext.profiles.profile import ExpertProfile


def test_a_curve_by_hand():
    assert coverage_curve([0.1, 0.6, 0.3]) == pytest.approx((0, 0.6, 0.9, 1))


def test_the_mean_of_layers_with_different_numbers_of_experts():
    assert mean_curve([(0, 0.5, 0.75, 0.875, 1), (0, 0.7, 0.8, 0.9, 1)]) == pytest.approx((0, 0.6, 0.775, 0.8875, 1))
    assert mean_curve([(0, 0.6, 1), (0, 0.5, 0.7, 0.9, 1)]) == pytest.approx((0, 0.4, 0.65, 0.85, 1))


def test_the_numbers_of_a_layer():
    found = coverage_of(layer_use([0.05, 0.45, 0.0, 0.0, 0.25, 0.15, 0.1, 0.0], "7", gate_score=[1.0] + [0.0] * 7))
    assert (found.label, found.num_experts, found.most_used, found.largest_share) == ("7", 8, 1, 0.45)
    assert (found.experts_for_50, found.experts_for_80, found.experts_for_90, found.unused) == (2, 3, 4, 3)
    assert found.quarter_share == pytest.approx(0.7)
    by_weight = coverage_of(layer_use([0.125] * 8, gate_score=[1.0] + [0.0] * 7), "gate_score")
    assert (by_weight.most_used, by_weight.experts_for_90, by_weight.unused) == (0, 1, 7)


@pytest.mark.parametrize(("experts", "number"), [(1, 1), (2, 1), (4, 1), (8, 2), (10, 2), (60, 15), (512, 128)])
def test_a_quarter(experts, number):
    assert quarter(experts) == number


@pytest.mark.parametrize(
    ("layers", "gets", "equal", "words"),
    [
        ([[0.125] * 8], "25%", "25%", "There is no hot set"),
        ([[0.15, 0.16, *[0.115] * 6]], "31%", "25%", "There is no hot set"),
        ([[0.2, 0.2, *[0.1] * 6]], "40%", "25%", "no clear hot set"),
        ([[0.3, 0.4, *[0.05] * 6]], "70%", "25%", "There is a hot set"),
        ([[0.3, 0.41, 0.04, *[0.05] * 5], [0.125] * 8], "48%", "25%", "no clear hot set"),
        ([[0.5, 0.5]], "50%", "50%", "There is no hot set"),
        ([[0.9, 0.1]], "90%", "50%", "There is a hot set"),
    ],
)
def test_the_judgement(layers, gets, equal, words):
    told = judgement(profile_of(*layers))
    assert f"quarter of the experts gets {gets} of the choices of experts; with equal use it would be {equal}." in told
    assert words in told


def test_few_tokens_tell_nothing():
    """With equal use too, chance makes a hot set of them."""
    few = ExpertProfile("m", "M", "d", 1, (replace(layer_use([1.0, *[0.0] * 7]), tokens=1),), {})
    told = judgement(few)
    assert "gets 100% of the choices" in told
    assert "too few to tell whether there is a hot set: profile more tokens" in told


def test_one_expert_is_no_choice():
    assert judgement(profile_of([1.0], [1.0])) == "Every layer has one expert: there is nothing to choose."


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (1, 2), (4, 8), (48, 128), (61, 512)])
def test_a_picture_of_any_model(tmp_path, layers, experts):
    shares = [2 * (place + 1) / experts / (experts + 1) for place in range(experts)]
    save_profile_plot(profile_of(*[shares] * layers), tmp_path / "profile.png")
    with Image.open(tmp_path / "profile.png") as image:
        assert image.format == "PNG"
        assert 1000 < image.width < 2000
        assert 500 < image.height < 1200
    assert [path.name for path in tmp_path.iterdir()] == ["profile.png"]


def test_the_picture_shows_the_expert_that_has_all_and_layers_with_fewer_experts(tmp_path):
    save_profile_plot(profile_of([1.0, 0.0, 0.0, 0.0], [0.5, 0.5]), tmp_path / "profile.png")
    with Image.open(tmp_path / "profile.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=10**6)}
    assert {(191, 74, 23), (70, 106, 140), (232, 230, 227)} <= colours


def test_an_unfinished_picture_is_not_left(tmp_path):
    with pytest.raises(OSError, match="missing"):
        save_profile_plot(profile_of([0.5, 0.5]), tmp_path / "missing" / "profile.png")
    assert not any(tmp_path.iterdir())
