"""`trl-moe profile`: what is run, what is written and printed, and how each failure ends."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner, Result

from tests.tiny_checkpoints import byte_tokenizer
from trl_moe_ext.cli.main import app
from trl_moe_ext.cli.profile_text import token_batches, token_ids
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.census import tiny_config
from trl_moe_ext.profiles import measure
from trl_moe_ext.profiles.match import check_profile
from trl_moe_ext.profiles.profile import ExpertProfile

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "quickstart" / "model"
DATA = ROOT / "configs" / "quickstart" / "data"
DOCS = ROOT / "docs" / "experts.md"
CHAT = [{"role": "user", "content": "What sound does an owl make?"}, {"role": "assistant", "content": "An owl hoots."}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def profile(*args: object, model: object = MODEL, dataset: object = DATA) -> Result:
    words = ["profile", str(model), "--dataset", str(dataset), "--device", "cpu", *map(str, args)]
    return CliRunner().invoke(app, words, catch_exceptions=False)


def refused(*args: object, **places: object) -> str:
    result = profile(*args, **places)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert not [*Path().glob("profile.*")]
    return result.stderr.splitlines()[-1].removeprefix("trl-moe: error: ")


def data_of(directory: Path, *rows: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


# -- what comes out --------------------------------------------------------------------------------------------------


def test_a_profile_of_the_quickstart() -> None:
    result = profile("--tokens", 2000)
    assert (result.exit_code, result.stderr) == (0, "")
    found = ExpertProfile.load(Path("profile.json"))
    assert (found.model, found.dataset, found.tokens) == (str(MODEL), f"{DATA}, split train", 2000)
    assert [layer.tokens for layer in found.layers] == [2000] * 4
    assert result.stdout.startswith(f"{MODEL}: use of the experts by 2,000 tokens of {DATA}, split train\n")
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r"\s+\d", line)]
    for row, layer in zip(rows, found.layers, strict=True):
        assert row[:3] == [layer.label, "8", str(layer.token_share.index(max(layer.token_share)))]
        assert row[3] == f"{max(layer.token_share):.1%}"
    assert "The most used quarter of the experts gets" in result.stdout
    assert "Profile: profile.json\nPicture: profile.png\n" in result.stdout
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[:2] == ["trl", "sft"]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options["--moe_expert_selection"] == "profile:profile.json"
    assert options["--moe_experts_per_layer"] == "2"
    assert (options["--model_name_or_path"], options["--dataset_name"]) == (str(MODEL), str(DATA))
    with Image.open("profile.png") as image:
        assert image.format == "PNG"
    check_profile(found, AutoModelForCausalLM.from_pretrained(MODEL))


def test_json_is_one_object_and_names_say_where_files_go() -> None:
    result = profile("--tokens", 300, "--json", "--out", "a.json", "--plot", "b.png")
    facts = json.loads(result.stdout)
    assert {path.name for path in Path().iterdir()} == {"a.json", "b.png"}
    assert (facts["out"], facts["plot"]) == ("a.json", "b.png")
    assert facts["profile"] == json.loads(Path("a.json").read_text())
    assert [layer["label"] for layer in facts["coverage"]] == ["0", "1", "2", "3"]
    assert facts["judgement"].startswith("The most used quarter")
    assert "--moe_expert_selection profile:a.json" in facts["command"]


def test_the_help_says_where_the_picture_goes() -> None:
    text = CliRunner().invoke(app, ["profile", "--help"]).output
    assert "[default: (that of --out, ending in .png)]" in " ".join(text.replace("│", " ").split())


def test_too_few_tokens_are_told_and_counted(here: Path) -> None:
    data = data_of(here / "data", *[{"messages": CHAT}] * 5)
    result = profile("--batch_size", 2, dataset=data)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = 5 * len(tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"])
    assert result.exit_code == 0
    assert result.stderr == f"The data set has only {tokens} tokens; --tokens asks for 200,000.\n"
    assert ExpertProfile.load(Path("profile.json")).tokens == tokens


def test_streamed_padded_or_cut_the_tokens_are_the_same() -> None:
    profiles = []
    for options in (["--batch_size", 1], ["--batch_size", 7], ["--streaming"]):
        assert profile("--tokens", 700, *options).exit_code == 0
        profiles.append(ExpertProfile.load(Path("profile.json")))
    for other in profiles[1:]:
        for one, same in zip(profiles[0].layers, other.layers, strict=True):
            assert one.token_share == pytest.approx(same.token_share, abs=2e-3)  # a near tie may fall the other way
            assert one.gate_score == pytest.approx(same.gate_score, abs=2e-3)


def test_with_an_adapter_that_runs_is_profiled(here: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], init_lora_weights=False, r=32)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    get_peft_model(base, config).save_pretrained(here / "adapter")
    profile("--tokens", 500, "--out", "base.json")
    assert profile("--tokens", 500, "--adapter", here / "adapter").exit_code == 0
    plain, adapted = (ExpertProfile.load(Path(name)) for name in ("base.json", "profile.json"))
    assert plain.layers[0].token_share != adapted.layers[0].token_share
    assert [layer.fingerprint for layer in plain.layers] == [layer.fingerprint for layer in adapted.layers]


def test_a_bar_on_a_terminal_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile("--tokens", 300).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "300/300" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", profile("--tokens", 300, "--json").stderr)


@pytest.mark.parametrize("stage", ["forward", "data"])
def test_ctrl_c_is_one_line_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    if stage == "forward":
        monkeypatch.setattr(measure._Meter, "run", interrupt)
    else:
        monkeypatch.setattr("trl_moe_ext.cli.training_data.training_data", interrupt)
    result = profile()
    assert result.exit_code == 130
    assert result.stderr == "trl-moe profile: interrupted; nothing was written\n"
    assert not [*Path().iterdir()]


def test_the_example_of_the_docs(here: Path) -> None:
    """Shares may differ in the last digit from machine to machine; what is told of them does not."""
    (here / "configs").symlink_to(ROOT / "configs")
    command, _, shown = (
        re.search(r"```console\n\$ trl-moe (.*?)\n(.*?)\n```", DOCS.read_text(), re.S)
        .expand(r"\1\n\n\2")
        .partition("\n\n")
    )
    result = CliRunner().invoke(app, shlex.split(command.replace("docs/images/", "")), catch_exceptions=False)
    assert result.exit_code == 0
    numbers = re.compile(r"\d+\.\d%")
    assert numbers.sub("", result.output).split() == numbers.sub("", shown.replace("docs/images/", "")).split()


# -- rows ------------------------------------------------------------------------------------------------------------

ROWS: dict[str, list[dict[str, Any]]] = {
    "chats": [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}],
    "chats by from and value": [{"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT]}],
    "chats in two parts": [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
    "texts in two parts": [{"prompt": "An owl", "completion": " hoots."}],
    "texts": [{"text": "An owl hoots."}, {"text": "A dove coos.<eos>"}, {"text": "A cow moos. " * 20}],
    "texts with a tool": [{"messages": CHAT, "tools": "[]"}],
    "tokens": [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")
def test_rows_become_the_tokens_that_trl_trains_on(here: Path, rows: list[dict[str, Any]]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", vocab_size=300)), byte_tokenizer()
    arguments = SFTConfig(output_dir="run", max_length=64, report_to="none", use_cpu=True, bf16=False)
    trained = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    expected = list(trained.train_dataset["input_ids"])
    assert [token_ids(dict(row), tokenizer, "text")[:64] for row in Dataset.from_list(rows)] == expected
    (batch,) = token_batches(
        Dataset.from_list(rows), tokenizer, text_column="text", batch_size=len(rows), max_length=64
    )
    for ids, row, mask in zip(expected, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask.bool()].tolist() == ids
        assert mask.tolist() == [1] * len(ids) + [0] * (len(mask) - len(ids))


def test_another_column_and_rows_without_a_token() -> None:
    tokenizer = byte_tokenizer(eos_token="<eos>")
    tokenizer.eos_token = None
    rows = [{"story": "One."}, {"story": ""}, {"story": "Two."}, {"story": "Three."}]
    batches = [*token_batches(rows, tokenizer, text_column="story", batch_size=2, max_length=4)]
    assert [tokenizer.batch_decode(batch["input_ids"]) for batch in batches] == [["One.", "Two."], ["Thre"]]


def first_batch(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return next(token_batches([row], tokenizer, text_column="text", batch_size=1, max_length=8))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"story": "One."}, "the rows have the columns story: neither messages, nor prompt and completion, nor text"),
        ({"prompt": CHAT[:1], "answer": "hoots"}, "prompts without completions"),
        ({"prompt": "An owl"}, "the rows have the columns prompt: neither"),
        ({"images": [], "messages": CHAT}, "the data set has images"),
        ({"messages": []}, "row 1 of the data set cannot be made into text: IndexError"),
        ({"text": None}, "row 1 of the data set cannot be made into text: ValueError: text is None"),
        ({"input_ids": [3, 10**6]}, "row 1 of the data set has the token 1000000, and the tokenizer .* knows"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        first_batch(row, byte_tokenizer())


def test_a_chat_for_a_tokenizer_without_a_template() -> None:
    with pytest.raises(ConfigError, match="the rows are chats, and the tokenizer of the model has no chat template"):
        first_batch({"messages": CHAT}, byte_tokenizer(chat_template=None))


def test_a_chat_that_the_template_refuses() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="TemplateError: roles must alternate"):
        first_batch({"messages": CHAT}, byte_tokenizer(chat_template=template))


# -- refusals --------------------------------------------------------------------------------------------------------


def test_files_that_could_not_be_written_are_refused_first(here: Path) -> None:
    missing = {"model": "no/model", "dataset": "no/data"}
    assert "nowhere is not a directory: nowhere/a.json cannot be written" in refused(
        "--out", "nowhere/a.json", **missing
    )
    assert "nowhere is not a directory" in refused("--plot", "nowhere/a.png", **missing)
    (here / "folder").mkdir()
    assert refused("--out", "folder", **missing) == "folder is a directory; give the name of a file"
    assert "the picture are the same file" in refused("--out", "a.png", **missing)


def test_models_that_are_refused_before_the_data_is_read(here: Path) -> None:
    assert "no configuration of no/model" in refused(model="no/model", dataset="no/data")
    LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained("dense")
    message = refused(model="dense", dataset="no/data")
    assert message.startswith("the model dense (LlamaForCausalLM) is dense: it has no routed experts to profile")
    tiny_config("switch_transformers").save_pretrained("switch")
    assert "is no model that goes on with a text" in refused(model="switch", dataset="no/data")


def test_a_model_without_weights(here: Path) -> None:
    tiny_config("qwen3_moe").save_pretrained("empty")
    assert refused(model="empty").startswith("empty cannot be loaded: ")


def test_data_that_is_refused(here: Path) -> None:
    assert refused(dataset="no/data").startswith("--dataset no/data cannot be loaded: ")
    assert "--split tset: the dataset has no such split; did you mean test?" in refused("--split", "tset")
    assert "is a file; give its directory" in refused(dataset=DATA / "train.jsonl")
    data = data_of(here / "data", {"question": "Why?"})
    assert "the rows have the columns question" in refused(dataset=data)
    assert "no router of the model saw a token" in refused(
        "--text_column", "question", dataset=data_of(here / "none", {"input_ids": []})
    )


def test_options_that_are_refused(here: Path) -> None:
    assert "--trust_remote_code has no effect with --adapter" in refused("--adapter", "x", "--trust_remote_code")
    assert "x is not a directory; give the output_dir of a training run" in refused("--adapter", "x")
    assert "--device nothing cannot be used" in refused("--device", "nothing")
