"""The table of completions: what is in it, how much of it there may be, and that it costs no run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_moe_ext.grpo import completions
from trl_moe_ext.grpo.backends.protocol import Segment
from trl_moe_ext.grpo.completions import CompletionsTable
from trl_moe_ext.grpo.sample import MoeRolloutSample

MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def options(**changes: Any) -> Any:
    return SimpleNamespace(**{"log_completions": False, "num_completions_to_print": None, "seed": 3} | changes)


def sample(tokenizer: PreTrainedTokenizerBase, text: str = "four", version: int = 4, **metrics: float) -> Any:
    prompt, completion = tokenizer("What is 2+2?")["input_ids"], tokenizer(text)["input_ids"]
    return MoeRolloutSample(
        prompt=[{"role": "user", "content": "What is 2+2?"}],
        completion=[{"role": "assistant", "content": text}],
        input_ids=np.array(prompt + completion),
        completion_mask=np.array([0] * len(prompt) + [1] * len(completion)),
        old_log_probs=np.zeros(len(prompt) + len(completion), dtype=np.float32),
        advantage=0.5,
        model_version=version,
        group_id=0,
        metrics={"reward": 1.0, "rewards/exact": 1.0, **metrics},
        segments=(Segment(version, len(completion)),),
    )


def read(directory: Path, step: int) -> list[dict[str, Any]]:
    return parquet.read_table(directory / "completions" / f"completions_{step:05d}.parquet").to_pylist()


def test_a_row_tells_text_rewards_and_versions(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table = CompletionsTable(tmp_path, tokenizer, options())
    table.add(sample(tokenizer, "four", **{"rewards/brief": float("nan"), "rewards/step": 0.25}), 6)
    table.flush(10)
    assert read(tmp_path, 10) == [
        {
            "step": 10,
            "prompt": "What is 2+2?",
            "completion": "four",
            "exact": 1.0,
            "brief": None,
            "rewards/step": 0.25,  # not in the place of the step
            "advantage": 0.5,
            "model_version": 4,
            "lag": 2,
        }
    ]


def test_special_tokens_are_shown_as_the_model_drew_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table = CompletionsTable(tmp_path, tokenizer, options())
    table.add(sample(tokenizer, f"four{tokenizer.eos_token}"), 4)
    table.flush(1)
    assert read(tmp_path, 1)[0]["completion"] == f"four{tokenizer.eos_token}"


def test_tokens_left_out_of_the_loss_belong_to_the_completion(tmp_path: Path, tokenizer) -> None:
    gap = sample(tokenizer, "one two three")
    gap.completion_mask[-2] = 0
    table = CompletionsTable(tmp_path, tokenizer, options())
    table.add(gap, 4)
    table.flush(1)
    assert read(tmp_path, 1)[0]["completion"] == "one two three"


def test_every_sample_is_as_likely_to_be_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table = CompletionsTable(tmp_path, tokenizer, options(num_completions_to_print=2))
    samples = [sample(tokenizer, version=version) for version in range(10)]
    for step in range(150):
        for one in samples:
            table.add(one, 10)
        table.flush(step)
    counts = Counter(row["model_version"] for step in range(150) for row in read(tmp_path, step))
    assert sum(counts.values()) == 300
    assert all(10 <= counts[version] <= 55 for version in range(10)), counts  # 30 each; a standard deviation is 5


def test_nothing_new_is_nothing_written(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table = CompletionsTable(tmp_path, tokenizer, options())
    table.flush(1)
    assert list(tmp_path.iterdir()) == []
    table.add(sample(tokenizer), 4)
    table.flush(2)
    table.flush(3)
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00002.parquet"]


def test_a_long_run_has_a_bounded_number_of_files(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_MOST_FILES", 10)
    table = CompletionsTable(tmp_path, tokenizer, options(num_completions_to_print=1))
    counts = []
    for step in range(99_980, 100_020):  # names grow by a digit
        table.add(sample(tokenizer), 4)
        table.flush(step)
        counts.append(len(list((tmp_path / "completions").iterdir())))
    assert max(counts) <= 10
    assert read(tmp_path, 99_980)
    assert read(tmp_path, 100_019)


def test_a_long_text_is_cut(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_MOST_CHARACTERS", 5)
    table = CompletionsTable(tmp_path, tokenizer, options())
    table.add(sample(tokenizer), 4)
    table.flush(1)
    assert read(tmp_path, 1)[0]["prompt"] == "What  ..."


def test_they_are_printed_if_asked_for(tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (False, True):
        table = CompletionsTable(tmp_path, tokenizer, options(log_completions=asked))
        table.add(sample(tokenizer, **{"rewards/brief": float("nan")}), 6)
        table.flush(12)
        out = capsys.readouterr().out
        assert ("Step 12" in out) is asked
        assert ("exact" in out) is asked


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "completions").write_text("a file in its place")
    table = CompletionsTable(tmp_path, tokenizer, options())
    table.add(sample(tokenizer), 4)
    with pytest.warns(RuntimeWarning, match="completions were not written"):
        table.flush(1)
