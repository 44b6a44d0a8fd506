"""Async GRPO from end to end with a generator in memory: what is synced, trained on, counted and refused."""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing
import os
import sys
import time
import types
from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.grpo.fakes import FakeBackend
from tests.grpo.trainer_runs import MODEL, PROMPTS, draw, make_trainer, settings
from trl_moe_ext import AsyncMoeGRPOTrainer, MoeLoraConfig
from trl_moe_ext.errors import ConfigError, LayoutError, MoeExtError, PluginError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import Generation, GenerationRequest
from trl_moe_ext.grpo.loss import trained_policy
from trl_moe_ext.grpo.trl_async import AsyncGRPOTrainer, trainer_module


class RecordingBackend(FakeBackend):
    """Keeps the weights of every adapter that it was given."""

    def __init__(self, **options):
        super().__init__(complete=options.pop("complete", draw), **options)
        self.given: dict[int, dict[str, torch.Tensor]] = {}

    def start(self, adapter: AdapterSnapshot) -> None:
        super().start(adapter)
        self.given[adapter.version] = dict(adapter.tensors)

    def load_adapter(self, adapter: AdapterSnapshot) -> None:
        super().load_adapter(adapter)
        self.given[adapter.version] = dict(adapter.tensors)


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_a_run(max_staleness, tmp_path):
    """With staleness 0 the generator may make no sample more than the step at hand needs."""
    backend = RecordingBackend()
    trainer = make_trainer(tmp_path, backend, learning_rate=1e-2, max_staleness=max_staleness)
    trainer.train()
    assert trainer.state.global_step == 3
    assert backend.starts == [0]
    assert [*backend.given] == [*range(len(backend.given))], "each version once, in order"
    assert logged(trainer, "batch/samples_per_step") == [8, 8, 8]
    assert logged(trainer, "batch/groups_per_step") == [2, 2, 2]
    assert max(logged(trainer, "sample/staleness_max")) <= max_staleness
    assert backend.pid is None
    assert backend.stops
    assert trainer.rollout_worker.state()["first_undone"] == 6
    assert (tmp_path / "async_timeline.jsonl").is_file()
    lanes = {json.loads(line).get("lane") for line in (tmp_path / "async_timeline.jsonl").read_text().splitlines()}
    assert "trainer" in lanes


def test_the_adapter_that_travels_is_the_one_that_is_trained(tmp_path):
    backend = RecordingBackend()
    trainer = make_trainer(tmp_path, backend, learning_rate=1e-2, max_staleness=0)
    before = {n: t.clone() for n, t in get_peft_model_state_dict(trainer.model).items()}
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in backend.given[0].items()), "not overwritten since"
    # The last version may have had no time to arrive before the end.
    newest = trainer.rollout_worker._snapshot
    assert newest.version == 3
    after = get_peft_model_state_dict(trainer.model)
    assert after.keys() == newest.tensors.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in newest.tensors.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in newest.tensors.items())


def test_fewer_syncs_than_steps(tmp_path):
    trainer = make_trainer(tmp_path, weight_sync_steps=2, max_steps=4)
    trainer.train()
    assert trainer.model_version == 2


@pytest.mark.parametrize(("token_budget", "straddles"), [(20, False), (25, True)])
def test_rows_by_tokens(token_budget, straddles, tmp_path):
    """Steps end in the midst of groups, or before those they were generated for: no sample is lost or used twice."""
    steps: dict[int, list[int]] = {}
    samples: dict[int, Counter] = {}
    lags: dict[int, list[int]] = {}
    trainer = make_trainer(tmp_path, token_budget=token_budget, max_staleness=0, max_steps=-1, num_train_epochs=1)

    def note(sample, version):
        steps.setdefault(sample.group_id, []).append(trainer.state.global_step)
        samples.setdefault(sample.group_id, Counter())[tuple(sample.input_ids)] += 1
        lags.setdefault(sample.group_id, []).append(version - sample.model_version)

    trainer.completions.add = note
    trainer.train()
    assert max(logged(trainer, "batch/row_tokens_max")) <= token_budget
    assert any(len({*found}) > 1 for found in steps.values()) == straddles
    done = [group for group in samples if group < len(PROMPTS)]
    assert sorted(done) == [*range(len(PROMPTS))]
    assert all([*samples[group].values()] == [1] * 4 for group in done)
    assert {found[0] for found in lags.values()} == {0}, "no group is begun that is too old"
    assert max(map(max, lags.values())) == straddles
    state = trainer.rollout_worker.state()
    others = {group for group in samples if samples[group].total() == 4} - {*range(state["first_undone"])}
    assert {*state["done_beyond"]} == others, "a group is done with its last sample"


def test_an_epoch_is_every_prompt_once_and_skipped_ones_count(tmp_path):
    """Ten prompts, of which every second has completions of one reward; four that are useful make two steps of two."""
    prompts = Dataset.from_dict({"prompt": [f"what is {n}" for n in range(8)], "useful": [n % 2 for n in range(8)]})

    def reward(completion_ids, useful, **columns):
        return [float(at) if useful[0] else 1.0 for at in range(len(completion_ids))]

    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=1, train_dataset=prompts, reward_funcs=reward)
    trainer.train()
    state = trainer.rollout_worker.state()
    assert trainer.state.global_step <= 3
    assert state["num_done"] >= 8
    assert trainer.state.log_history[-1]["step"] == trainer.state.global_step
    assert all(groups <= 2 for groups in logged(trainer, "batch/groups_per_step")), "skipped ones are not trained on"


def test_prompts_of_the_next_epoch_do_not_count(tmp_path):
    """While one of the first epoch waits for its reward, others of the second are trained on, and skipped."""
    last = []

    def reward(completion_ids, prompts, **columns):
        if prompts[0] == "what is 3" and not last:
            last.append(time.sleep(1.0))
        is_useful = int(prompts[0].split()[-1]) % 2
        return [float(at) if is_useful else 1.0 for at in range(len(completion_ids))]

    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=1, max_staleness=4, reward_funcs=reward)
    trainer.train()
    assert trainer.rollout_worker.state()["first_undone"] >= len(PROMPTS)


def test_a_signal_to_another_process_ends_all_alike(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "_total", torch.ones_like)
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143
    assert trainer.state.global_step == 1
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


def test_a_backend_of_the_callers_costs_no_threads(tmp_path):
    found = []

    class Threads(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found.append(torch.get_num_threads())

    before, more = torch.get_num_threads(), 1 + (os.cpu_count() or 1)
    torch.set_num_threads(more)
    try:
        make_trainer(tmp_path, max_steps=1, callbacks=[Threads()]).train()
    finally:
        torch.set_num_threads(before)
    assert found == [more]


def test_a_model_whose_routers_are_unknown(tmp_path, monkeypatch):
    """Nobody asked for its routes; its auxiliary loss would be for a router that is trained."""

    def find_routers(model):
        raise LayoutError("this can't be told")

    monkeypatch.setattr(trained_policy, "find_routers", find_routers)
    trainer = make_trainer(tmp_path, max_steps=1, router_aux_loss_coef=None)
    assert not trainer.aux_loss_enabled
    trainer.train()
    with pytest.raises(LayoutError, match="this can't be told"):
        make_trainer(tmp_path, routing_replay=True)


class Judge:
    """A function with options of its own."""

    def __init__(self):
        self.config = {"threshold": 1}

    def __call__(self, completion_ids, **columns):
        return [float(at) for at in range(len(completion_ids))]


def test_a_path_and_a_reward_with_a_config(tmp_path):
    arguments = {"train_dataset": PROMPTS, "peft_config": MoeLoraConfig(r=2), "rollout_backend": FakeBackend()}
    trainer = AsyncMoeGRPOTrainer(MODEL, Judge(), settings(tmp_path, max_steps=1), **arguments)
    trainer.train()
    assert logged(trainer, "rewards/Judge") == [1.5]


def test_trls_own_parts_are_where_they_are_looked_for(tmp_path):
    """What is overridden or read is private to TRL: a release that moves it has to be noticed."""
    made = inspect.getsource(AsyncGRPOTrainer.__init__)
    assert "StepIntervalCallback(self._sync_weight" in made
    assert "_sync_weight()" in inspect.getsource(trainer_module._TrainBeginCallback)
    accounting = inspect.getsource(AsyncGRPOTrainer._log_step_metrics)
    trainer = make_trainer(tmp_path)
    for name in (
        "_step_forward_tokens",
        "_step_trained_tokens",
        "_step_seq_len_weighted",
        "_step_samples",
        "_step_forward_s",
        "_last_groups_trained",
        "_trained_groups",
    ):
        assert f"self.{name}" in accounting
        assert hasattr(trainer, name)
    for name in ("aux_loss_enabled", "router_aux_loss_coef", "_epoch_stop_groups", "_adapter_name", "_metrics"):
        assert hasattr(trainer, name)
    assert hasattr(trainer_module, "_EpochStopCallback")


def test_accounting_is_that_of_trls_own_loss(tmp_path):
    """The figures of a step do not depend on who computes its loss."""
    names = [f"batch/{name}_per_step" for name in ("forwarded_tokens", "trained_tokens", "samples", "microbatches")]
    found = {}
    for correction in ("none", "tis"):
        trainer = make_trainer(tmp_path / correction, importance_correction=correction, max_steps=1)
        trainer.train()
        found[correction] = [logged(trainer, name) for name in names]
        assert logged(trainer, "perf/forwarded_tok_s_fwd_bwd")[0] > 0
    assert found["none"] == found["tis"]


def test_completions_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00001.parquet"]


def test_a_second_training_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(MoeExtError, match="make a new trainer"):
        trainer.train()


def test_a_backend_that_never_starts_ends_the_run_with_its_cause(tmp_path):
    class Broken(FakeBackend):
        def start(self, adapter):
            raise ConfigError("this can't be generated with")

    trainer = make_trainer(tmp_path, Broken())
    with pytest.raises(MoeExtError, match="this can't be generated with"):
        trainer.train()
    assert not [*tmp_path.glob("checkpoint-*")], "nothing was trained yet"


def test_samples_end_and_a_checkpoint_is_written(tmp_path):
    """The worker gives up in the midst of a run: what was trained is not lost."""
    count = iter(range(100))

    def complete(request: GenerationRequest, asked: int, version: int) -> Generation:
        if next(count) >= 12:
            raise MemoryError("no more")
        return draw(request, asked, version)

    trainer = make_trainer(tmp_path, FakeBackend(complete=complete), max_rollout_restarts=0, max_staleness=0)
    with pytest.raises(MoeExtError):
        trainer.train()
    assert trainer.state.global_step == 1
    folder = tmp_path / "checkpoint-1"
    assert (folder / "trainer_state.json").is_file()
    assert json.loads((folder / "rollout_state.json").read_text())["worker"]["num_done"] == 2


def dataset(**options):
    return {"train_dataset": Dataset.from_dict(options)}


REFUSED = {
    "no adapter": ({"peft_config": None}, "only an adapter travels"),
    "a stream": ({"train_dataset": PROMPTS.to_iterable_dataset()}, "without streaming"),
    "no prompts": (dataset(text=["a"]), "column 'prompt'"),
    "no reward": ({"reward_funcs": []}, "reward_funcs is empty"),
    "a reward model": ({"reward_funcs": "some/model"}, "give a function that calls it"),
    "a loaded reward model": ({"reward_funcs": torch.nn.Linear(1, 1)}, "give a function that calls it"),
    "weights of other rewards": ({"reward_weights": [1.0, 2.0]}, "2 weights for 1 reward functions"),
    "a reward that can't be sent": (
        {"reward_pool": "process", "reward_funcs": lambda **columns: []},
        "<lambda> can't be sent to a process: .*reward_pool='thread'",
    ),
    "groups that straddle steps": ({"num_generations": 3}, "no multiple of num_generations=3"),
    "no budget": ({"token_budget": None}, "token_budget=None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_loaded(case, monkeypatch, tmp_path):
    options, message = REFUSED[case]
    monkeypatch.setattr(trainer_module, "create_model_from_path", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **options)


def test_a_reward_of_a_notebook_is_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    """Such a function can be pickled, by its name alone: a process would look for it in vain."""
    notebook = types.ModuleType("__main__")
    exec("def rate(completions, **columns): return [0.0] * len(completions)", vars(notebook))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr(trainer_module, "create_model_from_path", lambda *a, **k: pytest.fail("it was loaded"))
    for function in (notebook.rate, functools.partial(notebook.rate)):
        with pytest.raises(ConfigError, match="rate can't be sent to a process: it was defined in a notebook"):
            make_trainer(tmp_path, reward_pool="process", reward_funcs=function)


def test_a_process_that_only_imports_the_script_does_not_train(monkeypatch, tmp_path):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.setattr(trainer_module, "create_model_from_path", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match="guard the script"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [print]}, "TRL's own AsyncGRPOTrainer"),
        ({"environment_factory": object}, "TRL's own AsyncGRPOTrainer"),
        ({"rollout_backend": "local"}, "A name goes into the options"),
    ],
    ids=["tools", "environment", "backend by name"],
)
def test_other_arguments_that_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AsyncMoeGRPOTrainer(str(MODEL), print, settings(tmp_path), PROMPTS, peft_config=LoraConfig(), **arguments)


def test_a_model_that_is_no_path_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match="which the generator can load too"):
        AsyncMoeGRPOTrainer(model, print, settings(tmp_path), PROMPTS, peft_config=LoraConfig())


def test_an_unknown_backend_and_one_without_routes(tmp_path):
    with pytest.raises(PluginError, match="did you mean"):
        AsyncMoeGRPOTrainer(
            str(MODEL), print, settings(tmp_path, rollout_backend="locale"), PROMPTS, peft_config=LoraConfig()
        )
    with pytest.raises(ConfigError, match="routing_replay needs a backend that records routes"):
        AsyncMoeGRPOTrainer(
            str(MODEL),
            print,
            settings(tmp_path, rollout_backend="vllm", routing_replay=True),
            PROMPTS,
            peft_config=LoraConfig(),
        )


def test_what_is_trained_and_would_not_travel_is_refused(monkeypatch, tmp_path):
    """A bias that someone has set free, say."""
    stock = trainer_module.get_peft_model

    def with_free_norm(model, config):
        found = stock(model, config)
        next(p for name, p in found.named_parameters() if "norm" in name).requires_grad_(True)
        return found

    monkeypatch.setattr(trainer_module, "get_peft_model", with_free_norm)
    with pytest.raises(ConfigError, match=r"norm\.weight' is trained .*no part of the adapter"):
        make_trainer(tmp_path)


def test_modules_that_are_saved_with_the_adapter_travel(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=MoeLoraConfig(r=2, router_mode="full", modules_to_save=["norm"]))
    trainer._sync_weight()
    names = trainer.rollout_worker._snapshot.tensors
    assert any(name.endswith("norm.weight") for name in names)
    assert any(".mlp.gate." in name for name in names)


@pytest.mark.parametrize(
    ("coefficient", "router_mode", "is_added"), [(None, "frozen", False), (None, "full", True), (0.1, "frozen", True)]
)
def test_the_auxiliary_loss_of_the_config_is_for_a_router_that_is_trained(
    tmp_path, coefficient, router_mode, is_added
):
    trainer = make_trainer(
        tmp_path, router_aux_loss_coef=coefficient, peft_config=MoeLoraConfig(r=2, router_mode=router_mode)
    )
    assert trainer.router_aux_loss_coef
    assert trainer.aux_loss_enabled == is_added
