"""The page of a GRPO run: rewards, completions, who waited, and nothing of that for another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.reporting.sample_grpo_run import STEPS, completion, timeline, write_completions, write_grpo_run
from tests.reporting.sample_run import write_run
from tests.reporting.test_page import Page, page_of
from tests.reporting.test_page_in_browser import CHROMIUM, OVERFLOW, ask
from trl_moe_ext.grpo.timeline_plot import save_timeline_plot
from trl_moe_ext.reporting.page import read_run, render_page
from trl_moe_ext.reporting.page.completions import read_completions
from trl_moe_ext.reporting.run_record import RECORD_FILE, RunRecord

SECTIONS = ["rewards", "rollout", "loss", "router", "drift", "adapted", "cost", "settings"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grpo_run(tmp_path_factory.mktemp("runs") / "grpo")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def change(run: Path, **values: float | None) -> None:
    """Set values of every row of the log; None removes them. ``__`` stands for a slash."""
    record = RunRecord.load(run / RECORD_FILE)
    for row in record.log_history:
        for name, value in values.items():
            row.pop(name.replace("__", "/"), None)
            if value is not None:
                row[name.replace("__", "/")] = value
    record.save(run)


def test_the_sections_come_first(finished: Path) -> None:
    assert [name for name in page_of(finished).texts if name != "head"] == SECTIONS


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("head", ["Reward 0.894 from 0.287", "Trained parameters"]),
        ("rewards", ["The mean reward rose from 0.381 to 0.865, each the mean of 6 logs."]),
        ("rewards", ["raised an error 3 times, took too long 1 time; those completions have no reward of them."]),
        ("rewards", ["30 groups had the same reward throughout"]),
        ("rewards", ["Reward of exact_answer 0.724", "Reward of brief", "Spread within a group", "mean of 3 logs"]),
        ("rewards", ["Completions at step 1 ", "Completions at step 60 ", "What is 19 + 23?<|im_end|>"]),
        ("rewards", ["The answer is 42.<|im_end|> exact_answer 1 advantage +0.30 version 59, 1 behind"]),
        (
            "rollout",
            [
                "Trainer waited 20% of its time, mean of the logs",
                "Generator idle 5%",
                "Samples behind 1.20 versions, at most 2",
            ],
        ),
        ("rollout", ["Sync of the adapter 0.0455 s 4.20 MB", "Generated 848 /s", "Who did what when"]),
        ("rollout", ["The trainer waited for samples more than the generator for the trainer."]),
        ("rollout", ["The generator was restarted 1 time, first before step 25."]),
        ("rollout", ["2 groups had become too old in the queue, and their prompts were asked again."]),
        ("rollout", ["0 10.0% 1 60.0% 2 30.0% 3 0.0%", "Effective sample size", "nats a token 0.00100", "Ratio"]),
        ("rollout", ["Other experts than the generator's", "The same in any layer", "Samples ready"]),
    ],
)
def test_what_it_tells(finished: Path, section: str, told: list[str]) -> None:
    text = page_of(finished).texts[section]
    for words in told:
        assert words in text


def test_it_loads_nothing(finished: Path) -> None:
    page = page_of(finished)
    assert any(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert all(address.startswith("data:") for address in page.loaded)


def test_another_run_has_no_such_section(tmp_path: Path) -> None:
    assert {"rewards", "rollout"} & page_of(write_run(tmp_path / "sft")).texts.keys() == set()


def test_a_synchronous_run_has_rewards_alone(tmp_path: Path) -> None:
    record = RunRecord(
        log_history=[
            {"step": step, "loss": 0.0, "reward": step / 10, "rewards/a/mean": 1.0, "rewards/a/std": 0.0, "kl": 0.1}
            for step in range(1, 6)
        ],
        max_steps=5,
    )
    record.save(tmp_path)
    # As TRL writes them: messages, and no version.
    said = {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]}
    write_completions(tmp_path, 5, [{"step": 5, **said, "a": 1.0, "advantage": 0.5}])
    texts = page_of(tmp_path).texts
    assert "rollout" not in texts
    assert "The mean reward rose from 0.100 to 0.500." in texts["rewards"]
    assert "2 + 2? 4 a 1 advantage +0.50" in texts["rewards"]
    assert "Reward of" not in texts["rewards"], "one function is the reward"
    assert "Reward functions" not in texts["rewards"], "failures were not counted"


@pytest.mark.parametrize(
    ("values", "section", "words"),
    [
        ({"reward__raised_total": 0.0, "reward__timeout_total": 0.0}, "rewards", "No reward function failed."),
        ({"rollout__restarts_total": 0.0}, "rollout", "The generator was never restarted."),
        ({"trainer__wait_frac": 0.0, "generator__idle_frac": 0.3}, "rollout", "The generator waited for the trainer"),
        ({"trainer__wait_frac": 0.01, "generator__idle_frac": 0.02}, "rollout", "kept each other busy"),
        ({"importance__kl_k3": None, "kl": 0.5}, "rollout", "nats a token 0.500"),
        ({"sync__bytes": None, "sync__seconds": None}, "rollout", "Samples behind"),
        ({"trainer__wait_frac": None, "generator__idle_frac": None}, "rollout", "Samples behind"),
    ],
)
def test_other_runs_are_told_otherwise(run: Path, values: dict[str, float], section: str, words: str) -> None:
    change(run, **values)
    assert words in page_of(run).texts[section]


def test_what_a_model_writes_is_text(run: Path) -> None:
    attack = "</pre></script><script>alert(1)</script><img src=http://x>"
    write_completions(run, STEPS, [completion(STEPS, 0.5, attack) | {attack: 1.0}])
    page = Page(render_page(read_run(run)))
    assert attack in page.texts["rewards"]
    assert all(address.startswith("data:") for address in page.loaded)


def test_completions_that_a_resumed_run_has_thrown_away_are_not_shown(run: Path) -> None:
    write_completions(run, STEPS + 5, [completion(STEPS + 5, 0.5, "thrown away")])
    assert "thrown away" not in page_of(run).texts["rewards"]


def test_a_damaged_file_is_named_and_left_out(run: Path) -> None:
    (run / "completions" / f"completions_{STEPS:05d}.parquet").write_bytes(b"PAR1 cut")
    texts = page_of(run).texts
    assert f"completions_{STEPS:05d}.parquet cannot be read" in texts["head"]
    assert "Completions at step 1 " in texts["rewards"]
    assert f"Completions at step {STEPS}" not in texts["rewards"]


def test_the_best_and_the_worst_are_among_those_that_are_shown(tmp_path: Path) -> None:
    rows = [completion(3, advantage, f"text {advantage}") for advantage in (0.25, -2.0, 1.5, 0.0, -0.5, 0.75)]
    write_completions(tmp_path, 3, rows)
    [at_step], note = read_completions(tmp_path, last_step=3)
    assert [one.text for one in at_step.completions] == ["text 1.5", "text 0.25", "text 0.0", "text -2.0"]
    assert note == ""


def test_long_texts_are_cut(tmp_path: Path) -> None:
    write_completions(tmp_path, 3, [completion(3, 0.5, "a" * 5_000)])
    [at_step], _ = read_completions(tmp_path, last_step=3)
    assert at_step.completions[0].text == f"{'a' * 1_500} ..."


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [320, 1440])
def test_nothing_is_wider_than_the_page(run: Path, width: int) -> None:
    write_completions(run, STEPS, [completion(STEPS, 0.5, "wide" * 300)])
    save_timeline_plot(timeline(400), run / "async_timeline.png")
    (run / "report.html").write_text(render_page(read_run(run)))
    found = ask(run, width, OVERFLOW)
    assert found["page"] == found["width"]  # a scroll bar may stand beside it
    assert found["wide"] == []
