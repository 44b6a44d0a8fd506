"""Every way of TRL to make a loss, with a router loss: it is added to the loss, and trained."""

from __future__ import annotations

import importlib.util

import pytest
from datasets import Dataset, load_dataset

from tests.sft.added import COEFFICIENT, assert_added
from tests.sft.runs import QUICKSTART, rows, sft
from trl_moe_ext import MoeLoraConfig, MoeSFTTrainer
from trl_moe_ext.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning"),
]

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None


def squared_error(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, without a model's loss in it."""
    kept = labels[:, 1:] != -100
    chosen = outputs.logits[:, :-1].float().softmax(-1).gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1))
    return (1 - chosen.squeeze(-1))[kept].square().sum() / num_items_in_batch


def conversations(split="train[:12]"):
    return load_dataset(str(QUICKSTART / "data"), split=split)


def prompts():
    rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:2]} for row in conversations()]
    return Dataset.from_list(rows)


ON_TOKENS = {
    "plain": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing bfd": {"packing": True, "max_length": 24},
    "packing wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "dft": {"loss_type": "dft"},
    "compute_loss_func": {"others": {"compute_loss_func": squared_error}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation, label smoothing": {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
    "accumulation, compute_loss_func": {
        "gradient_accumulation_steps": 2,
        "others": {"compute_loss_func": squared_error},
    },
    "accumulation, means of micro-batches": {"gradient_accumulation_steps": 2, "accepts_loss_kwargs": False},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "selective checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": False},
    },
    "neftune": {"neftune_noise_alpha": 5.0},
    "streaming": {"data": Dataset.from_dict({"input_ids": rows()}).to_iterable_dataset()},
}
ON_TEXT = {
    "completion_only_loss": {"data": prompts, "completion_only_loss": True},
    "assistant_only_loss": {"data": conversations, "assistant_only_loss": True},
}


@pytest.mark.parametrize("options", ON_TOKENS.values(), ids=ON_TOKENS)
def test_a_router_loss_is_added(tmp_path, options):
    assert_added(tmp_path, **options)


@pytest.mark.parametrize("options", ON_TEXT.values(), ids=ON_TEXT)
def test_a_router_loss_is_added_with_labels_on_a_part(tmp_path, options):
    """Tokens without a label are routed, and count."""
    data = options["data"]()
    assert_added(tmp_path, model="quickstart", **options | {"data": data})


@pytest.mark.skipif(not HAS_LIGER, reason="liger_kernel is not installed")
def test_a_router_loss_is_added_with_liger_kernels(tmp_path):
    assert_added(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("losses", [{"router_aux_loss_coef": 0.1}, {"router_losses": {"z_loss": 0.1}}])
def test_reentrant_checkpointing_is_refused(tmp_path, losses):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="reentrant gradient checkpointing no gradient flows"):
        sft(tmp_path, **reentrant, **losses)
    sft(tmp_path, **reentrant, router_metrics="full", router_aux_loss_coef=0.0).train()


def test_reentrant_checkpointing_behind_our_back_is_refused(tmp_path):
    trainer = sft(tmp_path, router_aux_loss_coef=0.1)
    trainer.model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    trainer.model.enable_input_require_grads()
    with pytest.raises(ConfigError, match="gradient checkpointing is reentrant"):
        trainer.train()


def test_a_loss_that_reaches_nothing_is_refused(tmp_path):
    """Adapters on the last experts only: no router has anything trained before it."""
    last = MoeLoraConfig(r=4, moe_target=["experts"], layers_to_transform=[1])
    with pytest.raises(ConfigError, match="nothing is trained before the last router"):
        sft(tmp_path, peft_config=last, router_aux_loss_coef=0.1).train()


def evaluated(folder, others, **options):
    """A trainer after an evaluation, and all that was logged of it."""
    data = sft(folder).train_dataset
    trainer = sft(folder, others={"eval_dataset": data, **others}, per_device_eval_batch_size=8, **options)
    trainer.evaluate()
    (row,) = trainer.state.log_history
    return trainer, {name: value for name, value in row.items() if name.startswith("eval_") and "per_" not in name}


def hits(prediction):
    right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"hits": float(right.mean())}


def test_an_evaluation_is_measured_and_its_loss_left_alone(tmp_path):
    with_metrics = {"compute_metrics": hits}
    _, off = evaluated(tmp_path, with_metrics, router_metrics="off", router_aux_loss_coef=COEFFICIENT)
    trainer, found = evaluated(tmp_path, with_metrics, router_metrics="summary", router_aux_loss_coef=COEFFICIENT)
    assert found["eval_loss"] == off["eval_loss"]
    assert found["eval_hits"] == off["eval_hits"] > 0
    assert found["eval_router/drift_kl"] > 0
    assert 0 < found["eval_router/topk_overlap"] < 1
    assert not any("router/" in name for name in off)
    # The same eight sequences in one step, which is logged with the loss that is added, and without drift.
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 8
    trainer.train()
    (row, _) = trainer.state.log_history
    assert row["router/aux_loss"] == pytest.approx(found["eval_router/aux_loss"])
    assert row["loss"] == pytest.approx(found["eval_loss"] + COEFFICIENT * row["router/aux_loss"])
    assert "router/drift_kl" not in row
    assert not any("router/loss" in name for name in found)


def test_the_pass_for_the_logits_is_not_counted(tmp_path):
    """With `compute_metrics` TRL runs the model twice a batch, with the same routing: only sums could tell."""
    passes = []

    class Counting(MoeSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            passes.append(
                {label: float(layer.tokens) for label, layer in self._session._meters["eval"]._layers.items()}
            )
            return result

    tokens = sum(map(len, rows()))
    evaluated(tmp_path, {"compute_metrics": hits}, trainer=Counting, router_metrics="summary")
    assert passes == [{"0": tokens, "1": tokens}]
