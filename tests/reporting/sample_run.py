"""Runs as they are on disk, without training: for the report."""

from __future__ import annotations

import math
from pathlib import Path

from trl_moe_ext.reporting.run_record import Mark, RunRecord, Session, TrainedPart
from trl_moe_ext.router.history import HISTORY_FILE, RouterHistory

STEPS = range(10, 101, 10)


def shares(layer: int, step: int, experts: int = 4) -> list[float]:
    """Expert `layer` takes more and more; the last expert has no token from step 60 on."""
    weights = [1.0] * experts
    weights[layer % experts] += step / 25
    weights[-1] *= step < 60
    return [weight / sum(weights) for weight in weights]


def row(step: int, layers: int, router: str) -> dict[str, float]:
    """What is logged at a step; `router` is ``off``, ``summary`` or ``full``."""
    logged = {"step": step, "loss": 2 * math.exp(-step / 50), "grad_norm": 0.5, "learning_rate": 2e-4}
    if router == "off":
        return logged
    vios = [4 * max(shares(layer, step)) - 1 for layer in range(layers)]
    logged |= {
        "router/max_vio": sum(vios) / layers,
        "router/max_vio_max": max(vios),
        "router/entropy": 0.9,
        "router/dead_experts": layers * (step >= 60),
        "router/selected_mass": 0.6,
        "router/aux_loss": 2.1,
    }
    if router == "full":
        logged |= {f"router/max_vio/{layer}": vio for layer, vio in enumerate(vios)}
        logged |= {"router/drift_kl": step * 1e-4, "router/topk_overlap": 1 - step * 1e-3}
        logged |= {f"router/drift_kl/{layer}": layer * step * 1e-4 for layer in range(layers)}
    return logged


def write_run(directory: Path, layers: int = 3, router: str = "full", name: str = "a model") -> Path:
    """A finished run of 100 steps with an evaluation in the middle."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [row(step, layers, router) for step in STEPS]
    rows.insert(5, {"step": 50, "eval_loss": 0.9})
    rows.append({"step": 100, "eval_loss": 1.1})
    record = RunRecord(
        log_history=rows,
        marks=[Mark(0, 0.0, 0), *(Mark(step, float(step), 50 * step) for step in STEPS), Mark(100, 104.5, 5000)],
        sessions=[Session("2026-03-04T09:00:00+00:00", "2026-03-04T09:01:44+00:00", 0)],
        peak_memory={"process": 2_500_000_000, "cuda:0": 60_000_000_000},
        memory={"process": 24_000_000_000, "cuda:0": 80_000_000_000},
        adapted=[
            TrainedPart("routed experts", layers, 900_000),
            TrainedPart("attention", 4 * layers, 100_000),
            TrainedPart("router", 0, 0),
        ],
        total_parameters=50_000_000,
        model={"name": name, "class": "Qwen3MoeForCausalLM"},
        settings={"adapter": {"peft_type": "MOE_LORA", "r": 8}, "router": {"router_metrics": "full"}},
        versions={"torch": "2.13.0"},
        machine={"processor": "a processor", "cores": 2, "processes": 1},
        max_steps=100,
        is_finished=True,
    )
    record.save(directory)
    if router != "off":
        history = RouterHistory()
        for step in STEPS:
            history.append(step, {str(layer): shares(layer, step) for layer in range(layers)})
        history.save(directory / HISTORY_FILE)
    return directory
