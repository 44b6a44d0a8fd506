"""Does asynchronous GRPO learn as well? Two pictures and two tables of runs on the sums of `grpo.yaml`.

    python configs/quickstart/grpo_curves.py

trains with TRL's synchronous trainer and with the asynchronous one, three seeds each; then with answers that are always
four updates old and a high learning rate, by the losses that differ in what they make of that. Each run is a process
of its own, one after the other. Writes `grpo_curves.json`, `grpo_curves.png` and `grpo_staleness.png` into `--out`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from peft import AutoPeftModelForCausalLM
from rewards import right_answer
from torch import Tensor
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.loss.importance import Corrected, ImportanceCorrection
from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer

HERE = Path(__file__).resolve().parent
MODEL, RECIPE = HERE / "model", yaml.safe_load((HERE / "grpo.yaml").read_text())
LOGGING_STEPS = 3
"""A point of a curve is the mean of the answers of so many steps."""
ANSWERS_EACH = 8
"""Sampled to each question of the test split at the end."""
STALENESS = 4
HIGH_LEARNING_RATE = 1e-2

Curve = list[tuple[int, float]]


class AheadTrainer(AsyncMoeGRPOTrainer):
    """Waits until the generator is as far ahead as `max_staleness` lets it be.

    From then on all answers are that old when they are trained on, on a machine of any speed.
    """

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        worker = self.rollout_worker
        assert worker is not None
        ahead = (self.args.max_staleness + 1) * self.args.per_device_train_batch_size
        while worker.rollout_buffer.qsize() < ahead:
            worker.check_health(self.args.heartbeat_stale_after_s)
            time.sleep(0.01)
        found: tuple[list[Any], Any] = super().get_batch_samples(*args, **kwargs)
        return found


class NoCorrection(ImportanceCorrection):
    """Every token weighs 1, as if the policy that is trained had drawn it; the statistics remain those of the ratios."""

    def correct(
        self, log_probs: Tensor, generator_log_probs: Tensor, mask: Tensor, sequence: Tensor | None = None
    ) -> Corrected:
        return replace(super().correct(log_probs, generator_log_probs, mask, sequence), weights=mask.float())


@dataclass(frozen=True)
class Line:
    """How the runs of one line are made.

    Attributes:
        make: the trainer, from the options of the recipe, those of the line, and the data.
    """

    picture: str
    label: str
    make: Callable[[dict[str, Any], Dataset], Any]
    options: dict[str, Any] = field(default_factory=dict)


def adapter() -> MoeLoraConfig:
    lora = {name: RECIPE[f"lora_{name}"] for name in ("r", "alpha", "dropout")}
    return MoeLoraConfig(
        task_type="CAUSAL_LM", r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"]
    )


def sync(options: dict[str, Any], data: Dataset) -> GRPOTrainer:
    torch.set_num_threads(1)
    args = GRPOConfig(model_init_kwargs={"dtype": RECIPE["dtype"]}, **options)
    return GRPOTrainer(str(MODEL), right_answer, args, data, peft_config=adapter())


def overlapped(options: dict[str, Any], data: Dataset, kind: type = AsyncMoeGRPOTrainer) -> AsyncMoeGRPOTrainer:
    # The synchronous trainer leaves no prompts out.
    args = AsyncMoeGRPOConfig(skip_zero_advantage=False, **options)
    return kind(str(MODEL), right_answer, args, data, peft_config=adapter())  # type: ignore[no-any-return]


def ahead(options: dict[str, Any], data: Dataset) -> AsyncMoeGRPOTrainer:
    return overlapped({"max_staleness": STALENESS} | options, data, AheadTrainer)


def uncorrected(options: dict[str, Any], data: Dataset) -> AsyncMoeGRPOTrainer:
    trainer = ahead(options, data)
    trainer._correction = NoCorrection()
    return trainer


LINES = (
    Line("grpo_curves", "sync", sync),
    Line("grpo_curves", "async", overlapped),
    Line("grpo_staleness", "no staleness, TIS", ahead, {"max_staleness": 0}),
    Line("grpo_staleness", "TIS", ahead),
    Line("grpo_staleness", "MIS", ahead, {"importance_correction": "mis"}),
    Line("grpo_staleness", "TRL's clipping", ahead, {"importance_correction": "none"}),
    Line("grpo_staleness", "ratio without limit", ahead, {"importance_cap": float("inf")}),
    Line("grpo_staleness", "uncorrected", uncorrected),
)


@dataclass
class Run:
    """What came of a run.

    Attributes:
        reward: mean of all answers that were scored, by step.
        accuracy: share of right answers to the test split afterwards.
        lag: updates that the answers trained on were behind, mean over all steps.
        details: other metrics, by step.
    """

    picture: str
    label: str
    seed: int
    reward: Curve
    accuracy: float
    lag: float
    details: dict[str, Curve]


def run(line: Line, seed: int, folder: Path, extra: dict[str, Any]) -> Run:
    """Train once, in a process of its own."""
    known = {f.name for f in fields(GRPOConfig)} & {f.name for f in fields(AsyncMoeGRPOConfig)} & RECIPE.keys()
    options = {name: RECIPE[name] for name in known}
    options |= {"output_dir": str(folder), "save_strategy": "no", "logging_steps": LOGGING_STEPS, "seed": seed}
    options |= {"disable_tqdm": True} | line.options | extra
    data = load_dataset(str(HERE / "sums"))
    trainer = line.make(options, data["train"])
    trainer.train()
    trainer.save_model(str(folder))
    history = trainer.state.log_history
    curve = lambda name: [(row["step"], row[name]) for row in history if name in row]
    lags = [k * statistics.mean(v for _, v in curve(f"lag/{k}") or [(0, 0.0)]) for k in range(10)]
    names = ["importance/ess_share", "importance/kl_k3", "importance/ratio_max", "grad_norm", "entropy", "kl", "importance/limited_share"] + [f"lag/{k}" for k in range(5)]
    return Run(line.picture, line.label, seed, curve("rollout/reward") or curve("reward"), accuracy(folder, data["test"]), sum(lags), {n: curve(n) for n in names})


def accuracy(folder: Path, rows: Dataset) -> float:
    """Share of sampled answers that are rewarded."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    inputs = tokenizer.apply_chat_template(
        list(rows["prompt"]), add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    output = AutoPeftModelForCausalLM.from_pretrained(folder).eval().generate(
        **inputs,
        max_new_tokens=RECIPE["max_completion_length"],
        do_sample=True,
        top_k=0,
        temperature=1.0,
        num_return_sequences=ANSWERS_EACH,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [answer for answer in rows["answer"] for _ in range(ANSWERS_EACH)]
    return statistics.mean(right_answer(texts, answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/grpo_curves"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--extra", type=json.loads, default={})
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed in range(o.seeds):
            for line in LINES:
                if o.only and line.label not in o.only: continue
                t=time.time()
                r = pool.submit(run, line, seed, o.out / "run", o.extra).result()
                with open(o.out / "scratch.jsonl", "a") as f: f.write(json.dumps({"extra": o.extra, **asdict(r)}) + "\n")
                print(line.label, seed, o.extra, "acc %.3f lag %.2f t %.0f" % (r.accuracy, r.lag, time.time()-t), [round(v,2) for _, v in r.reward], flush=True)


if __name__ == "__main__":
    main()
