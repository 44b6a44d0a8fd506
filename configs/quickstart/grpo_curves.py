"""Does asynchronous GRPO learn as well? Curves and tables of runs on the sums of `grpo.yaml`.

    python configs/quickstart/grpo_curves.py

trains with TRL's synchronous trainer and with the asynchronous one; then with a high learning rate and answers that
are always four updates old, by losses that make different things of that, with several seeds; every run is a process
of its own, one after the other. Writes `grpo_curves.json`, `grpo_curves.png` and `grpo_staleness.png` into `--out`,
and prints the tables. Runs that the JSON file has already are not repeated: after an interruption the command goes
on.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peft import AutoPeftModelForCausalLM
from rewards import right_answer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.loss.importance import Corrected, ImportanceCorrection
from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer

HERE = Path(__file__).resolve().parent
RECIPE: dict[str, Any] = yaml.safe_load((HERE / "grpo.yaml").read_text())
MODEL = str(HERE / "model")
SEEDS = {"curves": (1, 2, 3, 4, 5), "staleness": (1, 2, 3)}
"""Not 0, which the learning rate of the second picture was looked for with."""
LOGGING_STEPS = 3
"""A point of a curve is the mean over the answers of so many steps."""
ANSWERS_EACH = 8
"""Sampled to each question of the test split, before and after training."""
UNCLIPPED = 1e9

Curve = list[tuple[int, float]]


class AheadTrainer(AsyncMoeGRPOTrainer):
    """Takes a step only when the generator is as far ahead as `max_staleness` lets it be.

    After the first steps all answers are that old when they are trained on, however fast the machine is.
    """

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        worker = self.rollout_worker
        assert worker is not None
        answers = (self.args.max_staleness + 1) * self.args.per_device_train_batch_size
        while worker.rollout_buffer.qsize() < answers:
            worker.check_health(self.args.heartbeat_stale_after_s)
            time.sleep(0.01)
        found: tuple[list[Any], Any] = super().get_batch_samples(*args, **kwargs)
        return found


class NoCorrection(ImportanceCorrection):
    """Every token weighs 1, as if the policy that is trained had drawn it."""

    def correct(
        self, log_probs: Tensor, generator_log_probs: Tensor, mask: Tensor, sequence: Tensor | None = None
    ) -> Corrected:
        corrected = super().correct(log_probs, generator_log_probs, mask, sequence)
        return replace(corrected, weights=torch.ones_like(corrected.weights), mask=mask)


@dataclass
class UncorrectedConfig(AsyncMoeGRPOConfig):
    """For the comparison only: no option of the trainer does this."""

    @property
    def correction(self) -> ImportanceCorrection:
        return NoCorrection()


@dataclass(frozen=True)
class Line:
    """How the runs of one line are made: what differs from the recipe."""

    picture: str
    label: str
    trainer: type = AheadTrainer
    config: type = AsyncMoeGRPOConfig
    options: dict[str, Any] = field(default_factory=dict)


# The synchronous trainer leaves no prompts out; nor does any other here.
ALL_PROMPTS = {"skip_zero_advantage": False}
STALE = {**ALL_PROMPTS, "max_staleness": 4, "learning_rate": 5e-3, "max_steps": 45}
CLIPPED = {**STALE, "importance_correction": "none"}
# The asynchronous trainer leaves the loss that balances a router out where, as here, no router is trained.
SYNC = {"model_init_kwargs": {"dtype": RECIPE["dtype"]}, "router_aux_loss_coef": 0.0}
LINES = (
    Line("curves", "sync", GRPOTrainer, GRPOConfig, SYNC),
    Line("curves", "async", AsyncMoeGRPOTrainer, options=ALL_PROMPTS),
    Line("staleness", "TIS, not stale", options={**STALE, "max_staleness": 0}),
    Line("staleness", "no ratio", config=UncorrectedConfig, options=STALE),
    Line("staleness", "ratio without limit", options={**CLIPPED, "epsilon": UNCLIPPED, "epsilon_high": UNCLIPPED}),
    Line("staleness", "PPO's clipping", options=CLIPPED),
    Line("staleness", "TIS", options=STALE),
    Line("staleness", "MIS", options={**STALE, "importance_correction": "mis"}),
)


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        rewards: mean of all answers that were scored, by step.
        accuracy: share of right answers to the test split afterwards.
        lag: updates that the answers trained on were behind, the mean over the steps; 0 for the synchronous trainer.
    """

    picture: str
    label: str
    seed: int
    rewards: Curve
    accuracy: float
    lag: float


def run(line: Line, seed: int, folder: Path) -> Run:
    """Train once."""
    known = {entry.name for entry in fields(line.config)}
    options = {name: value for name, value in RECIPE.items() if name in known} | line.options
    options |= {"output_dir": str(folder), "seed": seed, "logging_steps": LOGGING_STEPS, "save_strategy": "no"}
    data = load_dataset(str(HERE / "sums"))
    adapter = MoeLoraConfig(
        task_type="CAUSAL_LM", **{name: RECIPE[name] for name in ("lora_alpha", "lora_dropout")}, r=RECIPE["lora_r"]
    )
    trainer = line.trainer(
        MODEL, right_answer, line.config(**options, disable_tqdm=True), data["train"], peft_config=adapter
    )
    trainer.train()
    trainer.save_model(str(folder))
    rows = [row for row in trainer.state.log_history if "reward" in row]
    rewards = [(row["step"], row.get("rollout/reward", row["reward"])) for row in rows]
    lag = sum(int(name[4:]) * value for row in rows for name, value in row.items() if name.startswith("lag/"))
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    return Run(line.picture, line.label, seed, rewards, accuracy(model, data["test"]), lag / len(rows))


def accuracy(model: Any, rows: Dataset) -> float:
    """Share of sampled answers that are rewarded."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    inputs = tokenizer.apply_chat_template(
        list(rows["prompt"]), add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    length = RECIPE["max_completion_length"]
    sampling = {"do_sample": True, "top_k": 0, "temperature": 1.0, "num_return_sequences": ANSWERS_EACH}
    output = model.eval().generate(**inputs, max_new_tokens=length, **sampling)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = right_answer(texts, [answer for answer in rows["answer"] for _ in range(ANSWERS_EACH)])
    return statistics.mean(right)


def mean(curves: Sequence[Curve]) -> Curve:
    """The mean of curves over the same steps."""
    return [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*curves, strict=True)]


def plot(axes: Axes, runs: list[Run], **style: Any) -> None:
    """The mean over the seeds, and each seed in a thin line."""
    for each in runs:
        axes.plot(*zip(*each.rewards, strict=True), alpha=0.45, linewidth=0.8, **style)
    average = mean([each.rewards for each in runs])
    axes.plot(*zip(*average, strict=True), linewidth=2.5, label=runs[0].label, **style)


def draw(lines: dict[str, list[Run]], panels: list[tuple[str, ...]], columns: int, path: Path) -> None:
    """A panel for each tuple of labels; colours of Okabe and Ito, which the colour-blind can tell apart."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2 + 3 * columns, 1 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, labels in zip(grid.flat, panels, strict=True):
        for label, colour, dashes in zip(labels, ("#0072B2", "#D55E00"), ("-", "--"), strict=False):
            plot(axes, lines[label], color=colour, linestyle=dashes)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(labels), frameon=False)
    seeds = len(lines[panels[0][0]])
    figure.supxlabel(f"step (thick: mean of {seeds} seeds, thin: each of them)")
    figure.supylabel("mean reward of all answers")
    figure.savefig(path, dpi=110)


def table(lines: dict[str, list[Run]], before: float) -> None:
    """Accuracy, lag, and the mean reward of the last third of the steps: the mean of the seeds, and each."""
    print(f"\nShare of right answers to the test split before training: {before:.3f}")
    for label, runs in lines.items():
        ends = [statistics.mean(value for _, value in one.rewards[-(len(one.rewards) // 3) :]) for one in runs]
        figures = {"accuracy": [one.accuracy for one in runs], "reward": ends, "lag": [one.lag for one in runs]}
        for name, found in figures.items():
            each = ", ".join(f"{value:.3f}" for value in found)
            print(f"{label:20} {name:9} {statistics.mean(found):.3f} ({each})")


def all_runs(path: Path, folder: Path) -> list[Run]:
    """Those of the file, and those that are not there yet, which are added to it one by one."""
    done = [Run(**each) for each in json.loads(path.read_text())] if path.exists() else []
    found = {(each.picture, each.label, each.seed) for each in done}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for line in LINES:
            for seed in SEEDS[line.picture]:
                if (line.picture, line.label, seed) not in found:
                    done.append(pool.submit(run, line, seed, folder).result())
                    path.write_text(json.dumps([asdict(each) for each in done]))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/grpo_curves"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = all_runs(options.out / "grpo_curves.json", options.out / "run")
    before = accuracy(AutoModelForCausalLM.from_pretrained(MODEL), load_dataset(str(HERE / "sums"))["test"])
    curves, staleness = (
        {line.label: [each for each in runs if each.label == line.label] for line in LINES if line.picture == picture}
        for picture in ("curves", "staleness")
    )
    reference, *losses = staleness
    panels = [(reference,), *((label, reference) for label in losses)]
    draw(curves, [tuple(curves)], 1, options.out / "grpo_curves.png")
    draw(staleness, panels, 3, options.out / "grpo_staleness.png")
    table(curves, before)
    table(staleness, before)


if __name__ == "__main__":
    main()
