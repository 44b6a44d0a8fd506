"""The page tells what the run did, escapes what comes from it, and needs nothing but itself."""

from __future__ import annotations

import base64
import fnmatch
import io
import itertools
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.reporting.sample_run import write_run
from trl_moe_ext.reporting.numbers import count, duration, figure, share, size
from trl_moe_ext.reporting.page import read_run, render, render_page
from trl_moe_ext.reporting.page.chart import Line, line_chart
from trl_moe_ext.reporting.page.heatmap import heatmap
from trl_moe_ext.reporting.page.ticks import axis_range, step_ticks, ticks
from trl_moe_ext.reporting.run_record import RECORD_FILE, RunRecord
from trl_moe_ext.router.history import RouterHistory

ROOT = Path(__file__).parents[2]
SECTIONS = ["loss", "router", "drift", "adapted", "cost", "settings"]
VOID = {"meta", "link", "img", "input", "br", "path"}


class Page(HTMLParser):
    """Text of each section, what is loaded, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.loaded: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self._section = "head"
        self.feed(html)
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loaded += [values[name] for name in ("src", "href", "action", "data", "srcset") if name in values]
        if tag == "section":
            self._section = values["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            text = f"{self.texts.get(self._section, '')} {data}"
            self.texts[self._section] = " ".join(text.split())


def page_of(directory: Path) -> Page:
    return Page(render_page(read_run(directory)))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("runs") / "my run"))


def test_it_loads_nothing(page):
    assert page.loaded
    assert all(address.startswith("data:") for address in page.loaded), page.loaded
    code = "".join(page.scripts)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|https?:", code)


def test_all_sections_are_there_in_order(page):
    assert [name for name in page.texts if name != "head"] == SECTIONS


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("head", ["my run", "a model with moe_lora", "Finished, 100 steps", "4 March 2026, 09:00 to 09:01 UTC"]),
        ("head", ["Training loss 0.271 from 1.64", "Trained parameters 1M 2.00% of the model", "60 GB cuda:0"]),
        ("loss", ["fell from 1.64 at step 10 to 0.271 at step 100", "lowest value was 0.900, at step 50"]),
        ("loss", ["Learning rate", "Norm of the gradient"]),
        ("router", ["MaxVio, worst layer", "Load of every expert", "3 layers of 4 experts", "Layer by layer"]),
        ("router", ["Experts without a token 3 0 at step 10", "Entropy of the routers", "Auxiliary loss 2.10"]),
        ("drift", ["90.0% of the base model's choices", "Layer 2 moved furthest, by 0.0200 nats a token"]),
        ("adapted", ["1M of 50M parameters were trained (2.00%), in 15 modules", "900,000 90.00%", "router - - -"]),
        ("cost", ["1 min 44 s", "4.50 s of it evaluation and saving", "1 /s", "50 /s", "5,000", "2.50 GB"]),
        ("settings", ["peft_type MOE_LORA", "router_metrics full", "torch 2.13.0", "processor a processor"]),
    ],
)
def test_what_it_tells(page, section, told):
    for words in told:
        assert words in page.texts[section]


def test_whatever_comes_from_the_run_is_escaped(tmp_path):
    attack = "</script><script>alert(1)</script><img src=http://x>\"'`b`"
    directory = write_run(tmp_path / "a & b", name=attack)
    record = RunRecord.load(directory / RECORD_FILE)
    record.settings[attack] = {attack: attack}
    record.versions[attack] = attack
    record.machine[attack] = [attack]
    record.log_history[0][f"router/max_vio/{attack}"] = 9.0
    record.adapted[0] = type(record.adapted[0])(attack, 1, 1)
    record.peak_memory[attack] = 1
    record.save(directory)
    history = RouterHistory.load(directory / "router_history.json")
    history.append(200, {attack: [0.5, 0.5]})
    history.save(directory / "router_history.json")
    html = render_page(read_run(directory))
    page = Page(html)
    assert "alert(1)" in page.texts["settings"]
    assert "alert(1)" in page.texts["head"]
    assert not re.search(r"<script>alert|<img src=http", html)
    assert all(address.startswith("data:") for address in page.loaded)
    for script in page.scripts[1:-1]:
        json.loads(script)


@pytest.mark.parametrize("router", ["off", "summary"])
def test_a_run_without_all_metrics_says_how_to_get_them(tmp_path, router):
    page = page_of(write_run(tmp_path, router=router))
    assert "--router_metrics full" in page.texts["drift"]
    assert ("--router_metrics full" in page.texts["router"]) == (router == "off")
    assert ("Load of every expert" in page.texts["router"]) == (router == "summary")


def test_a_run_that_was_killed_and_one_that_went_on(tmp_path):
    record = RunRecord.load(write_run(tmp_path) / RECORD_FILE)
    record.is_finished, record.max_steps, record.lost_seconds = False, 400, 20
    record.sessions.append(type(record.sessions[0])("2026-03-05T10:00:00+00:00", "2026-03-05T11:00:00+00:00", 50))
    record.save(tmp_path)
    page = page_of(tmp_path)
    assert "Not finished: last heard of at step 100 of 400" in page.texts["head"]
    assert "4 March 2026, 09:00 to 5 March 2026, 11:00 UTC" in page.texts["head"]
    assert (
        "went on from a checkpoint 1 time, at step 50. 20 s went into steps that were repeated" in page.texts["cost"]
    )


def test_an_empty_record_makes_a_page(tmp_path):
    RunRecord().save(tmp_path)
    page = page_of(tmp_path)
    assert [name for name in page.texts if name != "head"] == SECTIONS
    assert "No loss was logged" in page.texts["loss"]


def test_a_loss_that_is_not_finite_is_a_gap_and_is_told(tmp_path):
    record = RunRecord(log_history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}])
    record.save(tmp_path)
    page = page_of(tmp_path)
    assert "It was not finite in 1 log, first at step 2." in page.texts["loss"]
    assert json.loads(page.scripts[1])["lines"] == [[[1, "2"], [3, "1"]]]


def test_a_large_run_stays_small(tmp_path):
    directory = write_run(tmp_path, layers=4)
    history = RouterHistory()
    for step in range(60):
        shares = [(1 + (31 * expert + step) % 7) / 512 for expert in range(128)]
        history.append(step, {str(layer): shares for layer in range(48)})
    history.save(directory / "router_history.json")
    record = RunRecord.load(directory / RECORD_FILE)
    record.log_history = [{"step": step, "loss": 1 / (step + 1)} for step in range(50_000)]
    record.save(directory)
    assert len(render_page(read_run(directory))) < 1_500_000


def test_a_picture_of_the_load_has_a_pixel_for_each_cell():
    history = RouterHistory()
    history.append(3, {"0": [0.5, 0.25, 0.125, 0.125], "1": [0.0, 1.0]})
    picture = heatmap(history)
    frame = picture.frames[0]
    with Image.open(io.BytesIO(base64.b64decode(frame.image.removeprefix("data:image/png;base64,")))) as image:
        assert image.size == (4, 2)
        pixels = [[image.convert("RGBA").getpixel((x, y)) for x in range(4)] for y in range(2)]
    assert pixels[0][0] == (191, 74, 23, 255), "twice the mean is the end of the scale"
    assert pixels[0][1][3] == 0, "balance is transparent"
    assert pixels[0][2] == (70, 106, 140, 255), "half of the mean is the other end"
    assert pixels[1][0] == (70, 106, 140, 255)
    assert pixels[1][2] == pixels[1][3] == (128, 128, 128, 64), "no such expert"
    loads = memoryview(base64.b64decode(frame.load)).cast("H").tolist()
    assert loads == [200, 100, 50, 50, 0, 200, 0xFFFF, 0xFFFF]
    assert (picture.labels, picture.experts, picture.has_gaps) == (["0", "1"], 4, True)


def test_frames_are_even_and_keep_both_ends():
    history = RouterHistory()
    for step in range(100):
        history.append(step, {"0": [0.5, 0.5]})
    steps = [frame.step for frame in heatmap(history).frames]
    assert (steps[0], steps[-1], len(steps)) == (0, 99, 24)
    assert {b - a for a, b in itertools.pairwise(steps)} <= {4, 5}


def test_a_long_line_keeps_its_spikes_and_both_ends():
    points = [(step, 1.0 + (step == 7777) * 9 - (step == 3333)) for step in range(20_000)]
    chart = line_chart("a", [Line("", points)])
    drawn = chart.data["lines"][0]
    assert len(drawn) < 500
    assert {point[1] for point in drawn} == {"1", "10", "0"}
    assert (drawn[0][0], drawn[-1][0]) == (0, 19_999)


def test_a_single_point_is_a_dot():
    chart = line_chart("a", [Line("x", [(3, 2.0)])])
    assert (chart.lines[0].path, chart.lines[0].dots.count("M")) == ("", 1)
    assert line_chart("a", [Line("x", [])]) is None


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_an_axis_holds_its_values_and_has_a_few_ticks(low, length):
    ends = axis_range(low, low + length)
    rounding = 1e-6 * max(abs(low), abs(low + length))
    assert ends[0] <= low + rounding
    assert ends[1] >= low + length - rounding
    labels = [label for _, label in ticks(*ends)]
    assert [value for value, _ in ticks(*ends)][:: len(labels) - 1] == pytest.approx(ends), "an end without a tick"
    assert 2 <= len(labels) <= 8
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        ((0, 1), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ((0, 2e-4), ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        ((2.0001, 2.0003), ["2.00010", "2.00015", "2.00020", "2.00025", "2.00030"]),
        ((0, 4000), ["0", "1,000", "2,000", "3,000", "4,000"]),
    ],
)
def test_ticks_are_round(ends, labels):
    assert [label for _, label in ticks(*ends)] == labels


def test_steps_are_whole():
    assert [label for _, label in step_ticks(0, 3)] == ["0", "1", "2", "3"]


def test_numbers_have_three_digits_and_a_unit():
    assert [figure(x) for x in (0, 1.2e-5, 0.01234, 0.1, 1.006, 9.999, 56.78, 6.0, 1234.5, -3.14159)] == (
        ["0", "1.2e-5", "0.0123", "0.100", "1.01", "10.0", "56.8", "6", "1,234", "-3.14"]
    )
    assert [duration(x) for x in (0.04, 59.96, 61, 3599.7, 3725, 90_000)] == (
        ["0.0400 s", "60.0 s", "1 min 1 s", "1 h 0 min", "1 h 2 min", "1 d 1 h"]
    )
    assert [size(n) for n in (12, 1500, 644_186_112, 30_532_122_624)] == ["12", "1.50K", "644M", "30.5B"]
    assert [size(n, "B") for n in (7, 1500, 2_570_059_776, 61_300_000_000)] == ["7 B", "1.50 kB", "2.57 GB", "61.3 GB"]
    assert (share(1, 3), share(1, 10**6), share(0.02062)) == ("33.33%", "<0.01%", "2.06%")
    assert (count(1, "step"), count(2_000, "step")) == ("1 step", "2,000 steps")


def test_the_templates_are_installed_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    templates = Path(render.__file__).parent / "template"
    for file in templates.iterdir():
        path = file.relative_to(ROOT / "trl_moe_ext").as_posix()
        assert any(fnmatch.fnmatch(path, pattern) for pattern in patterns["trl_moe_ext"]), f"{path} is not packed"
