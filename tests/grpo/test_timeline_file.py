"""A timeline survives its run: what is saved is what was marked, and a damaged file says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.timeline import GENERATOR, TRAINER, Span, Timeline
from trl_moe_ext.grpo.timeline_file import TimelineRecord

RECORD = TimelineRecord(
    (Span(TRAINER, "waiting", 0.0, 1.0), Span(GENERATOR, "generating", 0.0, 4.0), Span(TRAINER, "training", 1.0, 4.0)),
    {TRAINER: {"waiting": 1.0, "training": 3.0}, GENERATOR: {"generating": 4.0}},
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "t.jsonl")
    assert TimelineRecord.load(tmp_path / "t.jsonl") == RECORD
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 1 + len(RECORD.spans)


def test_shares_are_of_the_time_of_a_lane_largest_first() -> None:
    assert list(RECORD.shares(TRAINER).items()) == [("training", 0.75), ("waiting", 0.25)]
    assert RECORD.shares("rewards") == {}


def test_the_seconds_of_a_timeline_count_spans_that_were_dropped() -> None:
    timeline = Timeline(max_spans=10)
    for _ in range(20):
        timeline.mark(TRAINER, "training")
        timeline.mark(TRAINER, "waiting")
    record = TimelineRecord.of(timeline)
    assert len(record.spans) < 30
    assert sum(record.seconds[TRAINER].values()) >= record.spans[-1].end - record.spans[0].start
    assert record.seconds.keys() == {TRAINER}
    assert sorted(record.spans, key=lambda span: span.start) == list(record.spans)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged"),
        ("{}\n", "is damaged"),
        ('{"format": 1, "seconds": {}}\n{"lane": "trainer"}\n', "is damaged"),
        ('{"format": 1, "seconds": {}}\n{"lane"', "is damaged"),
        ('{"format": 99, "seconds": {}}\n', "another version"),
    ],
)
def test_a_file_that_is_no_timeline(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        TimelineRecord.load(tmp_path / "t.jsonl")
