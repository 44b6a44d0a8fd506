"""Which prompt a group is of, and what the generator is asked to continue."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.grpo.fakes import FakeTokenizer
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rollout.prompts import PromptSource

QUICKSTART_MODEL = "configs/quickstart/model"


def texts(*prompts):
    return Dataset.from_dict({"prompt": list(prompts), "answer": list(range(len(prompts)))})


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own():
    source = PromptSource(texts(*"abcdefgh"), FakeTokenizer(), seed=3)
    epochs = [[source.row(epoch * 8 + i) for i in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = PromptSource(texts(*"abcdefgh"), FakeTokenizer(), seed=3)
    assert [again.row(i) for i in (17, 3, 9)] == [epochs[2][1], epochs[0][3], epochs[1][1]]
    other = PromptSource(texts(*"abcdefgh"), FakeTokenizer(), seed=4)
    assert [other.row(i) for i in range(8)] != epochs[0]


def test_without_shuffling_the_order_is_that_of_the_dataset():
    source = PromptSource(texts("a", "b", "c"), FakeTokenizer(), shuffle=False)
    assert [source[i].prompt for i in range(5)] == ["a", "b", "c", "a", "b"]


def test_a_text_is_tokenised_with_special_tokens_and_keeps_its_columns():
    prompt = PromptSource(texts("ab"), FakeTokenizer())[0]
    assert prompt.token_ids == (1, ord("a"), ord("b"))
    assert prompt.columns == {"answer": 0}
    assert not prompt.conversational


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "user", "content": "hi"}], "[x=1]<user>hi<assistant>"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}], "[x=1]<user>hi<assistant>So"),
    ],
    ids=["question", "answer that has been begun"],
)
def test_messages_go_through_the_chat_template(messages, rendered):
    prompt = PromptSource(texts(messages), FakeTokenizer(), chat_template_kwargs={"x": 1})[0]
    assert prompt.token_ids == tuple(map(ord, rendered))
    assert prompt.conversational


def test_a_real_tokenizer_gives_the_tokens_of_its_own_template():
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    messages = [{"role": "user", "content": "2+3="}]
    prompt = PromptSource(texts(messages), tokenizer)[0]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt.token_ids) == expected


def test_a_prompt_without_room_for_a_completion_is_refused_at_once():
    with pytest.raises(ConfigError, match="row 1 has 51 tokens, of which 50 leave room"):
        PromptSource(texts("a", "b" * 50), FakeTokenizer(), max_prompt_length=50)
    PromptSource(texts("a", "b" * 49), FakeTokenizer(), max_prompt_length=50)


def test_the_longest_prompt_is_known_to_the_token():
    assert PromptSource(texts("a" * 30, "b" * 50, "c" * 45, "d" * 49), FakeTokenizer()).longest == 51


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids"])
def test_columns_that_would_replace_arguments_of_rewards_are_refused(column):
    with pytest.raises(ConfigError, match=rf"columns \['{column}'\].*rename"):
        PromptSource(texts("a").add_column(column, ["x"]), FakeTokenizer())
    assert PromptSource(texts("a").add_column("completion", ["x"]), FakeTokenizer())[0].columns == {"answer": 0}


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        (Dataset.from_dict({"question": ["a"]}), "no column 'prompt', only \\['question'\\]"),
        (texts(), "empty"),
        (texts(1, 2), "row 0 should be a text or a list of messages"),
        (texts([]), "row 0 should be a text or a list of messages"),
    ],
    ids=["no prompt", "no rows", "numbers", "no messages"],
)
def test_a_dataset_without_prompts_is_refused(dataset, told):
    with pytest.raises(ConfigError, match=told):
        PromptSource(dataset, FakeTokenizer())


def test_a_prompt_without_tokens_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    with pytest.raises(ConfigError, match="row 1 has no token"):
        PromptSource(texts("a", ""), tokenizer)
