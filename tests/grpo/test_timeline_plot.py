"""The picture of a timeline: which part of a run it shows, and that it never costs a run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from trl_moe_ext.grpo import timeline_plot
from trl_moe_ext.grpo.timeline import GENERATOR, REWARDS, TRAINER, Span, Timeline
from trl_moe_ext.grpo.timeline_file import TimelineRecord


def run(steps: int) -> TimelineRecord:
    """Steps of a second: 0.2 s of waiting, 0.7 s of training, 0.1 s of sync; a generator that works all the time."""
    spans = [Span(GENERATOR, "generating", 0.0, float(steps)), Span(REWARDS, "scoring", 0.5, 1.0)]
    for step in range(steps):
        spans += [
            Span(TRAINER, "waiting", step, step + 0.2),
            Span(TRAINER, "training", step + 0.2, step + 0.9),
            Span(TRAINER, "sync", step + 0.9, step + 1.0),
        ]
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        seconds[span.lane][span.state] += span.end - span.start
    return TimelineRecord(tuple(sorted(spans, key=lambda span: span.start)), seconds)


@pytest.mark.parametrize(("steps", "window"), [(3, (0.0, 3.0)), (11, (0.0, 11.0)), (108, (51.0, 59.0))])
def test_the_window_holds_eight_syncs_from_the_middle(steps: int, window: tuple[float, float]) -> None:
    assert timeline_plot.steady_window(run(steps).spans) == pytest.approx(window)


def test_the_shares_of_stretches_add_up() -> None:
    shares = timeline_plot.stretch_shares(run(10).spans, TRAINER, 0.0, 10.0, stretches=4)  # of 2.5 s
    assert shares["waiting"] == pytest.approx([0.6 / 2.5, 0.4 / 2.5, 0.6 / 2.5, 0.4 / 2.5])
    assert [sum(column) for column in zip(*shares.values(), strict=True)] == pytest.approx([1.0] * 4)


def test_a_stretch_that_a_span_only_touches_has_none_of_it() -> None:
    spans = [Span(TRAINER, "training", 0.0, 1.0), Span(TRAINER, "sync", 3.0, 9.0)]
    shares = timeline_plot.stretch_shares(spans, TRAINER, 1.0, 3.0, stretches=2)
    assert shares == {}


def test_a_lane_is_told_in_words() -> None:
    assert timeline_plot._in_words(run(10), TRAINER) == (
        "trainer:  training 70%, waiting for samples 20%, sending the adapter 10%"
    )


@pytest.mark.parametrize("steps", [2, 40])
def test_every_state_of_the_window_has_its_colour(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "t.png"
    assert timeline_plot.save_timeline_plot(run(steps), path)
    with Image.open(path) as image:
        colours = {colour: n for n, colour in image.convert("RGB").getcolors(maxcolors=10**6)}
    for state in ("training", "generating", "scoring", "sync"):
        _, colour, _ = timeline_plot._STATES[state]
        assert colours.get(tuple(bytes.fromhex(colour[1:])), 0) > 200, state


def test_two_states_that_meet_in_a_lane_differ_in_lightness() -> None:
    """What is left of a colour for who sees none."""

    def lightness(colour: str) -> float:
        return sum(w * v for w, v in zip((0.299, 0.587, 0.114), bytes.fromhex(colour[1:]), strict=True)) / 255

    looks = timeline_plot._STATES
    for busy, without_work in (
        ("training", "waiting"),
        ("generating", "idle"),
        ("scoring", "idle"),
        ("sync", "waiting"),
    ):
        assert abs(lightness(looks[busy][1]) - lightness(looks[without_work][1])) > 0.2


def test_a_run_leaves_both_files(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.mark(TRAINER, "waiting")
    timeline.mark(TRAINER, "a state of a plug-in")
    written = timeline_plot.save_timeline(timeline, tmp_path / "new")
    assert [path.name for path in written] == ["async_timeline.jsonl", "async_timeline.png"]
    assert all(path.is_file() for path in written)
    assert set(TimelineRecord.load(written[0]).seconds[TRAINER]) == {"waiting", "a state of a plug-in"}


def test_an_empty_timeline_leaves_nothing(tmp_path: Path) -> None:
    assert timeline_plot.save_timeline(Timeline(), tmp_path) == []
    assert not timeline_plot.save_timeline_plot(TimelineRecord((), {}), tmp_path / "t.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(record: TimelineRecord, path: Path) -> bool:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(timeline_plot, "save_timeline_plot", fail)
    timeline = Timeline()
    timeline.mark(TRAINER, "waiting")
    with pytest.warns(RuntimeWarning, match=r"async_timeline.png was not written: .*no fonts"):
        assert [path.name for path in timeline_plot.save_timeline(timeline, tmp_path)] == ["async_timeline.jsonl"]


def test_a_directory_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    timeline = Timeline()
    timeline.mark(TRAINER, "waiting")
    with pytest.warns(RuntimeWarning, match="was not written"):
        assert timeline_plot.save_timeline(timeline, tmp_path / "file") == []
