"""What is lost by training fewer experts? Evaluation loss against trained parameters, on a narrow task.

    python configs/quickstart/expert_selection.py                       # the model and the chats of this folder
    python configs/quickstart/expert_selection.py --subject smollm2     # after upcycle_smollm2.py

Profiles the model on the task's training split, trains every variant with a few learning rates on a seed of its own,
and with the best of them on three others. Writes `expert_selection_<subject>.json` and `.png` into `--out`, and prints
the table. Runs that the JSON file has already are not repeated: after an interruption the command goes on.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from trl import SFTConfig, SFTTrainer

from trl_moe_ext import MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.cli.main import app
from trl_moe_ext.files import write_atomically
from trl_moe_ext.profiles.profile import ExpertProfile

HERE = Path(__file__).resolve().parent
SEARCH_SEED, SEEDS = 0, (1, 2, 3)
LORA_RATES, ESFT_RATES = (1, 2, 4, 8), (1, 2, 4, 8)
"""Multiples of the subject's learning rates, tried with the first seed."""


@dataclass(frozen=True)
class Subject:
    """A model and its narrow task.

    Attributes:
        rates: learning rate of LoRA, and of experts that are trained in full.
        options: of the trainer.
    """

    model: Path
    data: Path
    rates: tuple[float, float]
    options: dict[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "quickstart": Subject(
        HERE / "model",
        HERE / "data",
        (2e-3, 5e-4),
        {"max_steps": 84, "per_device_train_batch_size": 8, "assistant_only_loss": True, "max_length": 256},
    ),
    "smollm2": Subject(
        Path("out/smollm2-moe"),
        Path("out/asyncio"),
        (4e-4, 5e-5),
        {"max_steps": 80, "per_device_train_batch_size": 4, "packing": True, "max_length": 512},
    ),
}


def lora(**options: Any) -> MoeLoraConfig:
    """LoRA on experts alone: what is trained beside them would hide what they do."""
    return MoeLoraConfig(r=8, lora_alpha=32, moe_target=["experts"], task_type="CAUSAL_LM", **options)


def at_random(profile: ExpertProfile, number: int, seed: int) -> dict[str, list[int]]:
    """So many experts of each layer, whatever their use."""
    draw = random.Random(seed)
    return {
        name: sorted(draw.sample(range(layer.num_experts), number))
        for layer in profile.layers
        for name in layer.experts
    }


# Name -> the adapter, from the profile's file, the number of experts in a layer and a seed.
VARIANTS: dict[str, Callable[[Path, int, int], Any]] = {
    "all experts": lambda file, experts, seed: lora(),
    "top 50 %": lambda file, experts, seed: lora(expert_selection=f"profile:{file}", experts_per_layer=experts // 2),
    "top 25 %": lambda file, experts, seed: lora(expert_selection=f"profile:{file}", experts_per_layer=experts // 4),
    "top 1 of 8": lambda file, experts, seed: lora(expert_selection=f"profile:{file}", experts_per_layer=experts // 8),
    "random 25 %": lambda file, experts, seed: lora(
        selected_experts=at_random(ExpertProfile.load(file), experts // 4, seed)
    ),
    "all, rank by share": lambda file, experts, seed: lora(expert_selection=f"profile:{file}", expert_rank="by_share"),
    "ESFT, top 25 %": lambda file, experts, seed: MoeEsftConfig(
        expert_selection=f"profile:{file}", experts_per_layer=experts // 4, task_type="CAUSAL_LM"
    ),
}


@dataclass(frozen=True)
class Run:
    """What came of a run: evaluation loss before and after, and how many parameters were trained."""

    variant: str
    rate: float
    seed: int
    before: float
    after: float
    parameters: int


def run(subject: Subject, variant: str, rate: float, seed: int, profile: Path) -> Run:
    """Train once."""
    data = load_dataset(str(subject.data))
    experts = ExpertProfile.load(profile).layers[0].num_experts
    with TemporaryDirectory() as folder:
        on_gpu = torch.cuda.is_available()
        trainer = SFTTrainer(
            str(subject.model),
            args=SFTConfig(
                output_dir=folder,
                model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
                per_device_eval_batch_size=16,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                bf16=on_gpu,
                gradient_checkpointing=False,
                router_aux_loss_coef=0.0,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
                **subject.options,
            ),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            peft_config=VARIANTS[variant](profile, experts, seed),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        return Run(variant, rate, seed, before, trainer.evaluate()["eval_loss"], trained)


class Runs:
    """Those of a file, and those that are asked for and are not there yet, which are added to it."""

    def __init__(self, path: Path, jobs: int) -> None:
        self._path, self._jobs = path, jobs
        self.done = [Run(**each) for each in json.loads(path.read_text())] if path.exists() else []

    def make(self, subject: Subject, wanted: Iterable[tuple[str, float, int]], profile: Path) -> None:
        found = {(each.variant, each.rate, each.seed) for each in self.done}
        with ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn")) as pool:
            missing = [each for each in wanted if each not in found]
            for future in as_completed([pool.submit(run, subject, *each, profile) for each in missing]):
                self.done.append(future.result())
                print(self.done[-1], flush=True)
                write_atomically(self._path, json.dumps([asdict(each) for each in self.done], indent=1))

    def best_rate(self, variant: str) -> float:
        tried = [each for each in self.done if each.variant == variant and each.seed == SEARCH_SEED]
        return min(tried, key=lambda each: each.after).rate

    def of(self, variant: str) -> list[Run]:
        """The runs that count."""
        rate = self.best_rate(variant)
        return [each for each in self.done if (each.variant, each.rate) == (variant, rate) and each.seed in SEEDS]


def rates_of(subject: Subject, variant: str) -> list[float]:
    """The learning rates to try."""
    is_esft = variant.startswith("ESFT")
    return [factor * subject.rates[is_esft] for factor in (ESFT_RATES if is_esft else LORA_RATES)]


def table(runs: Runs) -> None:
    """The mean of the seeds, each of them, and the loss relative to that of all experts."""
    reference = statistics.mean(each.after for each in runs.of("all experts"))
    print(f"evaluation loss before training: {runs.done[0].before:.4f}\n")
    print("| trained | parameters | learning rate | eval loss | to all experts | of each seed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for variant in VARIANTS:
        found = sorted(runs.of(variant), key=lambda each: each.seed)
        loss = statistics.mean(each.after for each in found)
        each_seed = ", ".join(f"{each.after:.4f}" for each in found)
        change = f"{100 * (loss / reference - 1):+.1f} %"
        print(f"| {variant} | {found[0].parameters:,} | {found[0].rate:g} | {loss:.4f} | {change} | {each_seed} |")


def draw(runs: Runs, path: Path) -> None:
    """Loss over parameters: the mean of the seeds, and each."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for variant, marker in zip(VARIANTS, "osD^vPX", strict=True):
        found = runs.of(variant)
        losses = [each.after for each in found]
        [points] = axes.plot([each.parameters for each in found], losses, marker, alpha=0.35, markersize=5)
        mean = statistics.mean(losses)
        axes.plot(found[0].parameters, mean, marker, color=points.get_color(), markersize=10, label=variant)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("evaluation loss (large: mean of the seeds)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="quickstart")
    parser.add_argument("--out", type=Path, default=Path("out/expert_selection"), help="folder (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    options = parser.parse_args()
    subject = SUBJECTS[options.subject]
    options.out.mkdir(parents=True, exist_ok=True)
    profile = options.out / f"profile_{options.subject}.json"
    if not profile.exists():
        arguments = ["profile", str(subject.model), "--dataset", str(subject.data), "--out", str(profile)]
        app([*arguments, "--max_length", str(subject.options["max_length"])], standalone_mode=False)
    runs = Runs(options.out / f"expert_selection_{options.subject}.json", options.jobs)
    search = [(variant, rate, SEARCH_SEED) for variant in VARIANTS for rate in rates_of(subject, variant)]
    runs.make(subject, search, profile)
    runs.make(subject, [(variant, runs.best_rate(variant), seed) for variant in VARIANTS for seed in SEEDS], profile)
    draw(runs, options.out / f"expert_selection_{options.subject}.png")
    table(runs)


if __name__ == "__main__":
    main()
