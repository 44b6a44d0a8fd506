"""Drive the quickstart's routers out of balance, and balance them with each method: table and curves.

    python configs/quickstart/balance.py

trains the model of this folder on its dataset with a trained router and a high learning rate for it, which sends most
tokens to few experts, and again with each balancing method on. Prints a table of means over the seeds and writes
`router_balance.png` and `router_balance.json` into `--out`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from datasets import load_dataset
from matplotlib.figure import Figure

from trl_moe_ext import MoeLoraConfig, MoeSFTConfig, MoeSFTTrainer

HERE = Path(__file__).parent
STEPS = 120
# Name -> options of the trainer, and whether the adapter has a balancing bias.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "none": ({"router_aux_loss_coef": 0.0}, False),
    "load balancing, 0.05": ({"router_aux_loss_coef": 0.05}, False),
    "bias, 0.01 a step": ({"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.01}, True),
}

Curve = list[tuple[int, float]]


def run(options: dict[str, Any], has_bias: bool, seed: int, folder: Path) -> tuple[Curve, Curve]:
    """Train once; returns MaxVio (mean of the layers) and evaluation loss over the steps."""
    data = load_dataset(str(HERE / "data"))
    trainer = MoeSFTTrainer(
        str(HERE / "model"),
        args=MoeSFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            router_learning_rate=2e-2,
            warmup_steps=10,
            lr_scheduler_type="cosine",
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=20,
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            **options,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=MoeLoraConfig(r=8, lora_alpha=32, router_mode="full", router_bias=has_bias),
    )
    trainer.train()
    history = trainer.state.log_history
    max_vio = [(row["step"], row["eval_router/max_vio"]) for row in history if "eval_router/max_vio" in row]
    losses = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    return max_vio, losses


def mean(curves: list[Curve]) -> Curve:
    """The mean of curves over the same steps."""
    return [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*curves, strict=True)]


def draw(results: dict[str, tuple[list[Curve], list[Curve]]], path: Path) -> None:
    """MaxVio and evaluation loss of each method: means over the seeds, and each seed in a pale line."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, which, label in zip(figure.subplots(1, 2), (0, 1), ("MaxVio", "evaluation loss"), strict=True):
        for number, (name, curves) in enumerate(results.items()):
            for curve in curves[which]:
                axes.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.25, linewidth=1)
            axes.plot(*zip(*mean(curves[which]), strict=True), color=f"C{number}", linewidth=2, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    max_vio, losses = figure.axes
    max_vio.set_ylim(bottom=0)
    ends = [curve[-1][1] for _, curves in results.values() for curve in curves]
    losses.set_ylim(0.9 * min(ends), 1.8 * max(ends))  # the start, ten times as high, would hide the differences
    losses.legend(title="balancing")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/balance"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, tuple[list[Curve], list[Curve]]] = {}
    for name, (method, has_bias) in METHODS.items():
        runs = [run(method, has_bias, seed, options.out / "run") for seed in range(options.seeds)]
        results[name] = ([max_vio for max_vio, _ in runs], [losses for _, losses in runs])
    (options.out / "router_balance.json").write_text(json.dumps(results))
    draw(results, options.out / "router_balance.png")
    print(f"{'balancing':24} {'MaxVio at the start':>20} {'at the end':>12} {'evaluation loss':>16}")
    for name, (max_vio, losses) in results.items():
        (_, start), (_, end), (_, loss) = mean(max_vio)[0], mean(max_vio)[-1], mean(losses)[-1]
        print(f"{name:24} {start:20.2f} {end:12.2f} {loss:16.3f}")


if __name__ == "__main__":
    main()
